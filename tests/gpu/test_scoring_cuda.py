"""The scoring pass on a GPU: the scores are those of the CPU."""

import numpy as np
import pytest
import torch

from fastprune import score
from tests.difficulty.betons import small_beton, small_teacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    """Twenty-four pictures of three classes."""
    return small_beton(tmp_path_factory.mktemp("cuda"))


def _losses(beton, out, **settings):
    settings = {"image_size": 32, "batch_size": 8, "backend": "cpu", **settings}
    table = score(beton, small_teacher(), out, **settings)
    return table.metric("loss"), table.teacher["dtype"]


def test_float32_scores_on_the_gpu_are_those_of_the_cpu(beton, tmp_path):
    expected, _ = _losses(beton, tmp_path / "cpu.parquet", device="cpu")
    losses, _ = _losses(beton, tmp_path / "cuda.parquet", device="cuda", precision="fp32")
    np.testing.assert_allclose(losses, expected, rtol=0.02, atol=0.02)


def test_bfloat16_is_the_default_on_the_gpu_and_near_float32(beton, tmp_path):
    expected, _ = _losses(beton, tmp_path / "cpu.parquet", device="cpu")
    losses, dtype = _losses(beton, tmp_path / "cuda.parquet", device="cuda")
    assert dtype == "torch.bfloat16"
    np.testing.assert_allclose(losses, expected, atol=0.2)
