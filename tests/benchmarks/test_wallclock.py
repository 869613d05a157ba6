"""The study's arithmetic and its resuming; that it runs at all is a test of `make test-full`."""

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from fastprune.environment import describe_machine
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
    defaults = {"train_seconds": 10.0, "score_seconds": 0.0, "total_seconds": 20.0, "epochs": 10}
    defaults |= {"top1_last": 0.5, "top1_best": 0.6, "data_wait_share": 0.01}
    return {"name": name, "seed": seed, **defaults, **numbers}


def test_ratios_are_formed_seed_by_seed(wallclock):
    runs = [
        run("full", 0, train_seconds=10.0),
        run("full", 1, train_seconds=20.0),
        run("medium50-centroid", 0, train_seconds=5.0, score_seconds=1.0),
        run("medium50-centroid", 1, train_seconds=10.0, score_seconds=1.0),
    ]
    summary = wallclock.summarize(runs)["medium50-centroid"]
    assert summary["train_over_full"] == {"mean": 0.5, "sd": 0.0, "n": 2}
    assert summary["with_scoring_over_full"]["mean"] == pytest.approx((0.6 + 0.55) / 2)
    # A tenth of the study's seconds an epoch: (1 + 100 * 0.5) / (100 * 1), (1 + 100) / 200.
    assert summary["with_scoring_at_100_epochs"]["mean"] == pytest.approx((0.51 + 0.505) / 2)


def test_cost_ratio_counts_steps_at_their_median_scoring_and_start_up(wallclock):
    runs = [
        run("full", 0, steady_train_seconds=10.0, startup_seconds=1.0),
        run("medium50-loss", 0, steady_train_seconds=5.0, startup_seconds=1.0, score_seconds=2.0),
    ]
    cells = wallclock.summarize(runs)
    assert cells["medium50-loss"]["cost_ratio"]["mean"] == pytest.approx(8 / 11)
    assert cells["full"]["cost_ratio"]["mean"] == 1


def test_every_contrast_is_of_cells_that_there_are(wallclock):
    assert {cell for pair in wallclock.CONTRASTS for cell in pair} <= set(wallclock.VARIANTS)
    assert set(wallclock.CELLS) <= set(wallclock.VARIANTS)


def test_distance_from_random_is_formed_seed_by_seed(wallclock):
    runs = [
        run("random50", 0, top1_last=0.50),
        run("random50", 1, top1_last=0.60),
        run("hard50-centroid", 0, top1_last=0.40),
        run("hard50-centroid", 1, top1_last=0.48),
    ]
    distance = wallclock.summarize(runs)["hard50-centroid"]["top1_last_over_random50"]
    assert distance["mean"] == pytest.approx(-0.11)
    assert distance["sd"] == pytest.approx(0.01 * 2**0.5)


def test_single_seed_has_no_spread_and_a_missing_reference_no_ratio(wallclock):
    summary = wallclock.summarize([run("easy50-centroid", 0)])["easy50-centroid"]
    assert summary["top1_last"] == {"mean": 0.5, "sd": None, "n": 1}
    assert summary["train_over_full"] == {"mean": None, "sd": None, "n": 0}


def test_unknown_variant_is_refused_with_the_known_ones(wallclock):
    with pytest.raises(argparse.ArgumentTypeError, match=r"'medium51' is not known\. Known: full,"):
        wallclock.known_variants("full,medium51")


def test_only_variants_that_look_at_the_teacher_pay_for_scores(wallclock):
    paying = {name for name, variant in wallclock.VARIANTS.items() if variant.needs_scores}
    assert set(wallclock.VARIANTS) - paying == {
        *("full", "full@E/2", "full@3E/10", "infobatch", "infobatch@2E/3"),
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
    earlier = {"settings": study._settings(), "machine": describe_machine(), "runs": []}
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
    words += ["--teacher", "resnet8"]

    def study(*more):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        wallclock.main()
        return json.loads((tmp_path / "wallclock-small.json").read_text())

    result = study("--variants", "full,medium50-centroid+reshape")
    assert {"chance", "machine", "commit", "cells", "contrasts", "teacher", "arithmetic"} <= set(
        result
    )
    assert result["chance"] == 0.5
    runs = {run["name"]: run for run in result["runs"]}  # their order is drawn
    half = runs["medium50-centroid+reshape"]
    assert half["rows"] == 130
    assert (half["keep_ratio"], half["metric"], half["reshaping"]) == (0.5, "centroid", True)
    assert half["total_seconds"] > half["train_seconds"] + half["score_seconds"]
    assert runs["full"]["score_seconds"] == 0

    shutil.rmtree(work / "runs" / "full-0")
    again = study("--variants", "full,random50,infobatch")
    assert again["runs"][:2] == result["runs"]
    assert {run["name"] for run in again["runs"][2:]} == {"random50", "infobatch"}
    assert {run.name for run in read_runs([work / "runs"])} == {
        "medium50-centroid+reshape",
        "random50",
        "infobatch",
    }
    monkeypatch.setitem(result["prepared"]["teacher"], "weights", "another")
    (tmp_path / "wallclock-small.json").write_text(json.dumps(result))
    with pytest.raises(SystemExit, match="is of other weights of the teacher: another"):
        study()
    with pytest.raises(SystemExit, match="is of other settings"):
        study("--epochs", "3")
