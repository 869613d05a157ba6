import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from fastprune.rows.score_table import ScoreTable
from tests.difficulty.betons import small_beton, small_teacher
from tests.difficulty.test_score import run

ROOT = Path(__file__).parents[2]


def score_on_two_ranks(beton, out, num_classes, *options):
    """The command under torchrun, on two gloo ranks."""
    arguments = ["score", beton, "-o", out, "--image-size", 32, "--batch-size", 4, "--workers", 1]
    arguments += ["--teacher-factory", "tests.difficulty.betons:teacher_factory"]
    arguments += ["--teacher-classes", num_classes, "--device", "cpu", *options]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launcher, "-m", "fastprune", *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("scored") == 1
    return ScoreTable.load(out)


def assert_close(table, expected):
    """Equal but for rounding, which may depend on where a row lies in its batch."""
    for name, values in expected.metrics.items():
        np.testing.assert_allclose(table.metric(name), values, rtol=1e-6, atol=1e-6, err_msg=name)
    assert np.array_equal(table.predictions, expected.predictions)
    np.testing.assert_allclose(table.class_std, expected.class_std, rtol=1e-6)


def test_two_ranks_score_as_one(tmp_path):
    beton = small_beton(tmp_path, classes=3, per_class=8)
    expected = run(beton, small_teacher(), tmp_path / "one.parquet")
    assert_close(score_on_two_ranks(beton, tmp_path / "two.parquet", 3), expected)


def test_two_ranks_score_as_one_where_the_last_rows_leave_a_rank_without_any(tmp_path):
    beton = small_beton(tmp_path, classes=1, per_class=17)
    teacher = small_teacher(num_classes=2)
    expected = run(beton, teacher, tmp_path / "one.parquet", num_classes=2)
    assert_close(score_on_two_ranks(beton, tmp_path / "two.parquet", 2), expected)


def test_two_ranks_find_the_clusters_of_one(tmp_path):
    beton = small_beton(tmp_path, classes=3, per_class=8)
    expected = run(beton, small_teacher(), tmp_path / "one.parquet", num_classes=3, num_clusters=4)
    table = score_on_two_ranks(beton, tmp_path / "two.parquet", 3, "--unsupervised", 4)
    np.testing.assert_allclose(table.metric("prototype"), expected.metric("prototype"), atol=1e-5)
    assert table.clusters.tolist() == expected.clusters.tolist()
