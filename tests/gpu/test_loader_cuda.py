"""The loader on a GPU: nvJPEG decodes, and the promise is the same."""

import importlib.util

import numpy as np
import pytest
import torch

from fastprune.beton.convert.writer import convert
from fastprune.loading.loader import Loader
from tests.images import write_image_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


_HAS_DALI = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
needs_dali = pytest.mark.skipif(not _HAS_DALI, reason="needs DALI")
both_backends = pytest.mark.parametrize("backend", [pytest.param("dali", marks=needs_dali), "cpu"])


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    """Thirty pictures of three classes."""
    folder = tmp_path_factory.mktemp("cuda")
    convert(write_image_folder(folder / "images", per_class=10), folder / "a.beton", workers=1)
    return folder / "a.beton"


def _loader(path, **settings):
    defaults = {
        "batch_size": 8,
        "image_size": 32,
        "augment": "rrc",
        "fields": ("images", "labels", "rows"),
    }
    return Loader(path, **{**defaults, **settings})


def test_batches_are_normalized_and_channels_last_on_the_gpu(beton):
    images, labels, rows = next(iter(_loader(beton)))
    assert images.is_cuda and labels.is_cuda and rows.is_cuda
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)


@needs_dali
@pytest.mark.parametrize("settings", [{}, {"order": "pages"}, {"subset": np.arange(0, 30, 2)}])
def test_rows_are_those_of_the_cpu_and_pixels_nearly_so(beton, settings):
    def epoch(device, backend):
        batches = _loader(
            beton, device=device, backend=backend, tail="exact", dtype=torch.uint8, **settings
        )
        images, _, rows = zip(*batches, strict=True)
        return torch.cat(images).cpu().int(), torch.cat(rows).tolist()

    gpu, cpu = epoch("cuda", "dali"), epoch("cpu", "dali")
    assert gpu[1] == cpu[1]
    assert (gpu[0] - cpu[0]).abs().float().mean(dim=(1, 2, 3)).max() < 3


@both_backends
def test_batches_after_a_resume_are_those_of_the_uninterrupted_run(beton, backend):
    uninterrupted = _loader(beton, batch_size=2, backend=backend)
    batches = iter(uninterrupted)
    for _ in range(7):
        next(batches)
    resumed = _loader(beton, batch_size=2, backend=backend)
    resumed.load_state_dict(uninterrupted.state_dict())
    for one, other in zip(list(batches), resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@both_backends
def test_decoding_writes_into_no_memory_that_the_callers_stream_still_uses(beton, backend):
    """nvJPEG's hardware is reported not to wait for the stream that used its memory last."""
    loader = _loader(beton, backend=backend, dtype=torch.uint8)
    expected = [images.cpu() for images, _, _ in loader]
    loader.set_epoch(0)
    copies = []
    for images, _, _ in loader:
        # The stream is far behind the host now: it reads the batch, and fills memory that is given
        # back at once, only after the next batches were asked for.
        torch.cuda._sleep(100_000_000)
        copies.append(images.clone())
        poison = [torch.full_like(images, 255) for _ in range(4)]
        del images, poison
    assert all(torch.equal(copy.cpu(), own) for copy, own in zip(copies, expected, strict=True))


@both_backends
def test_batches_are_those_of_the_default_stream_in_any_stream(beton, backend):
    loader = _loader(beton, backend=backend)
    expected = [[part.cpu() for part in batch] for batch in loader]
    loader.set_epoch(0)
    with torch.cuda.stream(torch.cuda.Stream()):
        found = [[part.cpu() for part in batch] for batch in loader]
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("field", ["host_rows", "contrast_rows", "second_images"])
def test_no_batch_waits_for_the_device(beton, field):
    fields = ("images", "labels", "rows", field)
    loader = _loader(beton, backend="cpu", fields=fields, num_negatives=8)
    loader.warm_up()
    batches = iter(loader)
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert sum(1 for _ in batches) > 0
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_in_a_cuda_graph_takes_the_loaders_batches(beton):
    """Shapes are the same in every batch, so that torch.compile may replay one graph."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(3)
    ).cuda()
    compiled = torch.compile(network, mode="reduce-overhead")
    for _ in range(3):
        for images, labels, _ in _loader(beton, backend="cpu"):
            torch.compiler.cudagraph_mark_step_begin()
            loss = torch.nn.functional.cross_entropy(compiled(images), labels)
            with torch.no_grad():
                expected = torch.nn.functional.cross_entropy(network(images), labels)
            torch.testing.assert_close(loss.detach(), expected, rtol=1e-3, atol=1e-3)
