import re

import pytest
from click.testing import CliRunner

from fastprune.cli import main


@pytest.fixture
def recipe_file(betons, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""
[data]
train = "{betons}/train.beton"
val = "{betons}/val.beton"
image_size = 32
batch_size = 20
[student]
network = "resnet8"
[schedule]
epochs = 1
[run]
out = "{tmp_path}/run"
device = "cpu"
"""
    )
    return path


def test_train_and_evaluate_print_one_line_each(recipe_file, betons, tmp_path):
    result = CliRunner().invoke(main, ["train", str(recipe_file), "--set", "run.seed=3"])
    assert result.exit_code == 0, result.output
    line = (
        r"trained on 80 rows for 1 epochs in [\d.]+ s \([\d.]+ s in all\): top-1 .*% .* -> (.*)\n"
    )
    student = re.fullmatch(line, result.stdout)
    assert student
    result = CliRunner().invoke(main, ["evaluate", student[1], str(betons / "val.beton")])
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"top-1 .*%, top-5 .*%, loss .* on 30 rows in [\d.]+ s\n", result.stdout)


def test_train_names_a_fault_of_the_recipe_and_exits_with_one(recipe_file):
    result = CliRunner().invoke(main, ["train", str(recipe_file), "--set", "data.tran=x"])
    assert result.exit_code == 1
    assert "data.tran is unknown. Did you mean 'train'?" in result.stderr


def test_train_names_a_beton_that_does_not_exist(recipe_file, tmp_path):
    result = CliRunner().invoke(
        main, ["train", str(recipe_file), "--set", f"data.train={tmp_path}/no.beton"]
    )
    assert result.exit_code == 1
    assert "no.beton" in result.stderr
    assert not (tmp_path / "run").exists()


def test_train_that_is_stopped_exits_with_the_signal_and_goes_on(recipe_file, monkeypatch):
    words = ["train", str(recipe_file), "--fixed-iterations", "--set"]
    words.append("student.network=tests.distillation.networks:signalled")
    monkeypatch.setenv("SMALL_SIGNAL", "SIGTERM:3")
    stopped = CliRunner().invoke(main, words)
    assert stopped.exit_code == 143
    assert stopped.stderr.endswith("step 2. Continue from there with --resume.\n")
    monkeypatch.delenv("SMALL_SIGNAL")
    resumed = CliRunner().invoke(main, [*words, "--resume"])
    assert resumed.exit_code == 0, resumed.output
    assert resumed.stdout.startswith("trained on 80 rows")
