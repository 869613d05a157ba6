"""The trial of DALI's decoding on a GPU; the child that runs it is a real process."""

import json
import re
import sys
from dataclasses import asdict

import pytest

from fastprune.decoding.gpu_probe import GpuDecoding, remembered, run_probe

_GOOD = {"whole_on_gpu": True, "regions_on_gpu": True, "levels": 0.3, "nvjpeg": "13.3.2"}


def _child(code):
    return [sys.executable, "-c", code]


def _saying(**found):
    return _child(f"print('a warning'); print({json.dumps(json.dumps(_GOOD | found))})")


def test_a_child_that_is_killed_is_a_decoder_that_crashes():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    assert run_probe(_child(code)) == GpuDecoding(
        "crashes", "decoding regions ended the process with SIGSEGV"
    )


def test_a_child_that_hangs_is_ended():
    found = run_probe(_child("import time; time.sleep(60)"), timeout_seconds=0.5)
    assert found.verdict == "fails"
    assert "hung" in found.reason


def test_an_error_of_the_child_is_repeated():
    found = run_probe(_child("raise RuntimeError('nvImageCodec failure: 8.')"))
    assert found == GpuDecoding(
        "fails", "decoding regions failed: RuntimeError: nvImageCodec failure: 8"
    )


@pytest.mark.parametrize(
    ("found", "verdict", "reason"),
    [
        ({}, "good", "nvJPEG 13.3.2 decodes regions"),
        ({"regions_on_gpu": False, "nvjpeg": "13.0.4"}, "slow", "nvJPEG 13.0.4 decodes regions .*"),
        ({"whole_on_gpu": False}, "fails", "nvJPEG is missing.*"),
        ({"levels": 40.0}, "fails", "pixels are 40.0 levels from Pillow's"),
    ],
)
def test_what_the_child_saw_is_judged(found, verdict, reason):
    answer = run_probe(_saying(**found))
    assert answer.verdict == verdict
    assert re.fullmatch(reason, answer.reason)


@pytest.fixture
def private_folder(tmp_path, monkeypatch):
    """Where compiled code, and what trials found, is kept."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    return tmp_path


def _remembered(facts, command, **settings):
    return remembered(
        "trial",
        facts,
        lambda: asdict(run_probe(command)),
        lasts=lambda found: found["verdict"] != "fails",
        **settings,
    )["verdict"]


def test_a_crash_is_remembered_for_the_same_facts_alone(private_folder):
    crash = _child("import os; os.abort()")
    assert _remembered(["H100", "driver 1"], crash) == "crashes"
    assert _remembered(["H100", "driver 1"], _saying()) == "crashes"
    assert _remembered(["H100", "driver 2"], _saying()) == "good"
    assert _remembered(["H100", "driver 1"], _saying(), again=True) == "good"
    assert _remembered(["H100", "driver 1"], crash) == "good"


def test_a_failure_that_may_pass_is_not_remembered(private_folder):
    assert _remembered(["A100"], _child("raise MemoryError")) == "fails"
    assert _remembered(["A100"], _saying()) == "good"


def test_a_damaged_memory_is_made_anew(private_folder):
    _remembered(["A100"], _saying())
    (kept,) = private_folder.glob("trial-*.json")
    kept.write_text("[1]")
    assert _remembered(["A100"], _saying(regions_on_gpu=False)) == "slow"


def test_the_trial_itself_runs_and_sees_that_a_cpu_has_no_nvjpeg_decoder():
    pytest.importorskip("nvidia.dali")
    command = [sys.executable, "-m", "fastprune.decoding.gpu_probe", "cpu"]
    found = run_probe(command)
    assert found == GpuDecoding("fails", "nvJPEG is missing, or it decodes no JPEG")
