import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fastprune.base.errors import ConversionError, InvalidValueError
from fastprune.cli import main
from fastprune.demo.walk import run_demo
from fastprune.rows.score_table import ScoreTable
from fastprune.rows.subset import Subset
from tests.conftest import require_library
from tests.images import write_image_folder

KINDS = ["full", "full+cache", "medium+reshape", "random"]
SMALL = {"per_class": 14, "epochs": 1, "teacher_epochs": 1, "image_size": 32, "teacher": "resnet8"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, run_demo(out=out, **SMALL)


def test_result_has_the_documented_schema(demo):
    out, _ = demo
    result = json.loads((out / "result.json").read_text())
    assert [run["name"] for run in result["runs"]] == KINDS
    for run in result["runs"]:
        assert run["total_seconds"] > run["train_seconds"] > 0
        assert 0 <= run["top1_last"] <= run["top1_best"] <= 1
        assert (run["seed"], run["epochs"]) == (0, 1)
    assert [run["rows"] for run in result["runs"]] == [140, 140, 70, 70]
    assert result["machine"]["cores"] >= 1
    assert "torch" in result["versions"]


def test_only_the_run_that_uses_scores_is_charged_for_them(demo):
    out, _ = demo
    runs = {run["name"]: run for run in json.loads((out / "result.json").read_text())["runs"]}
    medium = runs.pop("medium+reshape")
    assert {run["score_seconds"] for run in runs.values()} == {0}
    assert medium["score_seconds"] > 0
    paid = medium["score_seconds"] + medium["train_seconds"]
    assert medium["ratio_to_full"] == pytest.approx(paid / runs["full"]["train_seconds"])
    assert runs["full"]["ratio_to_full"] == 1


def test_cached_run_asks_the_teacher_for_a_third_of_its_epochs(tmp_path):
    settings = SMALL | {"epochs": 4}
    run_demo(out=tmp_path / "out", **settings)
    forwards = {
        name: json.loads((tmp_path / f"out/runs/{name}-0/result.json").read_text())[
            "teacher_forwards"
        ]
        for name in ("full", "full+cache")
    }
    assert forwards["full"] == 4 * 128  # of 140 images four batches
    # Two slots are filled; batches of later epochs hold rows that filled none before.
    assert 2 * 128 <= forwards["full+cache"] <= 2 * 140


def test_cost_ratio_counts_steps_at_their_median_scoring_and_start_up(demo):
    out, _ = demo
    full, *pruned = json.loads((out / "result.json").read_text())["runs"]
    parts = ("steady_train_seconds", "score_seconds", "startup_seconds")
    assert full["cost_ratio"] == 1
    for run in pruned:
        expected = sum(run[part] for part in parts) / sum(full[part] for part in parts)
        assert run["cost_ratio"] == pytest.approx(expected)
        assert run["disturbed"] is False  # too few steps to tell


def test_half_of_the_rows_costs_half_of_the_steps_whatever_ran_beside(demo):
    out, _ = demo
    full, _, _, random = json.loads((out / "result.json").read_text())["runs"]
    # 140 images are four batches, 70 are two.
    assert random["steady_train_seconds"] / full["steady_train_seconds"] == pytest.approx(2 / 4)


def test_demo_and_report_give_the_same_costs(demo, tmp_path):
    out, text = demo
    result = json.loads((out / "result.json").read_text())
    page = (out / "report.html").read_text()
    assert CliRunner().invoke(main, ["report", str(out / "runs"), "-o", str(tmp_path / "r.html")])
    for run in result["runs"]:
        shown = f"{run['cost_ratio']:.2f}"
        assert shown in next(line for line in text.splitlines() if line.startswith(run["name"]))
        for content in (page, (tmp_path / "r.html").read_text()):
            lines = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in content.split("<tr>")]
            (line,) = (ln for ln in lines if ln[:1] == [run["name"]] and len(ln) == 8)
            assert line[5] == shown


def test_wrong_labels_stand_beside_the_numbers(demo):
    out, text = demo
    assert json.loads((out / "result.json").read_text())["wrong_label_share"] == 0.03
    assert text.endswith("3% of the training pictures carry a wrong label on purpose.")


def test_subsets_are_class_balanced_halves_of_the_scored_beton(demo):
    out, _ = demo
    table = ScoreTable.load(out / "scores.parquet")
    for name in ("medium", "random"):
        subset = Subset.load(out / f"{name}.npy")
        assert subset.fingerprint == table.fingerprint
        assert np.bincount(table.labels[subset.rows]).tolist() == [7] * 10


def test_stock_ffcv_reads_the_beton_and_the_subset(demo):
    require_library("ffcv")
    import ffcv

    out, _ = demo
    rows = np.load(out / "medium.npy")
    loader = ffcv.loader.Loader(
        str(out / "train.beton"), batch_size=10, indices=rows, drop_last=False, num_workers=1
    )
    labels = np.concatenate([batch[1].numpy().ravel().copy() for batch in loader])
    np.testing.assert_array_equal(labels, ScoreTable.load(out / "scores.parquet").labels[rows])


def test_demo_ends_in_the_pages_of_a_report(demo):
    out, _ = demo
    assert "<h2>Accuracy over cost</h2>" in (out / "report.html").read_text()
    assert (out / "report-cost.png").exists()
    page = (out / "scores.html").read_text()
    assert "kept, medium" in page
    assert "How loss is spread" in page


def test_table_names_every_run(demo):
    _, text = demo
    lines = text.splitlines()
    assert lines[0].split()[0] == "run"
    assert [line.split()[0] for line in lines[2:6]] == KINDS


def test_demo_clears_what_an_earlier_demo_left_and_nothing_else(tmp_path, tmp_path_factory):
    for name in ("runs/full-0/result.json", "scores.parquet.partial/pass.json", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    (tmp_path / ".fastprune-demo").touch()
    mine = tmp_path_factory.mktemp("mine")
    with pytest.raises(ConversionError, match="holds no class folders"):
        run_demo(out=tmp_path, images=mine, **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".fastprune-demo", "notes.txt"]


@pytest.mark.parametrize(
    ("argument", "path"),
    [("teacher_checkpoint", "teacher/student.safetensors"), ("images", "images/train")],
)
def test_demo_does_not_clear_away_what_it_is_given(demo, argument, path):
    out, _ = demo
    with pytest.raises(InvalidValueError, match=r"lies in the folder that the demo replaces"):
        run_demo(out=out, **{argument: out / path})
    assert (out / path).exists()


def test_missing_image_folder_is_named_before_an_earlier_demo_is_cleared(demo):
    out, _ = demo
    with pytest.raises(InvalidValueError, match=r"image folder nowhere does not exist\. Name one"):
        run_demo(out=out, images=Path("nowhere"))
    assert (out / "result.json").exists()


def test_demo_is_not_written_among_the_classes(tmp_path):
    write_image_folder(tmp_path / "mine", classes=2)
    with pytest.raises(InvalidValueError, match="would be a class of the image folder"):
        run_demo(out=tmp_path / "mine" / "demo", images=tmp_path / "mine")


def test_too_few_images_for_a_batch_are_refused_before_the_training(tmp_path):
    with pytest.raises(InvalidValueError, match=r"leaves 10 of 20 .* a batch has 32\. Keep more"):
        run_demo(out=tmp_path / "out", **SMALL | {"per_class": 2})
    assert not (tmp_path / "out" / "teacher").exists()


def test_folder_that_no_demo_wrote_is_not_touched(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.jpg").write_bytes(b"mine")
    with pytest.raises(InvalidValueError, match="holds files that no demo wrote"):
        run_demo(out=tmp_path, **SMALL)
    assert (tmp_path / "images" / "mine.jpg").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, r"keep must be a number in \(0, 1\], not 0\.0"),
        ({"keep": 1.5}, r"keep must be .*, not 1\.5"),
        ({"epochs": 0}, "epochs must be an integer >= 1, not 0"),
        ({"per_class": -1}, "per_class must be .*, not -1"),
        ({"student": "resnet9"}, "resnet9"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(tmp_path, settings, message):
    with pytest.raises(InvalidValueError, match=message):
        run_demo(out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
