import re
from pathlib import Path

from pydantic import BaseModel

from fastprune.settings import Recipe

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def sections():
    """(name, model) of every section of a recipe."""
    for name, field in Recipe.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        yield name, next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))


def test_page_has_every_key_of_a_recipe_and_no_other():
    for name, model in sections():
        (text,) = re.findall(rf"^### [^\n]*`\[{name}\]`.*?(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
        cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
        keys = {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}
        assert keys == set(model.model_fields), name
