import json
import math
import re

import numpy as np
import pytest

from fastprune.base.errors import InvalidValueError
from fastprune.base.provenance import Fingerprint
from fastprune.report import comparison as module
from fastprune.report.comparison import (
    Comparison,
    choose_reference,
    configuration_differences,
    difference,
    group_runs,
    verdict,
    warnings_about,
)
from fastprune.report.runs import read_runs
from fastprune.report.training import mean_and_sd, report_runs
from fastprune.rows.subset import Subset
from tests.report.run_folders import change_result, write_run


@pytest.fixture
def groups(tmp_path):
    """Write runs, each given as (name, seed, train_seconds, further fields); give their groups."""

    def make(*runs):
        for name, seed, seconds, fields in runs:
            write_run(
                tmp_path / f"{name}-{seed}", name=name, seed=seed, train_seconds=seconds, **fields
            )
        return group_runs(read_runs([tmp_path]))

    return make


RANDOM = {"subset": "random.npy"}


def test_seeds_of_one_name_are_one_group_and_unfinished_ones_another(groups):
    made = groups(("a", 0, 1.0, {}), ("a", 1, 1.0, {}), ("a", 2, 1.0, {"finished": False}))
    assert [(group.name, len(group.runs)) for group in made] == [("a", 2), ("a (unfinished)", 1)]
    assert [group.is_finished for group in made] == [True, False]


def test_reference_is_the_group_on_all_rows(groups):
    made = groups(("half", 0, 1.0, RANDOM), ("whole", 0, 1.0, {}))
    assert choose_reference(made, None).name == "whole"


def test_among_several_groups_on_all_rows_the_one_called_full_is_the_reference(groups):
    made = groups(("teacher", 0, 1.0, {}), ("full", 0, 1.0, {}))
    assert choose_reference(made, None).name == "full"
    assert choose_reference([g for g in made if g.name != "full"] * 2, None).name == "teacher"


def test_without_a_clear_reference_there_is_none(groups):
    made = groups(("a", 0, 1.0, {}), ("b", 0, 1.0, {}))
    assert choose_reference(made, None) is None
    assert choose_reference(made, "b").name == "b"


def test_reference_that_is_not_there_is_refused_with_the_names_that_are(groups):
    made = groups(("a", 0, 1.0, {}), ("b", 0, 1.0, {"finished": False}))
    with pytest.raises(InvalidValueError, match=r"'b' is not among the finished runs: a\. Name"):
        choose_reference(made, "b")


def compare(groups, reference="full"):
    """The costs of each group, by its name, rounded."""
    comparison = Comparison.of([run for group in groups for run in group.runs], reference)
    return {
        group.name: [cost and round(cost, 4) for cost in comparison.costs(group)]
        for group in comparison.groups
    }


def test_costs_are_compared_seed_by_seed(groups):
    paid = RANDOM | {"score_seconds": 1.0}
    found = compare(
        groups(
            ("full", 0, 10.0, {}),
            ("full", 1, 20.0, {}),
            ("half", 0, 5.0, paid),
            ("half", 1, 10.0, paid),
            ("half", 7, 999.0, paid),
        )
    )
    assert found["half"] == [round(8 / 12, 4), round(13 / 22, 4)]


def test_cost_of_scores_that_is_not_recorded_is_not_guessed(groups):
    assert compare(groups(("full", 0, 10.0, {}), ("half", 0, 5.0, RANDOM)))["half"] == [None]


def test_cost_does_not_see_a_phase_in_which_the_machine_was_busy(groups):
    busy = RANDOM | {"steady_train_seconds": 5.0, "score_seconds": 1.0}
    found = compare(groups(("full", 0, 10.0, {}), ("half", 0, 14.0, busy)))
    assert found["half"] == [round((5 + 1 + 2) / (10 + 2), 4)]


def test_costs_of_groups_without_a_common_seed_are_over_the_mean(groups):
    one = RANDOM | {"score_seconds": 0.0}
    found = compare(groups(("full", 0, 10.0, {}), ("full", 1, 30.0, {}), ("half", 5, 9.0, one)))
    assert found["half"] == [0.5]


def steps(count, seconds, kind="32 pixels, teacher asked of each"):
    """Fields of a run of so many steps at so many seconds."""
    return {"steps_by_kind": {kind: {"steps": count, "seconds": seconds}}, "score_seconds": 0.0}


def test_run_that_was_disturbed_from_end_to_end_costs_what_its_steps_cost_elsewhere(groups):
    """Equal kinds of steps are pooled: half of the steps cost half, whenever they were taken."""
    found = compare(
        groups(
            ("full", 0, 10.0, steps(100, 0.1) | {"startup_seconds": 0.0}),
            ("half", 0, 99.0, RANDOM | steps(50, 1.9) | {"startup_seconds": 0.0}),
        )
    )
    assert found["half"] == [0.5]


def test_steps_that_do_other_work_keep_their_own_pace(groups):
    cached = steps(100, 0.05, "32 pixels, teacher asked of none") | {"startup_seconds": 0.0}
    other = {"loss": {"feature_weight": 1.0}} | steps(100, 0.4) | {"startup_seconds": 0.0}
    found = compare(
        groups(
            ("full", 0, 10.0, steps(100, 0.1) | {"startup_seconds": 0.0}),
            ("cached", 0, 5.0, cached),
            ("features", 0, 40.0, other),
        )
    )
    assert (found["cached"], found["features"]) == ([0.5], [4.0])


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, 2.0, 3.0], "2.0 ± 1.0"),
        ([1234.56], "1,234.6"),
        ([1.0, None], "–"),
        ([], "–"),
    ],
)
def test_mean_and_spread_in_words(values, text):
    assert mean_and_sd(values, 1) == text


def groups_of(folder, **top1):
    """Groups by name, of runs with these accuracies for the seeds 0, 1, ..."""
    for name, values in top1.items():
        for seed, value in enumerate(values):
            curve = [{"epoch": 2, "train_seconds": 10.0, "top1": value, "val_loss": 1.0}]
            write_run(folder / f"{name}-{seed}", name=name, seed=seed, curve=curve)
    return {group.name: group for group in group_runs(read_runs([folder]))}


def test_quantiles_leave_one_fortieth_of_students_distribution_above_them():
    for degrees in (1, 2, 5, 30):
        n = 200_000
        norm = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi)
        norm /= math.gamma(degrees / 2)
        edge = module._T_QUANTILES[degrees - 1]
        density = [
            norm * (1 + ((i + 0.5) * edge / n) ** 2 / degrees) ** (-(degrees + 1) / 2)
            for i in range(n)
        ]
        assert 0.5 - sum(density) * edge / n == pytest.approx(0.025, abs=2e-5)


def test_difference_is_taken_seed_by_seed(tmp_path):
    groups = groups_of(tmp_path / "runs", full=(0.50, 0.60, 0.70), half=(0.51, 0.62, 0.70))
    found = difference(groups["half"], groups["full"])
    assert found.points == pytest.approx(1.0)
    assert found.half_width == pytest.approx(4.303 * 1.0 / math.sqrt(3))
    assert str(found) == "+1.00 ± 2.48"
    assert not found.is_detected


def test_verdict_says_better_worse_or_that_nothing_was_detected(tmp_path):
    groups = groups_of(
        tmp_path / "runs",
        full=(0.50, 0.60, 0.70),
        better=(0.55, 0.65, 0.75),
        worse=(0.40, 0.50, 0.60),
        same=(0.51, 0.59, 0.70),
    )
    sentences = verdict(list(groups.values()), groups["full"])
    ends = {text.split(" − ")[0]: text.rsplit(": ", 1)[1] for text in sentences}
    assert ends == {
        "better": "better.",
        "worse": "worse.",
        "same": "no difference detected.",
    }


def test_verdict_of_one_seed_claims_nothing(tmp_path):
    groups = groups_of(tmp_path / "runs", full=(0.5,), half=(0.9,))
    (sentence,) = verdict(list(groups.values()), groups["full"])
    assert "on one seed. One seed shows nothing" in sentence


def test_verdict_without_a_baseline_says_how_to_name_one(tmp_path):
    groups = groups_of(tmp_path / "runs", a=(0.5,), b=(0.9,))
    assert verdict(list(groups.values()), None)[0].endswith("by --reference.")


def test_different_speeds_and_disturbed_runs_are_warned_of(tmp_path):
    groups_of(tmp_path / "runs", full=(0.5, 0.5), slow=(0.5, 0.5))
    for seed in (0, 1):
        change_result(tmp_path / "runs" / f"slow-{seed}", train_seconds=20.0, disturbed=True)
    groups = group_runs(read_runs([tmp_path / "runs"]))
    speeds, disturbed = warnings_about(groups)
    assert "images/s: full 19, slow 10" in speeds
    assert "slow-0, slow-1" in disturbed


def test_settings_that_differ_are_found_without_seed_name_and_folder(tmp_path):
    write_run(tmp_path / "full", name="full")
    write_run(tmp_path / "half", name="half", subset="half.npy", loss={"temperature": 2.0})
    groups = group_runs(read_runs([tmp_path]))
    assert configuration_differences(groups) == {
        "data.subset": ["–", "half.npy"],
        "loss.temperature": ["4.0", "2.0"],
    }


def test_seeds_of_one_name_with_other_settings_are_warned_of(tmp_path):
    write_run(tmp_path / "a-0", name="a", seed=0)
    write_run(tmp_path / "a-1", name="a", seed=1, loss={"temperature": 2.0})
    (found,) = warnings_about(group_runs(read_runs([tmp_path])))
    assert "differ by more than their seed: loss.temperature" in found


def test_page_begins_with_the_verdict_and_names_data_teacher_and_date(tmp_path):
    groups_of(tmp_path / "runs", full=(0.5, 0.5), half=(0.6, 0.6))
    write_run(tmp_path / "teacher", top1_last=0.675)
    for folder in (tmp_path / "runs").iterdir():
        recipe = json.loads((folder / "recipe.json").read_text())
        recipe["teacher"]["checkpoint"] = "teacher/student.safetensors"
        recipe["run"]["out"] = f"runs/{folder.name}"
        (folder / "recipe.json").write_text(json.dumps(recipe))
    report_runs([tmp_path / "runs"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.index("half − full: +10.00 points") < page.index("<h2>Accuracy")
    assert "top-1 67.50% in its own run" in page
    assert "train.beton, tested on val.beton, 224 pixels" in page
    assert re.search(r"<th>results of</th><td>\d{4}-\d\d-\d\d", page)
    assert 'name="viewport"' in page


def test_subset_is_found_from_any_working_folder(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "work" / "run", subset="half.npy")
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["run"]["out"] = "run"
    (folder / "recipe.json").write_text(json.dumps(recipe))
    Subset(np.arange(2), Fingerprint(4, "0" * 32), score_seconds=18.9).save(
        tmp_path / "work" / "half.npy"
    )
    for place in (tmp_path / "work", tmp_path):
        monkeypatch.chdir(place)
        (run,) = read_runs([folder])
        assert run.score_seconds == 18.9
