import math

import numpy as np
import pytest

from fastprune.base.checks import did_you_mean, require_at_least, require_channels, require_one_of
from fastprune.base.errors import InvalidValueError


def test_unknown_choice_is_answered_with_all_choices():
    with pytest.raises(InvalidValueError, match=r"tail must be one of None, 'pad', not 'cut'\."):
        require_one_of("tail", "cut", (None, "pad"))


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", True, None, 2**63])
def test_value_that_is_no_integer_in_the_domain_is_refused(value):
    with pytest.raises(InvalidValueError, match="batch_size must be"):
        require_at_least("batch_size", value, 1)


def test_integers_of_numpy_are_integers():
    require_at_least("batch_size", np.int64(1), 1)


@pytest.mark.parametrize(
    "values", [(0.1, 0.2), (0.1, 0.2, math.nan), (math.inf, 0.1, 0.2), ("a", "b", "c"), None, 0.5]
)
def test_channels_that_are_not_three_finite_numbers_are_refused(values):
    with pytest.raises(InvalidValueError, match="mean must be three finite numbers, for red"):
        require_channels("mean", values)


def test_spread_of_zero_is_refused():
    with pytest.raises(InvalidValueError, match="std must be three finite positive numbers"):
        require_channels("std", (0.2, 0.0, 0.2), positive=True)


def test_hint_names_the_nearest_name_and_all_names():
    assert did_you_mean("mediun", ["easy", "medium"]) == (
        " Did you mean 'medium'? There are: easy, medium."
    )


def test_hint_is_empty_where_there_are_no_names():
    assert did_you_mean("anything", []) == ""
