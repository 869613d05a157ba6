import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from fastprune.artifacts.scores import ScoreTable
from fastprune.artifacts.subset import Subset
from fastprune.cli import main
from fastprune.networks import save_weights
from tests.difficulty.betons import small_beton, small_teacher
from tests.selection.tables import score_table


def fastprune(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_score_writes_a_table_and_one_line(tmp_path):
    beton, out = small_beton(tmp_path), tmp_path / "scores.parquet"
    save_weights(small_teacher(), tmp_path / "teacher.safetensors", metadata={"network": "resnet8"})
    result = fastprune(
        *("score", beton, "-o", out, "--teacher-checkpoint", tmp_path / "teacher.safetensors"),
        *("--image-size", 32, "--batch-size", 8, "--workers", 1, "--views", 2, "--seed", 3),
        *("--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2", "--precision", "float32"),
        *("--feature-layer", "layer3", "--device", "cpu", "--backend", "ffcv", "--restart"),
        *("--teacher-classes", 3, "--keep-features"),
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"scored 24 rows in \d+\.\d s, teacher's top-1 .*% -> .*", result.stdout)
    table = ScoreTable.load(out)
    assert table.view == {
        "image_size": 32,
        "augment": "train",
        "views": 2,
        "seed": 3,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
    }
    assert (tmp_path / "scores.features.npy").exists()


def test_score_refuses_two_teachers_and_channels_that_are_not_three(tmp_path):
    two = ("--teacher", "resnet18", "--teacher-factory", "a:b")
    result = fastprune("score", "t.beton", "-o", "s.parquet", *two)
    assert result.exit_code == 2
    assert "--teacher or --teacher-factory, not both" in result.output
    result = fastprune("score", "t.beton", "-o", "s.parquet", "--mean", "0.5,0.5")
    assert result.exit_code == 2
    assert "'0.5,0.5' is not red,green,blue" in result.output


@pytest.fixture
def scores(tmp_path):
    score_table().save(tmp_path / "scores.parquet")
    return tmp_path / "scores.parquet"


def test_select_writes_a_subset_and_one_line(scores, tmp_path):
    out = tmp_path / "subset.npy"
    result = fastprune("select", scores, "-o", out, "--keep", 0.5, "--strategy", "hard")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("kept 100 of 200 rows (50.00%) in 0.")
    assert result.output.endswith(f" s -> {out}\n")
    assert len(np.load(out)) == 100
    assert json.loads((tmp_path / "subset.json").read_text())["strategy"] == "hard"


def test_select_takes_every_option(scores, tmp_path):
    np.save(tmp_path / "exclude.npy", np.arange(10))
    options = "--keep 0.3 --metric centroid:1,loss:1 --strategy ccs --drop-hardest 0.2 --seed 4"
    result = fastprune(
        *("select", scores, "-o", tmp_path / "subset.npy", *options.split(), "--global"),
        *("--exclude", tmp_path / "exclude.npy", "--allow-empty-classes"),
    )
    assert result.exit_code == 0, result.output
    subset = Subset.load(tmp_path / "subset.npy")
    assert subset.rows.min() >= 10
    assert subset.parameters == {
        "quota": "proportional",
        "per_class": False,
        "drop_hardest": 0.2,
        "excluded_rows": 10,
    }


def test_select_refuses_a_fault_of_the_data_in_one_message(scores, tmp_path):
    result = fastprune("select", scores, "-o", tmp_path / "subset.npy", "--keep", "1.5")
    assert result.exit_code == 1
    assert "keep_ratio (1.5) must be in (0, 1]" in result.output
    assert not (tmp_path / "subset.npy").exists()


def test_select_needs_no_torch(scores, tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from fastprune.cli import main\n"
        f"main(['select', {str(scores)!r}, '-o', {str(tmp_path / 's.npy')!r}, '--keep', '0.5'],"
        " standalone_mode=False)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numba')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
