"""Damaged JPEGs under Numba's bounds checking: codes, never a step out of bounds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def fuzz(num_inputs, seed, *, checked):
    """The report of a run; it fails if a single access was out of bounds."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.jpeg.fuzz", str(num_inputs), str(seed)],
        cwd=ROOT,
        env={**os.environ, "NUMBA_BOUNDSCHECK": str(int(checked))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.pop("bounds_checked") == checked
    return report


def test_damaged_files_stay_in_bounds_and_vectors_agree_with_their_twins():
    plain = fuzz(2_000, 1, checked=True)
    assert set(plain["codes"]) >= {"0", "1", "2", "3", "5"}
    assert "4" not in plain["codes"]
    assert fuzz(2_000, 1, checked=False) == plain


@pytest.mark.full
@pytest.mark.timeout(3_600)
def test_a_hundred_thousand_damaged_files_stay_in_bounds():
    report = fuzz(100_000, 2, checked=True)
    assert sum(report["codes"].values()) == 100_000
    assert "4" not in report["codes"]
