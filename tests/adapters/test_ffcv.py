"""FFCV as a host: our decoder in a stock `ffcv.Loader`."""

import numpy as np
import pytest
import torch

from fastprune.base.errors import InvalidValueError
from fastprune.loading.loader import Loader
from tests.conftest import require_library

require_library("ffcv")

import ffcv  # noqa: E402
from ffcv.loader import OrderOption  # noqa: E402
from ffcv.transforms import ToTensor, ToTorchImage  # noqa: E402

from fastprune.adapters.ffcv import ViewDecoder, ViewOrder  # noqa: E402


def _stock_loader(path, decoder, field="photo", **settings):
    """Somebody's own loader: images as they write them, labels by FFCV's default."""
    pipelines = {field: [decoder, ToTensor(), ToTorchImage()]}
    return ffcv.Loader(str(path), 8, num_workers=1, pipelines=pipelines, **settings)


def _ours(path, **settings):
    defaults = {
        "batch_size": 8,
        "image_size": 32,
        "seed": 5,
        "dtype": torch.uint8,
        "fields": ("images", "labels", "rows"),
    }
    return Loader(path, backend="cpu", augment="rrc", **{**defaults, **settings})


def _images(batches):
    """All images of an epoch, copied out of FFCV's buffers."""
    return torch.cat([batch[0].clone() for batch in batches])


@pytest.mark.parametrize("os_cache", [True, False])
def test_views_are_the_cpu_engines_in_every_epoch_under_an_order_of_ffcvs(stock_beton, os_cache):
    decoder = ViewDecoder(32, seed=5)
    order = OrderOption.SEQUENTIAL
    theirs = _stock_loader(stock_beton, decoder, order=order, os_cache=os_cache, drop_last=False)
    ours = _ours(stock_beton, order="sequential", tail="exact")
    epochs = [_images(theirs) for _ in range(3)]
    for epoch in epochs:
        assert torch.equal(epoch, _images(ours))
    assert not torch.equal(epochs[0], epochs[1])
    assert decoder.failures == {}


@pytest.mark.parametrize("subset", [None, np.arange(0, 30, 2)])
def test_our_order_gives_the_rows_and_views_of_the_loader(stock_beton, subset):
    decoder = ViewDecoder((32, 32), seed=5)
    order = ViewOrder(decoder, seed=5)
    theirs = _stock_loader(stock_beton, decoder, order=order, indices=subset, drop_last=False)
    ours = _ours(stock_beton, subset=subset, tail="exact")
    for _ in range(2):
        for (images, labels), (x, y, _) in zip(theirs, ours, strict=True):
            assert torch.equal(images, x)
            assert torch.equal(labels.squeeze(1), y)


def test_two_live_iterators_under_our_order_have_their_own_epochs(stock_beton):
    decoder = ViewDecoder(32, seed=5)
    theirs = _stock_loader(stock_beton, decoder, order=ViewOrder(decoder, seed=5))
    both = [(a[0].clone(), b[0].clone()) for a, b in zip(theirs, theirs, strict=True)]
    ours = _ours(stock_beton)
    for epoch in zip(*both, strict=True):
        assert torch.equal(torch.cat(epoch), _images(ours))


def test_a_row_that_cannot_be_decoded_is_black_and_the_decoder_says_why(beton_copy, damage_row):
    damage_row(beton_copy, 3, b"\0\0\0\0")
    decoder = ViewDecoder(32)
    theirs = _stock_loader(beton_copy, decoder, field="image", drop_last=False)
    images = _images(theirs)
    assert not images[3].any()
    assert images[[2, 4]].flatten(1).any(1).all()
    assert list(decoder.failures) == [3]
    assert "does not start with a JPEG's marker" in decoder.failures[3]


def test_an_error_inside_ffcvs_thread_hangs_nobody(stock_beton, monkeypatch):
    decoder = ViewDecoder(32)
    theirs = _stock_loader(stock_beton, decoder, drop_last=False)

    def fail(*arguments):
        raise MemoryError("no room")

    monkeypatch.setattr(decoder._decoder, "decode", fail)
    assert not _images(theirs).any()
    assert len(decoder.failures) == 30
    assert decoder.failures[0] == "MemoryError: no room"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be an integer >= 1"),
        ({"size": (224, 225)}, r"size must be one number or a square, not \(224, 225\)"),
        ({"size": 8, "seed": -1}, "seed must be"),
        ({"size": 8, "augment": "cutmix"}, "augment must be one of 'rrc'"),
    ],
)
def test_an_argument_outside_its_domain_is_refused(arguments, message):
    with pytest.raises(InvalidValueError, match=message):
        ViewDecoder(**arguments)
