"""The example that shows the whole method."""

import runpy
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastprune.rows.score_table import ScoreTable

EXAMPLE = Path(__file__).parents[2] / "examples" / "distill_plain.py"


def write_noise_of_three_colors(folder: Path, per_class: int) -> Path:
    """Classes that a small network tells apart within a few steps."""
    generator = np.random.default_rng(per_class)
    for label, color in enumerate(("red", "green", "blue")):
        (folder / color).mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.normal(100, 30, (40, 40, 3))
            pixels[..., label] += 60
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            image.save(folder / color / f"{number}.jpg")
    return folder


def test_example_goes_the_whole_way_and_its_student_learns(tmp_path, capsys):
    train = write_noise_of_three_colors(tmp_path / "train", 64)
    val = write_noise_of_three_colors(tmp_path / "val", 10)
    torch.manual_seed(0)
    example = runpy.run_path(str(EXAMPLE))
    options = ["--out", str(tmp_path / "out"), "--epochs", "20", "--teacher-epochs", "8"]
    top1 = example["main"](example["parse"]([str(train), str(val), *options]))
    assert top1 > 0.6
    assert "kept 96 of 192 rows" in capsys.readouterr().out
    assert ScoreTable.load(tmp_path / "out" / "scores.parquet").class_std.shape == (3,)


def test_example_is_short_enough_to_be_read_at_once():
    lines = EXAMPLE.read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 130
