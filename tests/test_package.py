import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import fastprune
from fastprune import base


def test_every_public_name_is_there_and_explains_itself():
    for name in fastprune.__all__:
        value = getattr(fastprune, name)
        assert name.startswith("__") or value.__doc__, name


def test_type_checkers_know_the_home_of_every_lazy_name():
    tree = ast.parse(Path(fastprune.__file__).read_text())
    (checked_only,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in checked_only.body for alias in node.names}
    assert imported == fastprune._HOMES
    assert {*fastprune._HOMES, "__version__"} == set(fastprune.__all__)


def test_public_names_are_found_by_completion():
    assert set(fastprune.__all__) <= set(dir(fastprune))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fastprune.nonsense  # noqa: B018


def test_version_is_the_installed_one():
    assert importlib.metadata.version("fastprune") == fastprune.__version__


def test_the_lowest_floor_imports_neither_torch_nor_numba():
    names = [f"fastprune.base.{path.stem}" for path in Path(base.__path__[0]).glob("[!_]*.py")]
    code = f"import sys, {', '.join(names)}; print({{'torch', 'numba', 'rich'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
