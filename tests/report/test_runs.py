import json

import numpy as np
import pytest

from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.provenance import Fingerprint
from fastprune.report.runs import Point, read_runs
from fastprune.rows.subset import Subset
from tests.report.run_folders import change_result, write_run


@pytest.fixture
def subset(tmp_path):
    """Write a subset of a strategy; give its path."""

    def make(strategy, *, score_seconds=4.0):
        path = tmp_path / f"{strategy}.npy"
        Subset(
            np.arange(50),
            Fingerprint(100, "a" * 32, "b" * 32),
            keep_ratio=0.5,
            metric="centroid",
            strategy=strategy,
            class_std=np.ones(10),
            score_seconds=score_seconds,
        ).save(path)
        return path

    return make


def read_one(folder, **options):
    (run,) = read_runs([folder], **options)
    return run


def test_finished_run_is_read_as_the_trainer_wrote_it(tmp_path):
    run = read_one(write_run(tmp_path / "run", name="full", seed=3))
    assert (run.name, run.seed, run.epochs, run.selection) == ("full", 3, 2, "all rows")
    assert run.curve == (Point(1, 5.0, 0.6), Point(2, 10.0, 0.5))
    assert (run.top1_last, run.top1_best) == (0.5, 0.6)
    assert (run.number("train_seconds"), run.number("wait_seconds")) == (10.0, 0.1)
    assert run.score_seconds == 0.0
    assert run.is_finished
    assert run.keeps_all


def test_unfinished_run_is_read_from_its_metrics(tmp_path):
    run = read_one(write_run(tmp_path / "run", finished=False))
    assert not run.is_finished
    assert [(point.epoch, point.top1) for point in run.curve] == [(1, 0.25)]
    assert run.number("train_seconds") is None
    assert run.paid_seconds() is None


def test_line_that_was_being_written_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "epoch": 2, "sec')
    assert len(read_one(folder).curve) == 1


def test_seconds_of_a_resumed_run_are_added_up(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    lines = [(1, 10.0), (2, 20.0), (3, 7.0)]
    (folder / "metrics.jsonl").write_text(
        "\n".join(json.dumps({"epoch": e, "seconds": s, "top1": 0.1}) for e, s in lines)
    )
    assert [point.seconds for point in read_one(folder).curve] == [10.0, 20.0, 27.0]


def test_run_that_stopped_before_its_first_line_has_no_curve(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    (folder / "metrics.jsonl").unlink()
    assert read_one(folder).top1_last is None


def test_runs_in_a_folder_are_found_by_name_and_each_once(tmp_path):
    for name in ("b", "a", "deep/er/c"):
        write_run(tmp_path / name, name=name)
    names = [run.name for run in read_runs([tmp_path, tmp_path / "a"])]
    assert names == ["a", "b", "deep/er/c"]


def test_nameless_run_is_called_by_its_folder_without_the_seed(tmp_path):
    for folder, seed in (("medium-50-1", 1), ("full_seed2", 2), ("run3", 3)):
        write_run(tmp_path / folder, named=False, seed=seed)
    assert [run.name for run in read_runs([tmp_path])] == ["full", "medium-50", "run3"]


def test_runs_of_one_name_and_seed_are_told_apart_by_their_folders(tmp_path):
    for folder in ("a", "b"):
        write_run(tmp_path / folder, name="same")
    names = [run.name for run in read_runs([tmp_path])]
    assert names == [f"same ({tmp_path / 'a'})", f"same ({tmp_path / 'b'})"]


def test_run_on_a_subset_costs_what_its_scores_cost(tmp_path, subset):
    run = read_one(write_run(tmp_path / "run", subset=subset("medium")))
    assert run.score_seconds == 4.0
    assert run.paid_seconds() == 14.0
    assert run.paid_seconds(total=True) == 18.0
    assert not run.keeps_all


def test_random_rows_cost_no_scores_unless_the_logits_are_reshaped(tmp_path, subset):
    path = subset("random")
    plain = write_run(tmp_path / "plain", subset=path)
    reshaped = write_run(tmp_path / "reshaped", subset=path, loss={"reshaping": "class_std"})
    assert [run.score_seconds for run in read_runs([plain, reshaped])] == [0.0, 4.0]


def test_scores_whose_cost_is_not_recorded_cost_what_is_given(tmp_path, subset):
    folder = write_run(tmp_path / "run", subset=subset("medium", score_seconds=None))
    assert read_one(folder).score_seconds is None
    assert read_one(folder).paid_seconds() is None
    assert read_one(folder, score_seconds=9.0).score_seconds == 9.0


def test_what_a_run_was_trained_on_is_told_in_words(tmp_path, subset):
    kept = {"keep_ratio": 0.5, "metric": "centroid", "strategy": "medium"}
    medium = write_run(tmp_path / "medium", subset=subset("medium"), **kept)
    moved = write_run(tmp_path / "moved", subset="elsewhere.npy", **kept)
    bare = write_run(tmp_path / "bare", subset="elsewhere.npy")
    skipping = write_run(tmp_path / "skipping", pruning={"rule": "infobatch"})
    runs = read_runs([medium, moved, bare, skipping])
    assert [run.selection for run in runs] == [
        "50% medium by centroid",
        "50% medium by centroid",
        "elsewhere.npy",
        "all rows, infobatch",
    ]
    assert [run.keeps_all for run in runs] == [False] * 4


def test_unfinished_run_tells_what_its_subset_is(tmp_path, subset):
    folder = write_run(tmp_path / "run", subset=subset("random"), finished=False)
    assert read_one(folder).selection == "50% random"


def test_result_of_an_older_version_leaves_numbers_out(tmp_path):
    folder = write_run(tmp_path / "run")
    change_result(folder, teacher_seconds=None)
    assert read_one(folder).number("teacher_seconds") is None


def test_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"gone does not exist\. Name the folder of a run"):
        read_runs([tmp_path / "gone"])


def test_folder_without_a_run_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"empty is not a run and holds none.*fastprune train"):
        read_runs([tmp_path / "empty"])


def test_damaged_result_is_named(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "result.json").write_text('{"name"')
    with pytest.raises(ArtifactError, match=r"result\.json cannot be read: .*leave the run out"):
        read_runs([folder])


@pytest.mark.parametrize("content", ["[]", '{"run": {"name": "x"}}'])
def test_recipe_of_another_program_is_named(tmp_path, content):
    folder = write_run(tmp_path / "run")
    (folder / "recipe.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"recipe\.json cannot be read: .*leave the run out"):
        read_runs([folder])


@pytest.mark.parametrize(
    ("name", "section", "key", "value", "fault"),
    [
        ("recipe.json", "student", "network", {"a": 1}, "student.network' is an object"),
        ("recipe.json", "run", "name", 7, "run.name' is 7"),
        (
            *("result.json", "curve", 0, {"epoch": 1, "top1": 0.5, "train_seconds": {}}),
            "curve.0.train_seconds' is an object",
        ),
    ],
)
def test_values_of_another_type_are_named(tmp_path, name, section, key, value, fault):
    folder = write_run(tmp_path / "run")
    content = json.loads((folder / name).read_text())
    content[section][key] = value
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=rf"{fault}, but must be.*leave the run out"):
        read_runs([folder])


def test_negative_seconds_are_refused(tmp_path):
    with pytest.raises(InvalidValueError, match=r"score_seconds \(-1\) must be >= 0"):
        read_runs([tmp_path], score_seconds=-1)
