import json

import numpy as np
import pytest
from click.testing import CliRunner

from fastprune.artifacts.subset import Subset
from fastprune.cli import main
from tests.selection.tables import score_table


def fastprune(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


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
