import dataclasses

import numpy as np
import pytest

from fastprune.base.errors import InvalidValueError
from fastprune.rows.subset import Subset
from fastprune.selection.strategies import select_rows
from fastprune.selection.subsets import difficulty, make_subset, ranks
from tests.selection.tables import score_table


def test_subset_holds_the_selected_rows_and_how_they_were_chosen():
    table = score_table()
    subset = make_subset(table, keep_ratio=0.4, strategy="window", quantile=0.3, command="select x")
    expected = select_rows(
        table.metric("centroid"), table.labels, keep_ratio=0.4, strategy="window", quantile=0.3
    )
    assert np.array_equal(subset.rows, expected)
    assert (subset.metric, subset.strategy, subset.keep_ratio) == ("centroid", "window", 0.4)
    assert subset.parameters == {"quota": "proportional", "per_class": True, "quantile": 0.3}
    assert subset.class_counts == np.bincount(table.labels[expected], minlength=4).tolist()
    assert subset.fingerprint == table.fingerprint
    assert np.array_equal(subset.class_std, table.class_std)
    assert subset.command == "select x"


def test_subset_tells_what_its_scores_cost():
    table = dataclasses.replace(score_table(), seconds=12.5)
    assert make_subset(table, keep_ratio=0.4).score_seconds == 12.5


def test_same_seed_gives_the_same_file(tmp_path):
    for name in ("first.npy", "second.npy"):
        subset = make_subset(score_table(), keep_ratio=0.3, strategy="random", seed=5)
        subset.save(tmp_path / name)
    assert (tmp_path / "first.npy").read_bytes() == (tmp_path / "second.npy").read_bytes()
    assert len(Subset.load(tmp_path / "first.npy").rows) == 60


def test_excluded_rows_are_never_kept_and_the_ratio_is_of_the_others():
    exclude = np.arange(0, 200, 2)
    subset = make_subset(score_table(), keep_ratio=0.5, exclude=exclude)
    assert len(subset.rows) == 50
    assert not set(subset.rows) & set(exclude)
    assert subset.parameters["excluded_rows"] == 100


def test_mdslr_ranks_by_loss_unless_told():
    table = score_table()
    subset = make_subset(table, keep_ratio=0.5, compat="mdslr")
    expected = select_rows(table.metric("loss"), table.labels, keep_ratio=0.5, compat="mdslr")
    assert np.array_equal(subset.rows, expected)
    assert (subset.metric, subset.parameters["compat"]) == ("loss", "mdslr")
    assert make_subset(table, keep_ratio=0.5, compat="mdslr", metric="el2n").metric == "el2n"


def test_moderate_ranks_by_the_distance_from_the_median_of_the_class():
    table = score_table()
    own = {**table.metrics, "centroid_median": table.metric("centroid")[::-1].copy()}
    table = dataclasses.replace(table, metrics=own)
    subset = make_subset(table, keep_ratio=0.5, strategy="moderate")
    assert subset.metric == "centroid_median"
    assert make_subset(score_table(), keep_ratio=0.5, strategy="moderate").metric == "centroid"


def test_class_that_would_be_left_empty_is_refused_unless_allowed():
    table = score_table(class_sizes=(90, 100, 1, 9))
    with pytest.raises(
        InvalidValueError, match=r"no row of 1 classes \(2\)\. Keep more.*--allow-empty-classes"
    ):
        make_subset(table, keep_ratio=0.1)
    subset = make_subset(table, keep_ratio=0.1, allow_empty_classes=True)
    assert subset.class_counts == [9, 10, 0, 1]


def test_class_without_rows_in_the_beton_is_no_empty_class():
    table = score_table(class_sizes=(50, 0, 50, 10))
    assert make_subset(table, keep_ratio=0.5).class_counts == [25, 0, 25, 5]


def test_subset_without_rows_is_refused_even_if_classes_may_be_empty():
    with pytest.raises(InvalidValueError, match=r"ratio of 0\.001 keeps none of 200 rows"):
        make_subset(score_table(), keep_ratio=0.001, allow_empty_classes=True)


def test_excluding_every_row_is_said_so():
    with pytest.raises(InvalidValueError, match=r"all 200 rows are excluded\."):
        make_subset(score_table(), keep_ratio=0.5, exclude=np.arange(200))


def test_excluded_row_beyond_the_table_is_refused():
    with pytest.raises(InvalidValueError, match="exclude holds row 200"):
        make_subset(score_table(), keep_ratio=0.5, exclude=[200])


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("centroyd", r"'centroyd' is not in the score table\. Did you mean 'centroid'\?"),
        ("logit_std", "'logit_std' does not measure difficulty"),
        ("centroid:0.5,los:0.5", "'los' is not in the score table. Did you mean 'loss'"),
        ("centroid:half,loss:0.5", "weight of 'centroid' is 'half'.*positive weights"),
        ("centroid:-1,loss:0.5", "weight of 'centroid' is '-1'"),
        ("centroid:nan,loss:0.5", "weight of 'centroid' is 'nan'"),
        ("centroid:1e308,loss:1e308", "the weights are too large to be summed"),
    ],
)
def test_metric_that_rows_cannot_be_ranked_by_is_refused(metric, message):
    with pytest.raises(InvalidValueError, match=message):
        make_subset(score_table(), keep_ratio=0.5, metric=metric)


def test_blend_is_the_weighted_mean_of_ranks():
    table = score_table()
    blended = difficulty(table, "centroid:3,loss:1")
    expected = 0.75 * ranks(table.metric("centroid")) + 0.25 * ranks(table.metric("loss"))
    np.testing.assert_allclose(blended, expected)
    assert np.array_equal(
        difficulty(table, "centroid,loss"), difficulty(table, "centroid:1,loss:1")
    )


def test_blend_of_one_metric_ranks_as_the_metric():
    table = score_table()
    blended = make_subset(table, keep_ratio=0.3, metric="loss:1")
    assert np.array_equal(blended.rows, make_subset(table, keep_ratio=0.3, metric="loss").rows)


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
def test_row_without_one_of_the_scores_has_no_place_in_a_blend(missing):
    table = score_table()
    table.metrics["loss"][7] = missing
    with pytest.raises(InvalidValueError, match=r"score of row 7 is nan.*--exclude"):
        make_subset(table, keep_ratio=0.5, metric="centroid,loss")
    assert 7 not in make_subset(table, keep_ratio=1, metric="centroid,loss", exclude=[7]).rows


def test_equal_scores_share_the_mean_of_their_ranks():
    scores = np.array([5, 1, 5, 0, 5], np.float32)
    assert ranks(scores).tolist() == [0.75, 0.25, 0.75, 0.0, 0.75]
    assert ranks(np.array([7], np.float32)).tolist() == [0.0]


def test_excluding_rows_does_not_change_the_draw_of_the_others():
    drawn = make_subset(score_table(), keep_ratio=0.5, strategy="random", per_class=False).rows
    left_out = np.setdiff1d(np.arange(200), drawn)[:20]
    again = make_subset(
        score_table(), keep_ratio=100 / 180, strategy="random", per_class=False, exclude=left_out
    )
    assert np.array_equal(again.rows, drawn)


@pytest.mark.parametrize("exclude", [[], np.array([], dtype=np.float64)])
def test_nothing_may_be_excluded(exclude):
    subset = make_subset(score_table(), keep_ratio=0.5, exclude=exclude)
    assert np.array_equal(subset.rows, make_subset(score_table(), keep_ratio=0.5).rows)


def test_rows_are_excluded_in_any_order():
    subset = make_subset(score_table(), keep_ratio=0.5, exclude=[7, 3, 7])
    assert not {3, 7} & set(subset.rows)
