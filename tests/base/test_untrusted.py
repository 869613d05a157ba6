"""Entries of plain JSON objects are checked for type, or refused in words."""

import numpy as np
import pytest

from fastprune.base.untrusted import member, numbers, parse_json


@pytest.mark.parametrize("record", [[], "text", None, 3])
def test_record_that_is_no_object_is_refused(record):
    with pytest.raises(ValueError, match="must hold an object"):
        member(record, "seed", int)


@pytest.mark.parametrize("value", ["1", True, 1.5, None, [], {}])
def test_entry_of_another_type_is_refused(value):
    with pytest.raises(ValueError, match=r"its 'seed' is .*, but must be an integer"):
        member({"seed": value}, "seed", int)


def test_number_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="its 'seconds' is inf, but must be a number or null"):
        member(parse_json('{"seconds": 1e999}'), "seconds", float, None)


def test_entry_may_be_missing_only_where_null_is_allowed():
    assert member({}, "seed", int, None) is None
    with pytest.raises(ValueError, match="it has no 'seed'"):
        member({}, "seed", int)


def test_null_in_a_list_of_numbers_is_nan():
    assert np.array_equal(numbers({"std": [1, None]}, "std", max_count=2), [1, np.nan], True)


@pytest.mark.parametrize("value", [-1, "1", True, [1], 10**400, float("nan")])
def test_list_with_anything_but_finite_numbers_is_refused(value):
    with pytest.raises(ValueError, match="must hold finite numbers >= 0"):
        numbers({"std": [1.0, value]}, "std", max_count=9)


def test_list_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="has 3 numbers, but at most 2 fit"):
        numbers({"std": [1, 1, 1]}, "std", max_count=2)
