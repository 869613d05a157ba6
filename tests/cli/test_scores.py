import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fastprune.cli import main
from fastprune.networks import save_weights
from fastprune.rows.score_table import ScoreTable
from fastprune.rows.subset import Subset
from tests.difficulty.betons import small_beton, small_teacher
from tests.selection.tables import score_table


def fastprune(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_score_writes_a_table_and_one_line(tmp_path):
    beton, out = small_beton(tmp_path), tmp_path / "scores.parquet"
    save_weights(small_teacher(), tmp_path / "teacher.safetensors", metadata={"network": "resnet8"})
    result = fastprune(
        *("score", beton, "-o", out, "--teacher-checkpoint", tmp_path / "teacher.safetensors"),
        *("--image-size", 32, "--batch-size", 8, "--workers", 1, "--views", 2, "--seed", 3),
        *("--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2", "--precision", "fp32"),
        *("--feature-layer", "layer3", "--device", "cpu", "--backend", "cpu", "--restart"),
        *("--teacher-classes", 3, "--keep-features"),
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"scored 24 rows in \d+\.\d s, teacher's top-1 .*% -> .*", result.stdout)
    table = ScoreTable.load(out)
    assert table.view == {
        "image_size": 32,
        "augment": "train",
        "views": 2,
        "seed": 3,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
    }
    assert (tmp_path / "scores.features.npy").exists()


def test_factory_in_the_working_folder_is_found(tmp_path):
    beton = small_beton(tmp_path)
    (tmp_path / "my_teacher.py").write_text(
        "from torch import nn\n"
        "def make(*, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))\n"
    )
    command = "score train.beton -o s.parquet --teacher-factory my_teacher:make --image-size 32"
    script = Path(sys.executable).with_name("fastprune")
    done = subprocess.run([script, *command.split()], cwd=beton.parent, check=False)
    assert done.returncode == 0
    assert ScoreTable.load(tmp_path / "s.parquet").teacher["network"] == "my_teacher:make"


def test_score_refuses_two_teachers_and_channels_that_are_not_three(tmp_path):
    two = ("--teacher", "resnet18", "--teacher-factory", "a:b")
    result = fastprune("score", "t.beton", "-o", "s.parquet", *two)
    assert result.exit_code == 2
    assert "--teacher or --teacher-factory, not both" in result.output
    result = fastprune("score", "t.beton", "-o", "s.parquet", "--mean", "0.5,0.5")
    assert result.exit_code == 2
    assert "'--mean': it must be three finite numbers, not (0.5, 0.5)" in result.output


@pytest.fixture
def scores(tmp_path):
    score_table().save(tmp_path / "scores.parquet")
    return tmp_path / "scores.parquet"


def test_select_writes_a_subset_and_one_line(scores, tmp_path):
    out = tmp_path / "subset.npy"
    result = fastprune("select", scores, "-o", out, "--keep", 0.5, "--strategy", "hard")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("kept 100 of 200 rows (50.00%) in 0.")
    assert result.output.endswith(f" s -> {out}\n")
    assert len(np.load(out)) == 100
    assert json.loads((tmp_path / "subset.json").read_text())["strategy"] == "hard"


def test_select_takes_every_option(scores, tmp_path):
    np.save(tmp_path / "exclude.npy", np.arange(10))
    options = "--keep 0.3 --metric centroid:1,loss:1 --strategy ccs --drop-hardest 0.2 --seed 4"
    result = fastprune(
        *("select", scores, "-o", tmp_path / "subset.npy", *options.split(), "--global"),
        *("--exclude", tmp_path / "exclude.npy", "--allow-empty-classes"),
    )
    assert result.exit_code == 0, result.output
    subset = Subset.load(tmp_path / "subset.npy")
    assert subset.rows.min() >= 10
    assert subset.parameters == {
        "quota": "proportional",
        "per_class": False,
        "drop_hardest": 0.2,
        "excluded_rows": 10,
    }


def test_select_refuses_a_share_above_one(scores, tmp_path):
    result = fastprune("select", scores, "-o", tmp_path / "subset.npy", "--keep", "1.5")
    assert result.exit_code == 2
    assert "it must be a number in (0, 1], not 1.5" in result.output
    assert not (tmp_path / "subset.npy").exists()


def test_select_needs_no_torch(scores, tmp_path):
    code = (
        "import sys; from fastprune.cli import main\n"
        f"main(['select', {str(scores)!r}, '-o', {str(tmp_path / 's.npy')!r}, '--keep', '0.5'],"
        " standalone_mode=False)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numba')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sweep_writes_a_subset_for_every_ratio(scores, tmp_path):
    result = fastprune("select", scores, "-o", tmp_path / "s.npy", "--sweep", "0.3,0.4,0.5,0.125")
    assert result.exit_code == 0, result.output
    names = ("s-30", "s-40", "s-50", "s-12.5")
    sizes = [len(Subset.load(tmp_path / f"{name}.npy").rows) for name in names]
    assert sizes == [60, 80, 100, 25]
    assert len(result.output.splitlines()) == 4
    assert not (tmp_path / "s.npy").exists()


@pytest.mark.parametrize("options", [(), ("--keep", "0.5", "--sweep", "0.5")])
def test_select_needs_keep_or_sweep(scores, tmp_path, options):
    result = fastprune("select", scores, "-o", tmp_path / "s.npy", *options)
    assert result.exit_code == 2
    assert "--keep or --sweep" in result.output


def test_sweep_that_is_no_list_of_numbers_is_refused(scores, tmp_path):
    result = fastprune("select", scores, "-o", tmp_path / "s.npy", "--sweep", "half")
    assert result.exit_code == 2
    assert "it must be a list of numbers in (0, 1], not 'half'" in result.output


def test_scores_of_another_tool_are_selected_from_exported_and_imported(tmp_path):
    beton = small_beton(tmp_path)
    np.save(tmp_path / "forgetting.npy", np.arange(24))
    selected = fastprune(
        *("select", tmp_path / "forgetting.npy", "--beton", beton, "--keep", 0.5),
        *("-o", tmp_path / "subset.npy", "--strategy", "easy"),
    )
    assert selected.exit_code == 0, selected.output
    exported = fastprune(
        *("export", tmp_path / "subset.npy", "-o", tmp_path / "names.txt"),
        *("--format", "names", "--beton", beton),
    )
    assert exported.output == f"exported 12 rows -> {tmp_path / 'names.txt'}\n"
    imported = fastprune(
        *("import", tmp_path / "names.txt", "--beton", beton, "-o", tmp_path / "again.npy"),
        "--drop",
    )
    assert imported.output == f"kept 12 of 24 rows (50.00%) -> {tmp_path / 'again.npy'}\n"
    kept, dropped = (Subset.load(tmp_path / name).rows for name in ("subset.npy", "again.npy"))
    assert np.array_equal(np.sort(np.concatenate([kept, dropped])), np.arange(24))


def test_class_std_is_imported_through_the_command_line(tmp_path):
    beton = small_beton(tmp_path)
    np.save(tmp_path / "std.npy", [1.0, 2.0, 3.0])
    (tmp_path / "rows.txt").write_text("1\n2\n")
    imported = fastprune(
        *("import", tmp_path / "rows.txt", "--beton", beton, "-o", tmp_path / "again.npy"),
        *("--class-std", tmp_path / "std.npy"),
    )
    assert imported.exit_code == 0, imported.output
    assert Subset.load(tmp_path / "again.npy").class_std.tolist() == [1, 2, 3]
