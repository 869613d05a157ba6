"""Settings as the keywords of functions, over the functions that take them."""

import inspect

import numpy as np
import pytest
from pydantic.fields import FieldInfo

from fastprune import settings
from fastprune.base.errors import InvalidValueError
from fastprune.settings import (
    LoaderSettings,
    Settings,
    StrategySettings,
    takes_settings,
)
from fastprune.settings.domains import domain_of
from fastprune.settings.keywords import validated

RECORDS = [
    kind
    for kind in vars(settings).values()
    if isinstance(kind, type) and issubclass(kind, Settings) and kind.__name__ != "Recipe"
]


@takes_settings(StrategySettings)
def chosen(scores, *, rows=None, settings):
    """Choose rows.

    Args:
        scores: one per row.
        rows: their numbers.
        settings: the fields of `StrategySettings`, as keywords.

    Returns:
        The settings.
    """
    del scores, rows
    return settings


def test_fields_are_keywords_with_their_defaults():
    assert chosen([], keep_ratio=0.5) == StrategySettings(keep_ratio=0.5)
    assert chosen([], rows=[], keep_ratio=0.5, seed=np.int64(3)).seed == 3


def test_signature_and_docstring_show_the_fields():
    parameters = inspect.signature(chosen).parameters
    assert list(parameters) == ["scores", "rows", *StrategySettings.model_fields]
    assert parameters["quantile"].default == 0.5
    assert parameters["keep_ratio"].default is inspect.Parameter.empty
    assert '\n        quantile: center of "window", in [0, 1].\n' in chosen.__doc__
    assert "settings:" not in chosen.__doc__
    assert chosen.__doc__.index("quota:") < chosen.__doc__.index("Returns:")


def test_unknown_keyword_is_refused_with_the_nearest_name():
    with pytest.raises(
        TypeError, match=r"chosen\(\) has no argument 'quotas'\. Did you mean 'quota'"
    ):
        chosen([], keep_ratio=0.5, quotas="equal")


def test_missing_setting_is_named():
    with pytest.raises(InvalidValueError, match="keep_ratio is missing"):
        chosen([])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1, not 0."),
        ({"batch_size": True}, "batch_size must be an integer >= 1, not True."),
        ({"batch_size": "8"}, "batch_size must be an integer >= 1, not '8'."),
        ({"batch_size": None}, "batch_size must be an integer >= 1, not None."),
        ({"batch_size": 2**31}, "batch_size must be below 2**31, not 2147483648."),
        ({"seed": 2**63}, "seed must be below 2**63, not 9223372036854775808."),
        ({"image_size": 9000}, "image_size must be an integer from 1 to 8,192, not 9000."),
        ({"image_size": 1.5}, "image_size must be an integer from 1 to 8,192, not 1.5."),
        ({"num_views": 0}, "num_views must be an integer >= 1, not 0."),
        ({"mean": (0.5, 0.5)}, "mean must be three finite numbers, not (0.5, 0.5)."),
        ({"mean": (0, 0, float("nan"))}, "mean must be three finite numbers, not (0, 0, nan)."),
        ({"std": [1, 0, 1]}, "std must be three float32 numbers > 0, not [1, 0, 1]."),
        (
            {"order": "page"},
            "order must be one of 'random', 'sequential', 'pages', not 'page'. "
            "Did you mean 'pages'?",
        ),
        (
            {"tail": "pads"},
            "tail must be one of 'drop', 'pad', 'exact', not 'pads'. Did you mean 'pad'?",
        ),
    ],
)
def test_value_outside_its_domain_is_named_with_its_bounds(given, message):
    with pytest.raises(InvalidValueError) as error:
        validated(LoaderSettings, given)
    assert str(error.value) == message


def test_a_share_of_fifty_is_refused_with_what_was_meant():
    with pytest.raises(InvalidValueError, match=r"in \(0, 1\], not 50\. 50% is 0\.5\."):
        chosen([], keep_ratio=50)


def test_dtypes_and_devices_of_torch_are_taken_by_name():
    torch = pytest.importorskip("torch")
    made = validated(LoaderSettings, {"dtype": torch.float16, "device": torch.device("cuda:1")})
    assert (made.dtype, made.device) == ("float16", "cuda:1")
    with pytest.raises(InvalidValueError, match=r"dtype must be one of .*, not torch\.int8"):
        validated(LoaderSettings, {"dtype": torch.int8})


def test_names_in_a_list_are_refused_by_their_choices():
    with pytest.raises(InvalidValueError, match=r"a list of names among 'images', .* \('image',\)"):
        validated(LoaderSettings, {"fields": ("image",)})


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_every_field_has_a_line_of_help_and_a_domain(record):
    for name, field in record.model_fields.items():
        assert isinstance(field, FieldInfo)
        assert field.description, name
        assert field.description.endswith("."), name
        assert str(domain_of(field)), name


def test_records_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        LoaderSettings().batch_size = 3
