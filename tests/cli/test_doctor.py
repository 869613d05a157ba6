import json

import pytest
from click.testing import CliRunner

from fastprune.cli import main
from fastprune.doctor import Finding


@pytest.fixture
def findings(monkeypatch):
    """What the doctor finds, to be filled by the test."""
    found = []
    monkeypatch.setattr("fastprune.doctor.diagnose", lambda betons: found)
    return found


def test_findings_and_advice_are_printed_and_a_fit_machine_exits_with_zero(findings):
    findings += [Finding("CPUs", "note", "2 usable", "Set OMP_NUM_THREADS=2.")]
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    assert result.output == (
        "note  CPUs: 2 usable\n      -> Set OMP_NUM_THREADS=2.\nthis machine is fit\n"
    )


def test_something_bad_exits_with_one(findings):
    findings += [Finding("engines", "bad", "no engine decodes", "Repair one.")]
    assert CliRunner().invoke(main, ["doctor"]).exit_code == 1


def test_json_says_what_works(findings):
    findings += [Finding("engine cpu, cpu", "good", "decoded"), Finding("CPUs", "good", "2")]
    shown = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert shown["healthy"] is True
    assert shown["works"] == {"cpu": True, "dali": False, "ffcv": False, "cuda": False}
    assert shown["findings"][0]["topic"] == "engine cpu, cpu"


def test_what_is_required_must_work(findings):
    findings += [Finding("torch and CUDA", "note", "no device", "docker run --gpus all")]
    result = CliRunner().invoke(main, ["doctor", "--require", "cuda"])
    assert result.exit_code == 1
    assert "BAD   cuda is required and does not work here" in result.output


def test_the_real_doctor_answers():
    result = CliRunner().invoke(main, ["doctor", "--json"])
    topics = [finding["topic"] for finding in json.loads(result.stdout)["findings"]]
    assert topics[0] == "packages"
    assert topics[-1] == "caches"
