import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune.base.errors import InvalidValueError
from fastprune.selection.strategies import select_rows
from fastprune.settings import StrategySettings
from fastprune.settings.domains import domain_of

STRATEGIES = domain_of(StrategySettings.model_fields["strategy"]).choices

ROUND_AS_THEIR_SOURCE = ("moderate",)


@st.composite
def scored_rows(draw, *, ties=True):
    num_rows = draw(st.integers(1, 120))
    num_classes = draw(st.integers(1, 7))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = generator.integers(0, num_classes, num_rows)
    scores = generator.normal(size=num_rows).astype(np.float32)
    if ties:
        scores = np.round(scores, draw(st.integers(0, 3)))
    return scores, labels


keep_ratios = st.floats(0.01, 1.0) | st.sampled_from([0.3, 0.4, 0.5, 0.7, 1.0])


@settings(deadline=None)
@given(scored_rows(), keep_ratios, st.sampled_from(STRATEGIES), st.integers(-5, 2**70))
def test_rows_are_sorted_unique_in_range_and_as_many_as_asked(rows, keep_ratio, strategy, seed):
    scores, labels = rows
    kept = select_rows(scores, labels, keep_ratio=keep_ratio, strategy=strategy, seed=seed)
    assert kept.dtype == np.int64
    assert (np.diff(kept) > 0).all()
    assert len(kept) == 0 or (kept[0] >= 0 and kept[-1] < len(scores))
    wanted = round(keep_ratio * len(scores))
    slack = 1 if strategy in ROUND_AS_THEIR_SOURCE else 0
    assert abs(len(kept) - wanted) <= slack


@given(scored_rows(), st.sampled_from(STRATEGIES), st.booleans())
def test_keep_ratio_one_keeps_all(rows, strategy, per_class):
    scores, labels = rows
    kept = select_rows(scores, labels, keep_ratio=1.0, strategy=strategy, per_class=per_class)
    assert np.array_equal(kept, np.arange(len(scores)))


@given(scored_rows(), keep_ratios, keep_ratios, st.sampled_from(["easy", "hard", "random"]))
def test_easy_hard_and_random_are_nested_where_the_quota_did_not_fall(rows, one, other, strategy):
    scores, labels = rows
    fewer, more = (
        select_rows(scores, labels, keep_ratio=ratio, strategy=strategy)
        for ratio in sorted((one, other))
    )
    for label in np.unique(labels):
        few, many = fewer[labels[fewer] == label], more[labels[more] == label]
        if len(few) <= len(many):
            assert set(few) <= set(many)


@given(
    scored_rows(ties=False),
    keep_ratios,
    st.sampled_from(["medium", "window", "easy", "hard", "moderate"]),
    st.integers(0, 2**32),
)
def test_permuting_the_rows_permutes_the_result(rows, keep_ratio, strategy, seed):
    scores, labels = rows
    permutation = np.random.default_rng(seed).permutation(len(scores))
    options = {"keep_ratio": keep_ratio, "strategy": strategy, "quantile": 0.3}
    kept = select_rows(scores, labels, **options)
    permuted = select_rows(scores[permutation], labels[permutation], **options)
    assert np.array_equal(np.sort(permutation[permuted]), kept)


@given(scored_rows(), keep_ratios)
def test_window_at_the_median_is_medium(rows, keep_ratio):
    scores, labels = rows
    window = select_rows(scores, labels, keep_ratio=keep_ratio, strategy="window")
    assert np.array_equal(window, select_rows(scores, labels, keep_ratio=keep_ratio))


@given(scored_rows(), keep_ratios)
def test_medium_is_the_rule_written_plainly(rows, keep_ratio):
    scores, labels = rows
    kept = select_rows(scores, labels, keep_ratio=keep_ratio)
    for label in np.unique(labels):
        members = sorted(np.flatnonzero(labels == label), key=lambda row: (scores[row], row))
        count = int((labels[kept] == label).sum())
        start = len(members) // 2 - -(-count // 2)
        start = min(max(start, 0), len(members) - count)
        expected = sorted(members[start : start + count])
        assert kept[labels[kept] == label].tolist() == expected


def test_window_is_kept_inside_the_class():
    scores, labels = np.arange(10.0), np.zeros(10, int)
    low, high = (
        select_rows(scores, labels, keep_ratio=0.4, strategy="window", quantile=quantile)
        for quantile in (0.0, 1.0)
    )
    assert (low.tolist(), high.tolist()) == ([0, 1, 2, 3], [6, 7, 8, 9])


def test_equal_scores_are_ordered_by_row_and_both_zeros_are_equal():
    scores = np.array([0.0, -0.0, 0.0, -0.0])
    assert select_rows(scores, [0] * 4, keep_ratio=0.5, strategy="easy").tolist() == [0, 1]
    assert select_rows(scores, [0] * 4, keep_ratio=0.5, strategy="hard").tolist() == [2, 3]


def test_global_selection_knows_no_classes():
    scores, labels = [0, 1, 2, 3], [0, 0, 1, 1]
    easy = {"keep_ratio": 0.5, "strategy": "easy"}
    assert select_rows(scores, labels, **easy).tolist() == [0, 2]
    assert select_rows(scores, labels, per_class=False, **easy).tolist() == [0, 1]


@given(scored_rows(), keep_ratios)
def test_moderate_rounds_both_ends_as_the_papers_code_does(rows, keep_ratio):
    scores, labels = rows
    ascending = np.lexsort((np.arange(len(scores)), scores))
    low = round(len(scores) * (0.5 - keep_ratio / 2))
    high = round(len(scores) * (0.5 + keep_ratio / 2))
    kept = select_rows(scores, labels, keep_ratio=keep_ratio, strategy="moderate")
    assert kept.tolist() == sorted(ascending[low:high])


def test_random_is_balanced_differs_between_seeds_and_is_the_same_for_ever():
    labels = np.repeat([0, 1], [30, 70])
    draw = {"keep_ratio": 0.1, "strategy": "random"}
    kept = select_rows(np.zeros(100), labels, seed=0, **draw)
    assert np.bincount(labels[kept]).tolist() == [3, 7]
    assert kept.tolist() == [12, 19, 26, 38, 39, 47, 51, 55, 67, 99]
    assert kept.tolist() != select_rows(np.zeros(100), labels, seed=1, **draw).tolist()


def test_random_ignores_the_scores():
    labels, scores = np.zeros(50, int), np.arange(50.0)
    draw = {"keep_ratio": 0.3, "strategy": "random", "seed": 3}
    assert np.array_equal(select_rows(scores, labels, **draw), select_rows(-scores, labels, **draw))


def test_ccs_leaves_the_hardest_out_and_covers_the_range_evenly():
    scores = np.concatenate([np.linspace(0, 0.1, 900), np.linspace(0.1, 1, 100)])
    kept = select_rows(scores, np.zeros(1000, int), keep_ratio=0.1, strategy="ccs")
    random = select_rows(scores, np.zeros(1000, int), keep_ratio=0.1, strategy="random")
    assert scores[kept].max() <= np.sort(scores)[899]
    assert scores[kept].std() > 0.9 * scores[scores <= scores[kept].max()].std()
    none_dropped = select_rows(
        scores, np.zeros(1000, int), keep_ratio=0.1, strategy="ccs", drop_hardest=0.0
    )
    counts = np.histogram(scores[none_dropped], bins=50, range=(0, 1))[0]
    assert counts.max() <= 3
    assert np.histogram(scores[random], bins=50, range=(0, 1))[0].max() > 10


def test_ccs_gives_up_dropping_where_the_keep_ratio_needs_the_rows():
    scores = np.arange(10.0)
    options = {"strategy": "ccs", "drop_hardest": 0.5}
    assert len(select_rows(scores, [0] * 10, keep_ratio=0.8, **options)) == 8


def test_no_rows_keep_no_rows():
    for strategy in STRATEGIES:
        assert len(select_rows([], [], keep_ratio=0.5, strategy=strategy)) == 0


@pytest.mark.parametrize("keep_ratio", [0, -0.1, 1.01, float("nan")])
@pytest.mark.parametrize("options", [{}, {"strategy": "moderate"}, {"compat": "mdslr"}])
def test_keep_ratio_outside_its_domain_is_refused(keep_ratio, options):
    with pytest.raises(
        InvalidValueError, match=rf"keep_ratio must be .* in \(0, 1], not {keep_ratio}\."
    ):
        select_rows([0.0], [0], keep_ratio=keep_ratio, **options)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_score_that_is_not_finite_is_refused_with_the_first_row(value):
    scores = np.zeros(10, np.float32)
    scores[[7, 3]] = value
    with pytest.raises(InvalidValueError, match=f"row 3 is {value}; scores must be finite.*Score"):
        select_rows(scores, np.zeros(10, int), keep_ratio=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "mediun"}, "strategy must be one of .* not 'mediun'. Did you mean 'medium'"),
        ({"quota": "proportion"}, "quota .* not 'proportion'. Did you mean 'proportional'"),
        ({"compat": "mdsl"}, "compat must be 'mdslr', not 'mdsl'"),
        ({"strategy": "window", "quantile": 1.5}, r"quantile must be a number in \[0, 1], not 1.5"),
        ({"strategy": "ccs", "drop_hardest": 1.0}, r"drop_hardest must be .* in \[0, 1\), not 1.0"),
        (
            {"strategy": "ccs", "quota": "equal"},
            "'ccs' does not use them. Leave the quota out",
        ),
        ({"quota": "equal", "per_class": False}, "'medium' was told to ignore them"),
        ({"compat": "mdslr", "strategy": "easy"}, "rule of strategy 'medium'.*'easy'.*Leave"),
        ({"compat": "mdslr", "per_class": False}, "per_class False were asked for"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(InvalidValueError, match=message):
        select_rows([0.0, 1.0], [0, 0], keep_ratio=0.5, **options)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.0, 1.0], [0], r"same length.*\(2,\) and \(1,\)"),
        ([[0.0]], [[0]], "must be one-dimensional"),
        ([0.0], [0.5], "labels integers, but they are float64 and float64"),
        (["a"], [0], "scores must be numbers"),
        ([0.0, 1.0], [0, -3], "the label of row 1 is -3; it must be >= 0"),
    ],
)
def test_scores_and_labels_that_do_not_fit_are_refused(scores, labels, message):
    with pytest.raises(InvalidValueError, match=message):
        select_rows(scores, labels, keep_ratio=0.5)
