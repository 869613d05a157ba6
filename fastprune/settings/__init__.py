"""Settings: one frozen record per station, with the type, bounds, default and help of each field.

Functions take the fields as keywords (`takes_settings`), recipes have records as their sections,
and the command line makes its options of them.
"""

from fastprune.settings.convert import ConvertSettings, ImageSettings
from fastprune.settings.demo import DemoSettings
from fastprune.settings.domains import Settings
from fastprune.settings.keywords import takes_settings
from fastprune.settings.loader import LoaderSettings, OrderSettings, ViewSettings
from fastprune.settings.reading import find_recipe, load_recipe, make_recipe, packaged_recipes
from fastprune.settings.recipe import (
    DataSettings,
    LossSettings,
    NetworkSettings,
    PruningSettings,
    Recipe,
    RunSettings,
    ScheduleSettings,
    TeacherSettings,
)
from fastprune.settings.score import EvaluateSettings, FillSettings, PassSettings, ScoreSettings
from fastprune.settings.select import SelectSettings, StrategySettings

__all__ = [
    "ConvertSettings",
    "DataSettings",
    "DemoSettings",
    "EvaluateSettings",
    "FillSettings",
    "ImageSettings",
    "LoaderSettings",
    "LossSettings",
    "NetworkSettings",
    "OrderSettings",
    "PassSettings",
    "PruningSettings",
    "Recipe",
    "RunSettings",
    "ScheduleSettings",
    "ScoreSettings",
    "SelectSettings",
    "Settings",
    "StrategySettings",
    "TeacherSettings",
    "ViewSettings",
    "find_recipe",
    "load_recipe",
    "make_recipe",
    "packaged_recipes",
    "takes_settings",
]
