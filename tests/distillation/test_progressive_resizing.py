import time
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastprune.distillation.progressive_resizing import GrowingLoader, image_sizes, size_at
from fastprune.distillation.step import Stepper
from fastprune.distillation.trainer import distill
from fastprune.loading.loader import Loader
from fastprune.networks import weights_metadata

SIZES = (16, 24, 32)


@pytest.fixture
def make(betons):
    """Open a loader of the train beton at a size."""

    def of_size(size: int) -> Loader:
        return Loader(
            betons / "train.beton",
            batch_size=16,
            augment="pad_crop",
            fields=("images", "labels", "rows"),
            image_size=size,
            num_workers=1,
            device="cpu",
        )

    return of_size


@pytest.fixture
def growing(make):
    return GrowingLoader(make, SIZES, epochs=6)


def test_sizes_end_at_the_last_one_even_between_two_steps():
    assert image_sizes(128, 192, step=32) == (128, 160, 192)
    assert image_sizes(128, 150, step=32) == (128, 150)
    assert image_sizes(128, 129, step=32) == (128, 129)


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 16, 100])
def test_sizes_rise_in_nearly_equal_parts_to_the_last_one(epochs):
    sizes = [size_at(epoch, SIZES, epochs=epochs) for epoch in range(epochs)]
    assert sizes == sorted(sizes)
    counts = [sizes.count(size) for size in SIZES]
    assert max(counts) - min(counts) <= 1
    assert sizes[-1] == SIZES[-1]


def test_growing_images_come_in_the_order_of_a_loader_of_one_size(growing, make):
    plain = make(32)
    for epoch in range(6):
        growing.set_epoch(epoch)
        plain.set_epoch(epoch)
        ours, theirs = list(growing), list(plain)
        assert {batch[0].shape[-1] for batch in ours} == {SIZES[epoch // 2]}
        assert all(torch.equal(a[2], b[2]) for a, b in zip(ours, theirs, strict=True))


def test_state_of_a_growing_loader_goes_on_at_the_size_of_its_epoch(growing, make):
    growing.set_epoch(3)
    batches = iter(growing)
    next(batches)
    state = growing.state_dict()
    resumed = GrowingLoader(make, SIZES, epochs=6)
    resumed.load_state_dict(state)
    for ours, theirs in zip(resumed, batches, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[2], theirs[2])


def test_rows_stay_chosen_when_the_size_changes(growing):
    growing.set_rows(np.arange(0, 80, 2))
    growing.set_epoch(4)
    assert len(growing) == 2
    assert all((rows % 2 == 0).all() for _, _, rows in growing)


class Killed(BaseException):
    """What no handler of ours catches."""


def test_run_of_growing_images_resumes_to_the_same_weights(recipe, tmp_path, monkeypatch):
    make = partial(
        recipe, data={"first_image_size": 16, "image_size_step": 8}, schedule={"epochs": 3}
    )
    whole = distill(make(run={"out": tmp_path / "whole"}))
    sizes, update = [], Stepper.update

    def dying(self, batch, *, step, **others):
        sizes.append(batch.images.shape[-1])
        if step == 7:
            raise Killed
        return update(self, batch, step=step, **others)

    run = {"out": tmp_path / "killed", "checkpoint_every": 1}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Stepper, "update", dying)
        distill(make(run=run))
    assert sizes == [16] * 4 + [24] * 3
    resumed = distill(make(run=run), resume=True)
    weights = load_file(whole.student), load_file(resumed.student)
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_a_new_size_takes_once_is_start_up(recipe, teacher, monkeypatch):
    sizes, backward, warm_up = [], Stepper._backward, Loader.warm_up

    def slow(self, batch, ask, **options):
        if batch.images.shape[-1] not in sizes:
            sizes.append(batch.images.shape[-1])
            time.sleep(1)
        return backward(self, batch, ask, **options)

    def slow_to_open(self):
        time.sleep(1)
        warm_up(self)

    monkeypatch.setattr(Stepper, "_backward", slow)
    monkeypatch.setattr(Loader, "warm_up", slow_to_open)
    data = {"first_image_size": 16, "image_size_step": 8}
    result = distill(recipe(data=data, schedule={"epochs": 3}))
    assert sizes == [16, 24, 32]
    assert result.startup_seconds > 3 + 4  # three sizes; their loaders, and one to validate


def test_validation_may_see_larger_images(recipe):
    result = distill(recipe(data={"val_image_size": 40}))
    assert weights_metadata(result.student)["image_size"] == "40"
