"""The loops of other codebases, as far as they touch a loader, run on this one.

RepDistiller, mdistiller and MDSLR are no packages, so what their loops do with a loader is written
down here; timm, torchdistill, Lightning and Accelerate run themselves in test_consumers.py.
"""

import numpy as np
import pytest
import torch
from torch import nn

from fastprune.loading.loader import Loader

ROWS = ("images", "labels", "rows")


@pytest.fixture
def student():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))


def _loader(path, **settings):
    return Loader(path, batch_size=6, image_size=32, device="cpu", **settings)


def test_repdistiller_trains_on_image_label_and_index(bare_beton, student):
    loader = _loader(bare_beton, fields=ROWS)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    for input, target, index in loader:  # noqa: A001 - their names
        loss = nn.functional.cross_entropy(student(input.float()), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert index.shape == target.shape


def test_repdistillers_crd_reads_a_memory_of_all_rows_by_index_and_contrast(bare_beton):
    loader = _loader(bare_beton, fields=(*ROWS, "contrast_rows"), num_negatives=20)
    n_data = loader.beton.num_rows
    memory = torch.randn(n_data, 8)
    for input, _target, index, contrast_idx in loader:  # noqa: A001
        weight = torch.index_select(memory, 0, contrast_idx.view(-1)).view(len(input), 21, 8)
        assert torch.equal(weight[:, 0], memory[index])


def test_repdistiller_validates_on_image_and_label(bare_beton, student):
    correct = sum(
        (student(input.float()).argmax(1) == target).sum()
        for input, target in _loader(bare_beton, train=False)  # noqa: A001
    )
    assert 0 <= correct <= 30


@pytest.mark.parametrize("fields", [ROWS, (*ROWS, "second_images")])
def test_mdistiller_draws_as_many_batches_as_it_counted_in_every_epoch(bare_beton, fields):
    train_loader = _loader(bare_beton, fields=fields)
    for _ in range(2):
        train_iter = iter(train_loader)
        for _ in range(len(train_loader)):
            image_weak, target, index, *image_strong = next(train_iter)
            assert len(image_strong) == ("second_images" in fields)
            assert len(image_weak.float()) == len(target.long()) == len(index.long())
    num_data, num_classes = len(train_loader.dataset), train_loader.num_classes
    assert (num_data, num_classes) == (30, 3)


def test_mdslr_looks_up_statistics_of_the_whole_set_by_index(bare_beton):
    kept = np.arange(0, 30, 2)
    statistics = torch.arange(30)
    loader = Loader(
        bare_beton,
        kept,
        batch_size=5,
        image_size=32,
        fields=ROWS,
        device="cpu",
    )
    for _, target, index in loader:
        assert torch.equal(statistics[index] % 3, target)


@pytest.mark.parametrize("name", ["sampler", "batch_sampler"])
def test_the_epoch_is_named_through_the_samplers(bare_beton, name):
    loader = _loader(bare_beton, fields=ROWS)
    sampler = getattr(loader, name)
    sampler = getattr(sampler, "sampler", sampler)
    sampler.set_epoch(4)
    announced = list(loader.batch_sampler)
    assert [rows.tolist() for _, _, rows in loader] == announced
    assert len(loader.batch_sampler) == len(loader) == 5
    sampler.set_epoch(4)
    assert list(loader.sampler) == [row for rows in announced for row in rows]
    assert len(loader.sampler) == 30


@pytest.mark.parametrize(("tail", "num_rows"), [("drop", 12), ("pad", 18), ("exact", 15)])
def test_the_samplers_count_what_this_rank_gets(bare_beton, tail, num_rows):
    loader = _loader(bare_beton, tail=tail, distributed=(1, 2))
    assert len(loader.sampler) == len(list(loader.sampler)) == num_rows
    assert len(loader.batch_sampler) == len(list(loader.batch_sampler)) == len(loader)
    assert loader.batch_sampler.drop_last == (tail == "drop")
    assert loader.batch_sampler.batch_size == 6


def test_it_is_no_dataloader_that_a_framework_would_build_again(bare_beton):
    loader = _loader(bare_beton)
    assert not isinstance(loader, torch.utils.data.DataLoader)
    assert (loader.batch_size, loader.drop_last, loader.collate_fn) == (6, True, None)
    assert loader.mixup_enabled is False
    assert loader.num_workers >= 1
