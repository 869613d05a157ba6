"""Recipes: TOML in, validated and frozen settings out; unknown keys are refused."""

from fastprune.recipe.reading import load_recipe, make_recipe
from fastprune.recipe.settings import (
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
    "load_recipe",
    "make_recipe",
]
