"""The study's arithmetic and its resuming; that it runs at all is a test of `make test-full`."""

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from fastprune.base.environment import describe_machine
from fastprune.report.runs import read_runs
from tests.images import write_image_folder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def wallclock(monkeypatch, tmp_path):
    """The script as a module, which writes its result to the test's folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("wallclock")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(sys.modules["_harness"], "RESULTS", tmp_path)
    return module


def run(name, seed, **numbers):
    defaults = {"steps": 100, "top1_last": 0.5, "needs_scores": False, "disturbed": False}
    defaults |= {"total_seconds": 20.0, "teacher_forwards": 6400, "teacher_forwards_saved": 0}
    return {"name": name, "seed": seed, **defaults, **numbers}


def in_turn(**step_seconds):
    cells = {
        name.replace("_", " "): {"step_seconds_p50": seconds, "startup_seconds": 1.0}
        for name, seconds in step_seconds.items()
    }
    return {"runs": cells, "score_seconds": 2.0}


def test_cost_counts_steps_at_their_median_in_turn_scoring_and_start_up(wallclock):
    runs = [run("full", 0), run("half", 0, steps=50, needs_scores=True)]
    cells = wallclock.summarize(runs, in_turn(full=0.1, half=0.12))["cells"]
    assert cells["half"]["cost_ratio"]["mean"] == pytest.approx((50 * 0.12 + 2 + 1) / (10 + 1))
    assert cells["full"]["cost_ratio"]["mean"] == 1


def test_cached_cell_pays_the_teacher_for_what_it_asked_and_a_later_student_nothing(wallclock):
    name = "full+cache"
    turns = in_turn(full=0.1)
    turns["runs"][name] = {"step_seconds_p50": 0.12, "startup_seconds": 1.0}
    turns["runs"][f"{name}: cached"] = {"step_seconds_p50": 0.06, "startup_seconds": 1.0}
    runs = [run("full", 0), run(name, 0, teacher_forwards=1600, teacher_forwards_saved=4800)]
    cell = wallclock.summarize(runs, turns)["cells"][name]
    assert cell["cost_ratio"]["mean"] == pytest.approx((25 * 0.12 + 75 * 0.06 + 1) / 11)
    assert cell["later_cost_ratio"]["mean"] == pytest.approx((100 * 0.06 + 1) / 11)


def test_costs_are_empty_until_steps_were_measured_in_turn(wallclock):
    runs = [run("full", 0, total_seconds=10.0), run("random50", 0, total_seconds=5.0)]
    cell = wallclock.summarize(runs, None)["cells"]["random50"]
    assert cell["cost_ratio"] == {"mean": None, "sd": None, "n": 0}
    assert cell["total_over_full"]["mean"] == 0.5
    assert [known["cost_ratio"] for known in wallclock.with_costs(runs, None)] == [None, None]


def test_seed_that_lacks_a_cell_of_the_study_is_not_counted(wallclock):
    runs = [run("full", 0), run("random50", 0), run("full", 1), run("hard50-loss", 0)]
    summary = wallclock.summarize(runs, None)
    assert summary["seeds"] == [0]
    assert {cell["top1_last"]["n"] for cell in summary["cells"].values()} == {1}
    runs.append(run("random50", 1))
    summary = wallclock.summarize(runs, None)
    assert summary["seeds"] == [0, 1]
    # A further cell may have fewer.
    assert summary["cells"]["hard50-loss"]["top1_last"]["n"] == 1


def test_every_contrast_is_of_cells_that_there_are(wallclock):
    assert {cell for pair in wallclock.CONTRASTS for cell in pair} <= set(wallclock.VARIANTS)
    assert {*wallclock.CELLS, *wallclock.FURTHER_CELLS} <= set(wallclock.VARIANTS)
    assert set(wallclock.MARGINS) <= {f"{cell} - {other}" for cell, other in wallclock.CONTRASTS}


def test_unknown_variant_is_refused_with_the_known_ones(wallclock):
    with pytest.raises(argparse.ArgumentTypeError, match=r"'medium51' is not known\. Known: full,"):
        wallclock.known_variants("full,medium51")


def test_only_variants_that_look_at_the_teacher_pay_for_scores(wallclock):
    paying = {name for name, variant in wallclock.VARIANTS.items() if variant.needs_scores}
    assert set(wallclock.VARIANTS) - paying == {
        *("full", "full@E/2", "full@3E/10", "full+cache", "infobatch", "infobatch@2E/3"),
        *("random30", "random50", "random70"),
    }


def test_prepared_files_of_another_teacher_are_not_taken(wallclock, tmp_path):
    preparation = sys.modules["_study"].Preparation(tmp_path / "work")
    for name in ("one", "other"):
        (tmp_path / name).write_text(name)
    preparation.take_teacher("resnet8", tmp_path / "one")
    preparation.take_teacher("resnet8", tmp_path / "one")
    with pytest.raises(SystemExit, match=r"prepared\.json is of other weights: .* --restart"):
        preparation.take_teacher("resnet8", tmp_path / "other")
    assert preparation.teacher.read_text() == "one"


def test_prepared_files_of_other_images_are_not_taken(wallclock, tmp_path):
    images = tmp_path / "images"
    for split in ("train", "test"):
        write_image_folder(images / split, classes=2, per_class=2, same_size=True)
    preparation = sys.modules["_study"].Preparation(tmp_path / "work")
    preparation.convert(images, None, None)
    preparation.convert(images, None, None)
    next((images / "train").rglob("*.*")).unlink()
    with pytest.raises(SystemExit, match=r"prepared\.json is of other images"):
        preparation.convert(images, None, None)


@pytest.mark.parametrize("key", ["settings", "machine"])
def test_runs_of_other_settings_or_machines_do_not_stand_in_one_table(
    wallclock, monkeypatch, tmp_path, key
):
    monkeypatch.setattr(sys, "argv", ["wallclock.py", "--images", str(tmp_path)])
    arguments = wallclock.parse()
    study = wallclock.Study(arguments, "wallclock-small", tmp_path / "work")
    earlier = {"settings": study._settings(), "machine": describe_machine()}
    earlier |= {"runs": [], "in_turn": None}
    path = tmp_path / "wallclock-small.json"
    path.write_text(json.dumps(earlier))
    wallclock.Study(arguments, "wallclock-small", tmp_path / "work")
    path.write_text(json.dumps(earlier | {key: {"cpu": "another"}}))
    with pytest.raises(SystemExit, match=f"is of other {key}: .*another"):
        wallclock.Study(arguments, "wallclock-small", tmp_path / "work")


@pytest.mark.full
def test_study_runs_goes_on_and_refuses_other_settings(wallclock, monkeypatch, tmp_path, capsys):
    images, work = tmp_path / "images", tmp_path / "work"
    for split in ("train", "test"):
        write_image_folder(images / split, classes=2, per_class=140, same_size=True)
    words = ["wallclock.py", "--images", str(images), "--work", str(work), "--name", "small"]
    words += ["--per-class", "130", "--epochs", "2", "--seeds", "1", "--teacher-epochs", "1"]
    words += ["--teacher", "resnet8", "--steps-in-turn", "8"]
    path = tmp_path / "wallclock-small.json"

    def study(*more):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        wallclock.main()
        return json.loads(path.read_text())

    begun = study("--variants", "full,medium50-loss+reshape+cache", "--only", "runs")
    assert begun["chance"] == 0.5
    assert begun["in_turn"] is None
    runs = {run["name"]: run for run in begun["runs"]}  # their order is drawn
    half = runs["medium50-loss+reshape+cache"]
    assert (half["rows"], half["teacher_forwards"]) == (130, 2 * 128)
    assert (half["keep_ratio"], half["metric"], half["reshaping"]) == (0.5, "loss", True)
    assert runs["full"]["score_seconds"] == 0

    shutil.rmtree(work / "runs" / "full-0")
    whole = ("--variants", "full,medium50-loss+reshape+cache,full+reshape,full@E/2")
    result = study(*whole)
    assert {"machine", "commit", "cells", "contrasts", "teacher", "arithmetic"} <= set(result)
    assert {run["name"] for run in result["runs"]} == set(result["cells"])
    assert all(cell["cost_ratio"]["mean"] > 0 for cell in result["cells"].values())
    assert result["cells"]["full"]["cost_ratio"]["mean"] == 1
    known = {run.name for run in read_runs([work / "runs"])}
    assert known == {"medium50-loss+reshape+cache", "full+reshape", "full@E/2"}
    before = path.read_bytes()
    study(*whole)
    assert path.read_bytes() == before
    monkeypatch.setitem(result["prepared"]["teacher"], "weights", "another")
    path.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match="is of other weights of the teacher: another"):
        study()
    with pytest.raises(SystemExit, match="is of other settings"):
        study("--epochs", "3")
