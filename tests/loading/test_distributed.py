"""Two real ranks over gloo."""

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing

from fastprune.loading.loader import Loader


def _run(rank, folder, settings):
    """One rank: build the loader before the process group, load two epochs, save what came."""
    loader = Loader(
        settings.pop("beton"),
        fields=("images", "labels", "rows"),
        image_size=16,
        num_workers=1,
        **settings,
    )
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    epochs = [[rows.tolist() for _, _, rows in loader] for _ in range(2)]
    torch.save({"epochs": epochs, "len": len(loader)}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture
def two_ranks(bare_beton, tmp_path):
    """A function that runs two ranks with the same settings."""

    def run(**settings):
        arguments = (str(tmp_path), {"beton": str(bare_beton), **settings})
        torch.multiprocessing.spawn(_run, arguments, nprocs=2)
        return [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]

    return run


@pytest.mark.parametrize("order", ["random", "pages"])
def test_two_ranks_see_together_what_one_rank_with_twice_the_batch_sees(
    two_ranks, bare_beton, order
):
    ranks = two_ranks(batch_size=4, order=order)
    assert ranks[0]["len"] == ranks[1]["len"] == 3
    alone = Loader(
        bare_beton, batch_size=8, fields=("images", "labels", "rows"), image_size=16, order=order
    )
    for first, second in zip(*(rank["epochs"] for rank in ranks), strict=True):
        whole = [rows.tolist() for _, _, rows in alone]
        together = [
            np.stack(parts, axis=1).ravel().tolist() for parts in zip(first, second, strict=True)
        ]
        assert together == whole


def test_two_ranks_share_an_exact_epoch_of_a_subset(two_ranks):
    kept = list(range(0, 30, 4))
    ranks = two_ranks(batch_size=3, tail="exact", subset=kept)
    for first, second in zip(*(rank["epochs"] for rank in ranks), strict=True):
        assert sorted(row for batch in first + second for row in batch) == kept
