import numpy as np
import pytest
from PIL import Image

from fastprune.base.errors import ArtifactError
from fastprune.demo.summary import KeptPicture, RunPicture, Sample, draw_comparison


@pytest.fixture
def picture():
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    runs = [
        RunPicture("full", 1.0, 0.6, 0.0, 2.0, 0.5),
        RunPicture("medium", 0.6, 0.5, 0.3, 1.0, 0.5),
    ]
    scores = generator.random(100, dtype=np.float32)
    kept = KeptPicture(
        "centroid", scores, np.arange(50), {"easy": [Sample(pixels, "$^cat$", 0.1)] * 3}
    )
    return runs, kept


def test_comparison_is_a_png_with_the_colours_of_both_runs(tmp_path, picture):
    draw_comparison(tmp_path / "report.png", *picture)
    with Image.open(tmp_path / "report.png") as image:
        assert image.format == "PNG"
        colors = {tuple(color) for color in np.asarray(image.convert("RGB")).reshape(-1, 3)}
    assert {(0x4C, 0x72, 0xB0), (0xDD, 0x84, 0x52)} <= colors


def test_comparison_names_a_folder_that_does_not_exist(tmp_path, picture):
    with pytest.raises(ArtifactError, match=r"the folder .*nowhere does not exist"):
        draw_comparison(tmp_path / "nowhere" / "report.png", *picture)
