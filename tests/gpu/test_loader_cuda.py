"""The loader on a GPU: nvJPEG decodes, and the promise is the same."""

import numpy as np
import pytest
import torch

from fastprune.beton.writer import convert
from fastprune.loading.loader import Loader
from tests.conftest import require_library
from tests.images import write_image_folder

require_library("dali")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    """Thirty pictures of three classes."""
    folder = tmp_path_factory.mktemp("cuda")
    convert(write_image_folder(folder / "images", per_class=10), folder / "a.beton", workers=1)
    return folder / "a.beton"


def _loader(path, **settings):
    defaults = {"batch_size": 8, "image_size": 32, "augment": "rrc", "layout": "xyi"}
    return Loader(path, **{**defaults, **settings})


def test_auto_decodes_on_the_gpu_into_normalized_channels_last_batches(beton):
    images, labels, rows = next(iter(_loader(beton)))
    assert images.is_cuda and labels.is_cuda and rows.is_cuda
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("settings", [{}, {"order": "pages"}, {"subset": np.arange(0, 30, 2)}])
def test_rows_are_those_of_the_cpu_and_pixels_nearly_so(beton, settings):
    def epoch(device, backend):
        batches = _loader(beton, device=device, backend=backend, tail="exact", raw=True, **settings)
        images, _, rows = zip(*batches, strict=True)
        return torch.cat(images).cpu().int(), torch.cat(rows).tolist()

    gpu, cpu = epoch("cuda", "dali"), epoch("cpu", "dali")
    assert gpu[1] == cpu[1]
    assert (gpu[0] - cpu[0]).abs().float().mean(dim=(1, 2, 3)).max() < 3


@pytest.mark.parametrize("backend", ["dali", "cpu"])
def test_batches_after_a_resume_are_those_of_the_uninterrupted_run(beton, backend):
    uninterrupted = _loader(beton, batch_size=2, backend=backend)
    batches = iter(uninterrupted)
    for _ in range(7):
        next(batches)
    resumed = _loader(beton, batch_size=2, backend=backend)
    resumed.load_state_dict(uninterrupted.state_dict())
    for one, other in zip(list(batches), resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
