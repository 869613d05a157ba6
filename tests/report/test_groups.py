import pytest

from fastprune.base.errors import InvalidValueError
from fastprune.report.runs import choose_reference, cost_ratios, group_runs, mean_and_sd, read_runs
from tests.report.run_folders import write_run


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


def test_ratios_are_formed_seed_by_seed(groups):
    half, full = groups(
        ("full", 0, 10.0, {}),
        ("full", 1, 20.0, {}),
        ("a_half", 0, 5.0, RANDOM),
        ("a_half", 1, 10.0, RANDOM),
        ("a_half", 7, 999.0, RANDOM),
    )
    assert cost_ratios(half, full, with_scoring=False) == [0.5, 0.5]
    # Nothing tells what the scores of random.npy cost.
    assert cost_ratios(half, full, with_scoring=True) == []


def test_ratio_does_not_see_a_phase_in_which_the_machine_was_busy(groups):
    half, full = groups(
        ("full", 0, 10.0, {}),
        ("a_half", 0, 14.0, RANDOM | {"steady_train_seconds": 5.0, "score_seconds": 1.0}),
    )
    assert cost_ratios(half, full, with_scoring=False) == [0.5]
    assert cost_ratios(half, full, with_scoring=True) == [(5 + 1 + 2) / (10 + 2)]


def test_ratio_of_groups_without_a_common_seed_is_that_of_their_means(groups):
    half, full = groups(("full", 0, 10.0, {}), ("full", 1, 30.0, {}), ("a_half", 5, 5.0, RANDOM))
    assert cost_ratios(half, full, with_scoring=False) == [0.25]


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
