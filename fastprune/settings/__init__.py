"""Recipes: TOML in, validated and frozen settings out; unknown keys are refused."""

from fastprune.settings.reading import find_recipe, load_recipe, make_recipe, packaged_recipes
from fastprune.settings.recipe import (
    DataSettings,
    LossSettings,
    NetworkSettings,
    PruningSettings,
    Recipe,
    RunSettings,
    ScheduleSettings,
)

__all__ = [
    "DataSettings",
    "LossSettings",
    "NetworkSettings",
    "PruningSettings",
    "Recipe",
    "RunSettings",
    "ScheduleSettings",
    "find_recipe",
    "load_recipe",
    "make_recipe",
    "packaged_recipes",
]
