import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprune.base.errors import InvalidValueError
from fastprune.selection.quotas import QUOTAS, class_quotas

class_counts = st.lists(st.integers(0, 3000), min_size=0, max_size=60).map(np.array)
keep_ratios = st.floats(0.001, 1) | st.sampled_from([0.1, 0.3, 0.5, 0.7])


@given(class_counts.map(lambda c: c.astype(np.int64)), keep_ratios, st.sampled_from(QUOTAS))
def test_quotas_sum_to_the_rounded_share_and_fit_their_classes(counts, keep_ratio, quota):
    quotas = class_quotas(counts, keep_ratio=keep_ratio, quota=quota)
    assert quotas.sum() == round(keep_ratio * int(counts.sum()))
    assert (quotas >= 0).all()
    assert (quotas <= counts).all()


@given(class_counts.map(lambda c: c.astype(np.int64)), keep_ratios)
def test_proportional_quotas_are_less_than_one_row_off(counts, keep_ratio):
    quotas = class_quotas(counts, keep_ratio=keep_ratio)
    assert (np.abs(quotas - keep_ratio * counts) < 1 + 1e-9).all()


@given(class_counts.map(lambda c: c.astype(np.int64)), keep_ratios)
def test_equal_quotas_differ_by_one_row_except_in_classes_that_are_kept_whole(counts, keep_ratio):
    quotas = class_quotas(counts, keep_ratio=keep_ratio, quota="equal")
    cut = quotas[quotas < counts]
    if len(cut):
        assert cut.max() - cut.min() <= 1
        assert (np.diff(cut) <= 0).all()
        assert quotas.max() <= cut.min() + 1


def test_equal_remainders_go_to_the_lower_class():
    assert class_quotas(np.array([3, 3, 3, 3]), keep_ratio=0.5).tolist() == [2, 2, 1, 1]
    assert class_quotas(np.array([11, 1, 8]), keep_ratio=0.3).tolist() == [3, 0, 3]
    assert class_quotas(np.array([1, 11, 3]), keep_ratio=0.3).tolist() == [0, 3, 1]


def test_remainders_are_those_of_the_decimal_that_was_written():
    # 0.3 * 1 and 0.3 * 11 leave 0.3 each; in binary the first leaves more.
    assert class_quotas(np.array([11, 1, 1]), keep_ratio=0.3).tolist() == [4, 0, 0]


def test_largest_remainders_get_the_rows_that_are_left():
    assert class_quotas(np.array([7, 8, 9]), keep_ratio=0.4).tolist() == [3, 3, 4]


def test_equal_quotas_fill_up_where_classes_have_fewer():
    counts = np.array([2, 10, 30, 30])
    assert class_quotas(counts, keep_ratio=0.5, quota="equal").tolist() == [2, 10, 12, 12]
    assert class_quotas(counts, keep_ratio=0.25, quota="equal").tolist() == [2, 6, 5, 5]


@pytest.mark.parametrize("keep_ratio", [0.0, -1.0, 1.0001, float("nan")])
def test_keep_ratio_outside_its_domain_is_refused(keep_ratio):
    with pytest.raises(InvalidValueError, match=r"must be in \(0, 1]; 0.5 keeps half"):
        class_quotas(np.array([3]), keep_ratio=keep_ratio)
