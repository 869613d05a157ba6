import subprocess
import sys

from fastprune.beton.convert.writer import convert
from tests.conftest import require_library
from tests.images import write_image_folder

require_library("ffcv")


def test_bench_loader_prints_a_rate_for_every_loader(tmp_path):
    convert(write_image_folder(tmp_path / "images"), tmp_path / "a.beton", workers=1)
    # In a process of its own: stock FFCV changes thread counts and leaves threads.
    arguments = ["bench", "loader", str(tmp_path / "a.beton"), "--batch-size", "4"]
    arguments += ["--image-size", "16", "--workers", "1", "--rounds", "1", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "fastprune", *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    )
    for name in ("fastprune, cpu", "stock ffcv", "torchvision", "fastest:"):
        assert name in done.stdout
