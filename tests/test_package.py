import importlib.metadata

import pytest

import fastprune


def test_every_public_name_is_there_and_explains_itself():
    for name in fastprune.__all__:
        value = getattr(fastprune, name)
        assert name.startswith("__") or value.__doc__, name


def test_public_names_are_found_by_completion():
    assert set(fastprune.__all__) <= set(dir(fastprune))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fastprune.nonsense  # noqa: B018


def test_version_is_the_installed_one():
    assert importlib.metadata.version("fastprune") == fastprune.__version__
