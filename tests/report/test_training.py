import io
import re
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from PIL import Image

from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.cli import main
from fastprune.report.comparison import Comparison, group_runs
from fastprune.report.run_charts import (
    PART_COLORS,
    accuracy_png,
    cost_png,
    draw_group,
    seconds_png,
    time_parts,
)
from fastprune.report.runs import read_runs
from fastprune.report.training import report_runs
from tests.report.run_folders import change_result, write_run


@pytest.fixture
def runs(tmp_path):
    """Two seeds on all rows, two on a subset that is not there any more."""
    folder = tmp_path / "runs"
    for seed in (0, 1):
        write_run(folder / f"full-{seed}", name="full", seed=seed, top1_last=0.5 + seed / 10)
        write_run(
            folder / f"half-{seed}",
            name="half",
            seed=seed,
            subset="half.npy",
            train_seconds=5.0,
            images_per_epoch=48,
        )
    return folder


def report(*words):
    return CliRunner().invoke(main, ["report", *map(str, words)])


def lines_of(page):
    """Every table line of a page, as lists of texts."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]


def test_page_compares_the_runs_of_a_folder(runs, tmp_path):
    out = tmp_path / "report.html"
    result = report(runs, "-o", out, "--score-seconds", 1, "--convert-seconds", 3)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"reported on 4 runs (4 finished) -> {out}\n"
    lines = lines_of(out.read_text())
    assert ["full", "all rows", "2", "2", "50.00 ± 0.00", "–", "60.00 ± 0.00"] in lines
    full = ["full", "96", "10.0 ± 0.0", "0.0", "17.0 ± 0.0", "1.00 ± 0.00", "1.00", "1.0 ± 0.0"]
    half = ["half", "48", "5.0 ± 0.0", "1.0", "18.0 ± 0.0", "0.67 ± 0.00", "1.00", "1.0 ± 0.0"]
    assert full in lines
    assert half in lines


def test_pictures_are_in_the_page_and_beside_it(runs, tmp_path):
    report_runs([runs], tmp_path / "report.html", score_seconds=1)
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for name in ("report-cost.png", "report-accuracy.png", "report-seconds.png"):
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG"
            assert np.asarray(image.convert("L")).std() > 10


def test_first_chart_is_accuracy_over_cost(runs, tmp_path):
    report_runs([runs], tmp_path / "report.html", score_seconds=1)
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r'<img alt="([^"]*)"', page)[0] == "Top-1 of each run over what it cost"


def test_runs_whose_cost_is_not_recorded_are_not_in_the_chart_of_costs(runs):
    full, half = (Comparison.of(read_runs([runs]), name) for name in ("full", "half"))
    assert cost_png(full) is not None
    assert cost_png(half) is None
    assert cost_png(replace(full, baseline=None)) is not None


def test_page_tells_the_machine_the_device_and_the_engine(runs, tmp_path):
    report_runs([runs], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert re.search(r"<th>machine</th><td>.* cores.*, torch [\d.]+.*, on cpu with cpu</td>", page)


def test_what_is_not_recorded_is_a_dash_and_the_page_says_so(runs, tmp_path):
    report_runs([runs], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    (line,) = (line for line in lines_of(page) if line[:2] == ["half", "48"])
    assert line[3:6] == ["–", "–", "–"]
    assert "give them by --score-seconds" in page
    assert "Conversion is not counted" in page


def test_unfinished_run_is_shown_as_such(runs, tmp_path):
    write_run(runs / "going", name="going", finished=False)
    result = report(runs, "-o", tmp_path / "report.html")
    assert "5 runs (4 finished)" in result.stdout
    page = (tmp_path / "report.html").read_text()
    assert [*("going (unfinished)", "all rows", "1", "1 of 2", "25.00", "–", "25.00")] in lines_of(
        page
    )
    assert "An unfinished run is dashed" in page


def test_page_of_unfinished_runs_alone_has_no_costs(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    report_runs([folder], tmp_path / "report.html")
    assert "No run is finished" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "report-seconds.png").exists()


def test_page_of_a_run_that_has_reached_nothing_yet_has_no_curve(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    (folder / "metrics.jsonl").unlink()
    report_runs([folder], tmp_path / "report.html")
    assert "0 of 2" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "report-accuracy.png").exists()


def test_names_of_runs_are_text_not_markup(tmp_path):
    folder = write_run(tmp_path / "run", name="<b>$x^2$</b>")
    report_runs([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;$x^2$&lt;/b&gt;" in page
    assert "<b>" not in page


def test_mean_is_drawn_of_the_validations_that_all_seeds_have(tmp_path):
    one = {"curve": [{"epoch": 2, "train_seconds": 8.0, "top1": 0.7, "val_loss": 1.0}]}
    runs = [tmp_path / "runs" / str(seed) for seed in (0, 1)]
    for seed, (folder, changes) in enumerate(zip(runs, ({}, one), strict=True)):
        write_run(folder, name="a", seed=seed, **changes)
    figure = Figure()
    axes = figure.subplots()
    (group,) = group_runs(read_runs(runs))
    draw_group(axes, group, "black", by_epoch=False)
    *_, mean = axes.get_lines()
    assert mean.get_label() == "a"
    assert mean.get_xdata() == pytest.approx([9.0])
    assert mean.get_ydata() == pytest.approx([60.0])


def test_broken_formula_in_a_name_is_drawn_as_text(tmp_path):
    groups = group_runs(read_runs([write_run(tmp_path / "run", name="$^$")]))
    for png in (accuracy_png(groups), seconds_png(groups, convert_seconds=None)):
        with Image.open(io.BytesIO(png)) as image:
            assert image.format == "PNG"


def test_parts_add_up_to_what_the_run_cost(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "run")])
    parts = time_parts(run, convert_seconds=3.0)
    assert list(parts) == [part for part in PART_COLORS if part in parts]
    assert sum(parts.values()) == pytest.approx(14.0 + 3.0)
    assert parts["teacher"] == 3.0
    assert parts["training, other"] == pytest.approx(0.4)
    assert parts["other"] == pytest.approx(0.75)


def test_waiting_while_the_device_works_is_not_counted_twice(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "run", wait_seconds=9.0)])
    parts = time_parts(run, convert_seconds=None)
    assert parts["waiting for data"] == pytest.approx(0.5)
    assert sum(parts.values()) == pytest.approx(14.0)


def test_run_of_an_older_version_shows_its_training_undivided(tmp_path):
    folder = write_run(tmp_path / "run")
    names = ("wait_seconds", "teacher_seconds", "student_seconds", "optimizer_seconds")
    change_result(folder, **dict.fromkeys((*names, "checkpoint_seconds")))
    (run,) = read_runs([folder])
    parts = time_parts(run, convert_seconds=None)
    assert parts == {"start-up": 2.0, "training, other": 10.0, "validation": 1.0, "other": 1.0}


def test_reference_is_chosen_by_name(runs, tmp_path):
    report_runs([runs], tmp_path / "report.html", reference="half")
    assert "over the same of half, seed by seed" in (tmp_path / "report.html").read_text()


def test_negative_seconds_are_refused(runs, tmp_path):
    with pytest.raises(InvalidValueError, match=r"convert_seconds \(-2\) must be >= 0"):
        report_runs([runs], tmp_path / "report.html", convert_seconds=-2)


def test_page_into_a_folder_that_does_not_exist_is_refused(runs, tmp_path):
    with pytest.raises(ArtifactError, match=r"the folder .*nowhere does not exist"):
        report_runs([runs], tmp_path / "nowhere" / "report.html")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUNS", "--metric", "loss"], "--metric is for score tables. Leave it out."),
        (["RUNS", "--classes", "3"], "--classes is for score tables."),
        (["scores.parquet", "--reference", "full"], "--reference is for runs."),
        (["RUNS", "scores.parquet"], "give folders of runs, or one score table"),
        (["a.parquet", "b.npy", "c.npy"], "give folders of runs, or one score table"),
    ],
)
def test_runs_and_score_tables_are_not_mixed(runs, words, message):
    result = report(*(runs if word == "RUNS" else word for word in words))
    assert result.exit_code == 2
    assert message in result.stderr


def test_score_table_that_does_not_exist_is_named_as_one(tmp_path):
    result = report(tmp_path / "scores.parquet")
    assert result.exit_code == 1
    assert "fastprune score train.beton -o" in result.stderr


def test_page_says_who_paid_for_the_teacher(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "plain", name="plain", teacher_forwards=1920)
    taught = {"cache_bytes": 2_500_000, "teacher_forwards_saved": 1728}
    write_run(runs / "first", name="first", teacher_forwards=192, cache_fill_seconds=1.25, **taught)
    write_run(runs / "later", name="later", teacher_forwards=0, **taught)
    assert report(runs, "-o", tmp_path / "report.html").exit_code == 0
    lines = lines_of((tmp_path / "report.html").read_text())
    assert ["plain", "every epoch", "1,920", "0", "0.0", "0.0"] in lines
    assert ["first", "first student", "192", "1,728", "2.5", "1.2"] in lines
    assert ["later", "later student", "0", "1,728", "2.5", "0.0"] in lines


def test_page_without_a_cache_does_not_speak_of_one(runs, tmp_path):
    assert report(runs, "-o", tmp_path / "report.html").exit_code == 0
    assert "saved by the cache" not in (tmp_path / "report.html").read_text()
