import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastprune.distillation.infobatch import InfoBatch, infobatch_weights, is_pruned_epoch
from fastprune.settings import PruningSettings

CPU = torch.device("cpu")
ROWS = np.arange(5, 2005, 2)
SETTINGS = PruningSettings(rule="infobatch")


def make(**changes) -> InfoBatch:
    arguments = {"epochs": 8, "seed": 0, "min_rows": 1, "device": CPU} | changes
    return InfoBatch(SETTINGS, ROWS, **arguments)


def losses_of(rows: np.ndarray) -> torch.Tensor:
    """Half of the rows are easy."""
    return torch.from_numpy(np.where(rows % 4 == 1, 1.0, 3.0).astype(np.float32))


def train(pruning: InfoBatch, epoch: int) -> np.ndarray:
    """Run an epoch in batches; returns its rows."""
    rows = pruning.begin_epoch(epoch)
    for batch in np.array_split(rows, 7):
        pruning.weigh(losses_of(batch), torch.from_numpy(batch))
    pruning.end_epoch()
    return rows


def test_rows_above_the_mean_are_kept_and_count_once():
    losses = np.array([0.0, 1.0, 5.0, 6.0], np.float32)
    weights = infobatch_weights(losses, np.arange(4), skip_probability=0.5, seed=0, epoch=1)
    assert weights[2:].tolist() == [1, 1]
    assert set(weights[:2]) <= {0.0, 2.0}


@given(st.integers(0, 2**63 - 1), st.floats(0.05, 0.95))
def test_weights_keep_the_expected_gradient(seed, skip_probability):
    rows = np.arange(20_000)
    losses = np.where(rows < 15_000, 1.0, 9.0).astype(np.float32)
    weights = infobatch_weights(losses, rows, skip_probability=skip_probability, seed=seed, epoch=3)
    easy = weights[:15_000]
    kept = 1 - skip_probability
    six_sigmas = 6 * np.sqrt(kept * skip_probability / len(easy))
    assert np.mean(easy > 0) == pytest.approx(kept, abs=six_sigmas)
    assert easy.mean() == pytest.approx(1, abs=six_sigmas / kept)
    assert (weights[15_000:] == 1).all()


def test_draw_of_a_row_depends_on_seed_epoch_and_row_alone():
    losses = np.where(np.arange(1000) < 700, 1.0, 9.0).astype(np.float32)
    rows = np.arange(1000)

    def weights(part=slice(None), **changes):
        settings = {"skip_probability": 0.5, "seed": 1, "epoch": 1} | changes
        return infobatch_weights(losses[part], rows[part], **settings)

    assert np.array_equal(weights()[300:], weights(slice(300, None)))
    assert not np.array_equal(weights(), weights(seed=2))
    assert not np.array_equal(weights(), weights(epoch=2))


def test_rows_that_were_never_seen_are_kept_and_leave_the_mean_alone():
    losses = np.array([1.0, np.nan, 3.0, np.nan] * 100, np.float32)
    weights = infobatch_weights(losses, np.arange(400), skip_probability=0.5, seed=0, epoch=1)
    assert (weights[1::2] == 1).all()
    assert (weights[2::4] == 1).all()
    assert set(weights[0::4]) == {0.0, 2.0}


def test_last_epochs_train_on_all_rows():
    pruned = [is_pruned_epoch(epoch, epochs=200, full_share=0.125) for epoch in range(200)]
    assert pruned == [True] * 175 + [False] * 25
    assert not any(is_pruned_epoch(epoch, epochs=5, full_share=1.0) for epoch in range(5))
    assert all(is_pruned_epoch(epoch, epochs=5, full_share=0.0) for epoch in range(5))
    assert not is_pruned_epoch(0, epochs=1, full_share=0.125)


def test_epochs_go_from_all_rows_over_some_to_all():
    pruning = make()
    counts = [len(train(pruning, epoch)) for epoch in range(8)]
    assert counts[0] == counts[7] == 1000
    assert all(700 < count < 800 for count in counts[1:7])
    assert len(set(counts[1:7])) > 1


def test_skipped_rows_keep_their_loss_and_come_again():
    pruning = make()
    train(pruning, 0)
    first, second = train(pruning, 1), train(pruning, 2)
    skipped = np.setdiff1d(ROWS, first)
    assert 0 < np.isin(skipped, second).sum() < len(skipped)


def test_weighted_losses_have_the_gradient_of_their_weights():
    pruning = make()
    train(pruning, 0)
    rows = pruning.begin_epoch(1)
    losses = losses_of(rows).requires_grad_()
    pruning.weigh(losses, torch.from_numpy(rows)).sum().backward()
    assert losses.grad.tolist() == [2.0 if row % 4 == 1 else 1.0 for row in rows]


def test_epoch_that_would_be_left_with_too_few_rows_trains_on_all():
    pruning = make(min_rows=900)
    train(pruning, 0)
    rows = pruning.begin_epoch(1)
    assert len(rows) == 1000
    weighted = pruning.weigh(losses_of(rows), torch.from_numpy(rows))
    assert torch.equal(weighted, losses_of(rows))


def test_half_done_epoch_goes_on_as_if_it_had_not_stopped():
    whole = make()
    for epoch in range(3):
        train(whole, epoch)
    stopped, resumed = make(), make()
    train(stopped, 0)
    parts = np.array_split(stopped.begin_epoch(1), 2)
    stopped.weigh(losses_of(parts[0]), torch.from_numpy(parts[0]))
    resumed.load_state_dict(stopped.state_dict())
    rows = resumed.begin_epoch(1)
    assert np.array_equal(rows, np.concatenate(parts))
    resumed.weigh(losses_of(parts[1]), torch.from_numpy(parts[1]))
    resumed.end_epoch()
    train(resumed, 2)
    theirs, ours = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(theirs[name].nan_to_num(), ours[name].nan_to_num()) for name in theirs)
    assert np.array_equal(whole.begin_epoch(3), resumed.begin_epoch(3))


def _one_of_two(rank: int, folder: str) -> None:
    """Note half of the losses, in one of two processes; write what this one then knows."""
    import torch.distributed as dist

    from fastprune.base.ranks import Ranks

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    pruning = make(ranks=Ranks(rank, 2, dist.group.WORLD))
    mine = pruning.begin_epoch(0)[rank::2]
    pruning.weigh(losses_of(mine), torch.from_numpy(mine))
    resumed = make(ranks=Ranks(rank, 2, dist.group.WORLD))
    resumed.load_state_dict(pruning.state_dict())
    pruning.end_epoch()
    resumed.end_epoch()
    np.save(f"{folder}/{rank}.npy", [pruning.begin_epoch(1), resumed.begin_epoch(1)])
    dist.destroy_process_group()


def test_processes_choose_the_rows_that_one_alone_would(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    alone = make()
    train(alone, 0)
    expected = alone.begin_epoch(1)
    for rank in range(2):
        assert all(np.array_equal(rows, expected) for rows in np.load(tmp_path / f"{rank}.npy"))
