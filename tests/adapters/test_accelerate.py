"""Accelerate itself: accumulation over epochs, and metrics gathered from two real ranks."""

import os

import pytest
import torch
import torch.multiprocessing
from torch import nn

from fastprune.base.errors import InvalidValueError
from fastprune.loading.loader import Loader
from tests.conftest import require_library

require_library("accelerate")

from accelerate import Accelerator  # noqa: E402

from fastprune.adapters.accelerate import AccelerateLoader  # noqa: E402

# What other packages warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


def _loader(path, **settings):
    settings = {
        "batch_size": 7,
        "image_size": 8,
        "fields": ("images", "labels", "rows"),
        "num_workers": 1,
        **settings,
    }
    return AccelerateLoader(Loader(path, device="cpu", **settings))


def test_accumulated_gradients_are_applied_at_the_end_of_each_epoch(bare_beton):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    network, optimizer, loader = accelerator.prepare(network, optimizer, _loader(bare_beton))
    assert len(loader) == 4
    synced = []
    for _ in range(2):
        for images, labels, _ in loader:
            with accelerator.accumulate(network):
                accelerator.backward(nn.functional.cross_entropy(network(images), labels))
                synced.append(accelerator.sync_gradients)
                optimizer.step()
                optimizer.zero_grad()
    assert synced == [False, False, True, True] * 2


def test_a_resumed_epoch_ends_where_it_would_have(bare_beton):
    loader = _loader(bare_beton)
    next(iter(loader))
    resumed = _loader(bare_beton)
    resumed.load_state_dict(loader.state_dict())
    assert [resumed.end_of_dataloader for _ in resumed] == [False, False, True]


def _join(rank, folder):
    """Make this process one of two ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )


def _gather(rank, folder, beton):
    _join(rank, folder)
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(_loader(beton, train=False, tail="pad"))
    rows = [accelerator.gather_for_metrics(rows) for _, _, rows in loader]
    torch.save(torch.cat(rows), f"{folder}/rank{rank}.pt")
    with pytest.raises(InvalidValueError, match=r"gather_for_metrics would hang. Use tail="):
        _loader(beton, tail="exact")
    torch.distributed.destroy_process_group()


def test_metrics_gathered_from_two_ranks_have_every_row_once(bare_beton, tmp_path):
    torch.multiprocessing.spawn(_gather, (str(tmp_path), str(bare_beton)), nprocs=2)
    for rank in (0, 1):
        assert sorted(torch.load(tmp_path / f"rank{rank}.pt").tolist()) == list(range(30))


def _resume(rank, folder, beton):
    _join(rank, folder)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    network = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)

    def steps(loader, number=None):
        """The rows of all ranks in each step, and whether the gradients are applied then."""
        found = []
        for _, _, rows in loader:
            with accelerator.accumulate(network):
                found.append((accelerator.gather(rows).tolist(), accelerator.sync_gradients))
            if len(found) == number:
                break
        return found

    network, optimizer = accelerator.prepare(network, optimizer)
    whole = steps(accelerator.prepare(_loader(beton, batch_size=3)))
    interrupted = accelerator.prepare(_loader(beton, batch_size=3))
    first = steps(interrupted, 2)
    resumed = accelerator.prepare(_loader(beton, batch_size=3))
    resumed.load_state_dict(interrupted.state_dict())
    assert first + steps(resumed) == whole
    assert len(whole) == 5
    torch.distributed.destroy_process_group()


def test_two_ranks_resume_in_the_middle_of_an_epoch(bare_beton, tmp_path):
    torch.multiprocessing.spawn(_resume, (str(tmp_path), str(bare_beton)), nprocs=2)
