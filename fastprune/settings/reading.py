"""From TOML files and the command line to a recipe."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastprune.base.checks import did_you_mean
from fastprune.base.errors import RecipeError
from fastprune.base.files import read_text
from fastprune.base.headers import parse_toml
from fastprune.settings.keywords import faults
from fastprune.settings.recipe import Recipe

# Far beyond the longest recipe that comes with fastprune, which has two kilobytes.
_MAX_BYTES = 1 << 20


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a TOML recipe; its relative paths are relative to the working folder.

    A file that begins with `extends = "other.toml"` takes the settings of that file, which lies
    beside it or comes with fastprune, and replaces or adds the settings that it names.

    Args:
        path: the TOML file, or the name of a recipe that comes with fastprune.
        overrides: settings of the form "section.key=value", the value in TOML's notation or a bare
            word; an empty value removes the key, and "section=" the whole section.

    Returns:
        The validated recipe.

    Raises:
        RecipeError: a file cannot be read, files extend each other in a circle, a key is unknown,
            or a value is outside its domain.
    """
    settings = _read(find_recipe(path))
    for override in overrides:
        _set(settings, override)
    return make_recipe(settings, name=str(path))


def find_recipe(name: str | Path) -> Path:
    """Find a recipe: a file, or one that comes with fastprune, by its name.

    Raises:
        RecipeError: it is neither; the nearest name is in the message.
    """
    path = Path(name)
    if path.exists():
        return path
    packaged = packaged_recipes()
    if str(name) in packaged:
        return packaged[str(name)]
    # The hint is for names; a path is not a misspelled one.
    is_name = path.name == str(name) and not path.suffix
    hint = did_you_mean(str(name), packaged if is_name else (), list_known=False)
    raise RecipeError(
        f"{name} does not exist, and no recipe that comes with fastprune has this name.{hint} List "
        "them with: fastprune recipes"
    )


def packaged_recipes() -> dict[str, Path]:
    """Map the names of the recipes that come with fastprune to their files, in order."""
    package = Path(__file__).parents[1]
    # A wheel has them in the package, a checkout beside it.
    folders = (package / "recipes", package.parent / "recipes")
    return {file.stem: file for folder in folders[::-1] for file in sorted(folder.glob("*.toml"))}


def make_recipe(settings: dict[str, Any], *, name: str = "recipe") -> Recipe:
    """Validate settings that are already in memory.

    Args:
        settings: section -> key -> value.
        name: where they come from, for the message.

    Raises:
        RecipeError: a key is unknown (the nearest known one is named) or a value does not fit.
    """
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        lines = "\n".join(f"  {fault}" for fault in faults(Recipe, settings, error))
        raise RecipeError(f"{name} cannot be used:\n{lines}") from error


def _read(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a file's settings on top of the settings of the file it extends."""
    if path.resolve() in extending:
        raise RecipeError(f"{path} extends itself, possibly through other files. Break the circle.")
    try:
        settings = parse_toml(read_text(path, max_bytes=_MAX_BYTES))
    except FileNotFoundError as error:
        raise RecipeError(f"{path} does not exist.") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} is not a TOML file: {error}.") from error
    base = settings.pop("extends", None)
    if base is None:
        return settings
    if not isinstance(base, str):
        raise RecipeError(f"{path}: extends = {base!r} must be the name of a file beside it.")
    beside = path.parent / base
    # A recipe copied out of the package (`recipes show`) still extends the package's recipes.
    packaged = packaged_recipes().get(Path(base).stem)
    source = beside if beside.exists() or packaged is None else packaged
    extended = _read(source, (*extending, path.resolve()))
    for name, keys in settings.items():
        is_section = isinstance(keys, dict) and isinstance(extended.get(name), dict)
        extended[name] = {**extended[name], **keys} if is_section else keys
    return extended


def _set(settings: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    text = text.strip()
    sections = dotted.strip().split(".")
    if separator and sections[0] in Recipe.model_fields and len(sections) == 1 and not text:
        settings.pop(sections[0], None)
        return
    if not separator or len(sections) != 2 or not all(sections):
        raise RecipeError(f"--set {override!r} is not of the form section.key=value.")
    section = settings.setdefault(sections[0], {})
    if not isinstance(section, dict):
        raise RecipeError(f"--set {override!r}: {sections[0]} is not a section of the recipe.")
    if text:
        section[sections[1]] = _parse(text)
    else:
        section.pop(sections[1], None)


def _parse(text: str) -> Any:
    """Parse a value in TOML's notation; anything else is a bare word."""
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text
