"""The recipes that are shipped: all name what there is, and those of small images run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision import models

from fastprune.distillation.trainer import distill
from fastprune.networks import build_network, save_weights
from fastprune.settings import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
SMALL = [path for path in RECIPES if not path.name.startswith("imagenet_")]


def of_recipes(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


@of_recipes(RECIPES)
def test_networks_of_a_recipe_are_there_and_so_are_their_published_weights(path):
    recipe = load_recipe(path)
    for settings in filter(None, (recipe.teacher, recipe.student)):
        with torch.device("meta"):
            build_network(settings.network, num_classes=1000)
        if settings.weights is not None:
            assert settings.weights in models.get_model_weights(settings.network).__members__


@of_recipes(RECIPES)
def test_recipe_opens_with_the_commands_before_it_and_its_own(path):
    header = re.match(r"(#.*\n)+", path.read_text())[0]
    assert f"recipes/{path.name}" in header
    for name in re.findall(r"(\w+)\.toml", header):
        assert (path.parent / f"{name}.toml").exists()


@of_recipes(SMALL)
def test_recipe_of_small_images_runs(path, betons, half, tmp_path):
    recipe = load_recipe(path)
    overrides = [
        f"data.train={betons / 'train.beton'}",
        f"data.val={betons / 'val.beton'}",
        "data.image_size=32",
        "data.batch_size=20",
        "schedule.epochs=1",
        "schedule.milestones=[]",
        f"run.out={tmp_path / 'run'}",
        "run.device=cpu",
    ]
    if recipe.data.subset is not None:
        overrides.append(f"data.subset={half}")
    if recipe.teacher is not None:
        checkpoint = tmp_path / "teacher.safetensors"
        save_weights(build_network(recipe.teacher.network, num_classes=10), checkpoint)
        overrides.append(f"teacher.checkpoint={checkpoint}")
    assert distill(load_recipe(path, overrides)).steps == (2 if recipe.data.subset else 4)


@pytest.mark.full
def test_commands_of_the_smoke_recipe_run_as_printed(tmp_path):
    (tmp_path / "recipes").symlink_to(RECIPES[0].parent)
    header = (RECIPES[0].parent / "smoke.toml").read_text()
    commands = "\n".join(re.findall(r"^#   (.*)$", header, re.MULTILINE))
    folder = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", commands], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "smoke" / "result.json").exists()
