"""`fastprune bench service` measures with and without a service of its own."""

import json
import subprocess
import sys

import pytest

from fastprune.base.errors import FastpruneError
from fastprune.bench.service import bench_service, share_of_rows


def test_bench_service_prints_a_rate_for_every_case(beton):
    arguments = ["bench", "service", str(beton), "--batch-size", "8", "--image-size", "32"]
    arguments += ["--workers", "1", "--memory", "16MiB", "--rounds", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "fastprune", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rates = json.loads(done.stdout)
    assert [rate["case"] for rate in rates] == ["one", "three equal", "nested 30/50/70%"]
    for rate in rates:
        assert min(rate["local"], rate["service"], rate["speedup"]) > 0
        # Small images have few boxes: some views were seen in an earlier epoch.
        assert 0 < rate["decoded_share"] <= 3


def test_nested_shares_hold_each_other():
    small, large = share_of_rows(1000, 0.3), share_of_rows(1000, 0.7)
    assert set(small) < set(large)
    assert abs(len(small) - 300) < 50


def test_a_service_that_does_not_start_is_named(tmp_path, beton):
    (tmp_path / "bare.beton").write_bytes(beton.read_bytes())
    with pytest.raises(FastpruneError, match="the service did not start"):
        bench_service(tmp_path / "bare.beton", num_workers=1)
