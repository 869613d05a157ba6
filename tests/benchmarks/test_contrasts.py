"""Contrasts of the study."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def contrasts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_contrasts")


def runs(name, *percent):
    return [
        {"name": name, "seed": seed, "top1_last": value / 100} for seed, value in enumerate(percent)
    ]


@pytest.mark.parametrize(("degrees", "value"), [(1, 12.706), (2, 4.303), (6, 2.447), (30, 2.042)])
def test_quantiles_are_those_of_the_tables(contrasts, degrees, value):
    assert contrasts.quantile(0.975, degrees) == pytest.approx(value, abs=6e-4)


def test_differences_are_paired_by_seed(contrasts):
    # Seeds differ by ten points, the cells by one in each.
    all_runs = [*runs("ours", 51.0, 61.1, 71.0, 80.9), *runs("theirs", 50, 60, 70, 80)]
    (found,) = contrasts.compare(all_runs, [("ours", "theirs")])
    assert found["name"] == "ours - theirs"
    assert found["mean"] == pytest.approx(1.0)
    assert 0.8 < found["low"] < 1.0 < found["high"] < 1.2
    assert found["n"] == 4
    assert found["decided"]
    assert "better, +1.0 points" in found["sentence"]


def test_holms_correction_leaves_undecided_what_five_percent_alone_would_decide(contrasts):
    flat = runs("base", *[50.0] * 4)
    # Its own p is between 2.5% and 5%.
    weak = runs("weak", 51.0, 50.2, 50.9, 50.4)
    alone = contrasts.compare([*flat, *weak], [("weak", "base")])
    assert 0.025 < alone[0]["p"] < 0.05
    assert alone[0]["decided"]
    same = runs("same", 50.1, 49.9, 50.1, 49.9)
    both = contrasts.compare([*flat, *weak, *same], [("weak", "base"), ("same", "base")])
    assert [found["decided"] for found in both] == [False, False]
    assert "no difference detected" in both[0]["sentence"]


def test_pair_that_shares_a_single_seed_is_left_out(contrasts):
    assert contrasts.compare([*runs("a", 50), *runs("b", 60)], [("a", "b")]) == []


@pytest.mark.parametrize(
    ("ours", "is_equivalent", "words"),
    [
        ((50.1, 60.0, 69.9), True, "equivalence within 0.5 points shown"),
        ((51.0, 60.0, 69.0), False, "equivalence within 0.5 points not shown"),
    ],
)
def test_equivalence_needs_the_whole_interval_within_the_margin(
    contrasts, ours, is_equivalent, words
):
    all_runs = [*runs("ours", *ours), *runs("theirs", 50, 60, 70)]
    margins = {"ours - theirs": 0.5}
    (found,) = contrasts.compare(all_runs, [("ours", "theirs")], margins=margins)
    assert found["equivalent"] is is_equivalent
    assert not found["decided"]
    assert words in found["sentence"]
