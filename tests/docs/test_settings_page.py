import importlib.util
import re
from pathlib import Path

import pytest

from fastprune.settings import Recipe
from fastprune.settings.keywords import section_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools" / "settings_page.py"
    spec = importlib.util.spec_from_file_location("settings_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_records(tool):
    for page in tool.PAGES:
        text = page.read_text()
        assert tool.filled(text) == text, "run: python tools/settings_page.py"


def test_page_has_every_section_of_a_recipe():
    page = (ROOT / "docs" / "training.md").read_text()
    for name, field in Recipe.model_fields.items():
        heading = rf"^### [^\n]*`\[{name}\]`$(?:(?!^###).)*"
        (section,) = (found[0] for found in re.finditer(heading, page, re.MULTILINE | re.DOTALL))
        assert f"<!-- settings: {section_of(field).__name__} -->" in section
