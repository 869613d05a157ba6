"""Options and early errors, as a shell sees them."""

import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from fastprune import settings as recipe
from fastprune.cli import main, options
from fastprune.networks import names
from fastprune.networks.catalog import SMALL_NETWORKS
from fastprune.settings import ConvertSettings, ScoreSettings, SelectSettings


def fastprune(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_options_have_the_bounds_choices_defaults_and_help_of_the_records():
    text = " ".join(fastprune("convert", "--help").stdout.split())
    assert (
        "--quality INTEGER from 1 to 100 JPEG quality of transcoded images. [default: 95]" in text
    )
    assert "--exif [ignore|apply] EXIF orientation: " in text
    text = " ".join(fastprune("score", "--help").stdout.split())
    assert "--teacher-weights TEXT The teacher's published weights" in text
    assert "--mean NUMBER,NUMBER,NUMBER" in text


def test_every_setting_of_a_station_has_an_option():
    commands = {
        "convert": (ConvertSettings, set()),
        "score": (ScoreSettings, {"resume"}),  # --restart
        "select": (SelectSettings, {"per_class"}),  # --global
    }
    for name, (record, without) in commands.items():
        names = {parameter.name for parameter in main.commands[name].params}
        assert set(record.model_fields) - without <= names, name


def test_names_of_networks_are_known_without_importing_them():
    from torchvision import models

    assert tuple(SMALL_NETWORKS) == names.SMALL_NAMES
    assert set(models.list_models(module=models)) == set(names.torchvision_names())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "no_such.toml"], "no_such.toml does not exist"),
        (["train", "smoke", "--set", "data.foo=1"], "data.foo is unknown"),
        (["train", "smoke", "--set", "student.network=resnet8x5"], "Did you mean 'resnet8x4'?"),
        (["score", "no.beton", "-o", "s.parquet", "--teacher", "resnet51"], "'resnet51' is not"),
        (["score", "no.beton", "-o", "s.parquet", "--teacher", "resnet50"], "no.beton"),
        (["evaluate", "no.safetensors", "no.beton"], "no.safetensors does not exist"),
    ],
)
def test_wrong_arguments_are_refused_before_torch_is_imported(arguments, message, tmp_path):
    code = (
        "import sys\nfrom fastprune.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    code = end.code\n"
        "sys.exit(code if 'torch' not in sys.modules else 99)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode in (1, 2), done.stderr
    assert message in done.stderr


def test_a_share_of_fifty_is_refused_with_what_was_meant():
    result = fastprune("select", "scores.parquet", "-o", "half.npy", "--keep", 50)
    assert result.exit_code == 2
    assert "'--keep': it must be a number in (0, 1], not 50.0. 50% is 0.5." in result.stderr


def test_closed_choices_are_offered():
    result = fastprune("select", "s.parquet", "-o", "s.npy", "--keep", 0.5, "--strategy", "mediun")
    assert result.exit_code == 2
    assert "'medium', 'window', 'easy'" in result.stderr


def test_long_names_of_precisions_are_still_understood():
    precision = options.Setting(ScoreSettings.model_fields["precision"])
    assert precision.convert("bfloat16", None, None) == "bf16"


def test_error_about_an_argument_names_its_flag(monkeypatch):
    from fastprune.base.errors import InvalidValueError

    @click.command()
    @click.option("--workers", "num_workers")
    def fail(num_workers):
        raise InvalidValueError("num_workers must be an integer >= 1, not 0.")

    monkeypatch.setitem(main.commands, "fail", fail)
    result = fastprune("fail")
    assert result.stderr == "InvalidValueError: --workers must be an integer >= 1, not 0.\n"


def test_evaluate_of_a_run_folder_offers_its_student(tmp_path):
    (tmp_path / "student.safetensors").write_bytes(b"")
    result = fastprune("evaluate", tmp_path, "val.beton")
    assert result.exit_code == 2
    assert f"is a folder. Its student: {tmp_path / 'student.safetensors'}" in result.stderr


def test_a_reader_that_has_seen_enough_ends_the_command_quietly():
    done = subprocess.run(
        f"{sys.executable} -m fastprune recipes show smoke | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "#"
    assert done.stderr == ""


def test_a_closed_pipe_is_no_message():
    script = (
        "import os, sys\nfrom fastprune.cli import main\n"
        "read, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\nmain(['recipes'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == ""


def test_recipes_are_listed_shown_and_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = json.loads(fastprune("recipes", "--json").stdout)
    assert listed["small_images"].startswith("resnet20 teaches resnet8 on small images")
    shown = fastprune("recipes", "show", "smoke").stdout
    assert 'out = "smoke"' in shown
    (tmp_path / "mine.toml").write_text(shown)
    assert recipe.load_recipe("mine.toml") == recipe.load_recipe("smoke")


def test_misspelled_recipe_is_refused_with_the_nearest_one():
    with pytest.raises(recipe.reading.RecipeError, match="Did you mean 'small_images'"):
        recipe.load_recipe("smal_images")


def test_recipes_and_choices_are_completed():
    done = subprocess.run(
        [sys.executable, "-c", "from fastprune.cli import main; main(prog_name='fastprune')"],
        env={
            "_FASTPRUNE_COMPLETE": "bash_complete",
            "COMP_WORDS": "fastprune train small",
            "COMP_CWORD": "2",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert "plain,small_images\n" in done.stdout
