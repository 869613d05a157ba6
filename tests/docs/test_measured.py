"""Numbers in README and docs are those of benchmarks/results/, and sentences follow the numbers."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("imagenet.md", "choosing.md", "drop-in.md", "log.md")),
]


@pytest.fixture
def tools(monkeypatch):
    """Import a script of tools/ or benchmarks/ as a module."""
    for folder in ("tools", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module


@pytest.fixture
def study(tools):
    """A study as wallclock.py writes it; accuracies of random and medium halves are given."""

    def make(*, random, medium, is_timed=True):
        reached = {"full": (0.7, 0.72), "random50": random, "medium50-loss+reshape": medium}
        runs = [
            {
                "name": name,
                "seed": seed,
                "steps": 100 if name == "full" else 50,
                "needs_scores": "medium" in name,
                "total_seconds": 110.0,
                "disturbed": seed == 1,
                "top1_last": top1,
                "teacher_forwards": 6400,
                "teacher_forwards_saved": 0,
            }
            for name, values in reached.items()
            for seed, top1 in enumerate(values)
        ]
        turns = {name: {"step_seconds_p50": 0.1, "startup_seconds": 1.0} for name in reached}
        in_turn = {"runs": turns, "score_seconds": 0.5} if is_timed else None
        wallclock = tools("wallclock")
        settings = {"teacher": "t", "student": "s", "epochs": 10, "device": "cpu", "image_size": 16}
        return {
            "settings": settings,
            "reduced": "fewer images, for want of time",
            "prepared": {
                "convert": {"train_rows": 7000, "val_rows": 10000, "seconds": 1.0},
                "teacher": {"network": "t", "seconds": 90.0},
                "score": {"pass_seconds": 4.0},
            },
            "teacher": {"train_top1": 0.9, "test_top1": 0.8},
            "machine": {"cpu": "CPU", "cores": 2, "gpus": []},
            "date": "2026-01-02",
            "commit": "abc",
            **wallclock.summarize(runs, in_turn),
            "runs": wallclock.with_costs(runs, in_turn),
        }

    return make


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers_in_the_pages_are_those_of_the_results(tools, page):
    text = page.read_text()
    assert "<!-- numbers: " in text
    assert tools("measured").updated(text) == text, "run python tools/measured.py"


def test_chart_of_the_study_is_of_its_result(tools):
    measured, page = tools("measured"), tools("_study_page")
    with Image.open(ROOT / "docs" / "images" / page.PICTURE) as image:
        assert image.info["Source"] == page.source_of(measured.load(measured.STUDY)), (
            "run python tools/measured.py"
        )


def test_table_has_a_line_per_cell_with_mean_spread_and_cost(tools, study):
    text = tools("_study_page").study_in_choosing(study(random=(0.6, 0.62), medium=(0.5, 0.54)))
    line = "| `medium50-loss+reshape` | 2 | 52.0 ± 2.8 | 50 | 0.591 | – | 1.00 ± 0.00 | 1 |"
    assert line in text.splitlines()
    assert "| `random50` | 2 | 61.0 ± 1.4 | 50 | 0.545 | – |" in text
    shown = " ".join(text.split())
    assert "t → s on 7,000 training images of CIFAR-10 at 16 pixels, 10 epochs" in shown
    assert "right on 90.0% of the training rows and 80.0% of the test rows" in shown


@pytest.mark.parametrize(
    ("random", "medium", "words"),
    [
        ((0.6, 0.62), (0.5001, 0.52), "worse, -10.0 points"),
        ((0.5, 0.52), (0.6, 0.6201), "better, +10.0 points"),
        ((0.5, 0.54), (0.54, 0.51), "no difference detected, +0.5 points"),
    ],
)
def test_sentences_follow_the_numbers_whoever_wins(tools, study, random, medium, words):
    text = tools("_study_page").study_in_readme(study(random=random, medium=medium))
    line = f"- `medium50-loss+reshape` against `random50`: {words} ["
    assert line in " ".join(text.split())


def test_entry_of_the_log_says_what_was_left_out_and_how_much_was_disturbed(tools, study):
    text = tools("_study_page").study_in_log(study(random=(0.6, 0.6), medium=(0.5, 0.5)))
    shown = " ".join(text.split())
    assert (
        "Smaller than planned: fewer images, for want of time. 3 of 6 runs were disturbed" in shown
    )
    assert text.startswith("## 2026-01-02: ")
    assert not [line for line in text.splitlines() if line.count("`") % 2]


@pytest.mark.parametrize("is_timed", [True, False])
def test_chart_is_drawn_and_costs_are_named_where_they_are_known(tools, study, tmp_path, is_timed):
    drawn = study(random=(0.6, 0.61), medium=(0.5, 0.52), is_timed=is_timed)
    page = tools("_study_page")
    page.draw_study(drawn, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as image:
        assert image.info["Source"] == page.source_of(drawn)
    assert ("over `full`" in " ".join(page.study_in_readme(drawn).split())) is is_timed


def test_pages_name_no_study_that_was_not_measured(tools, monkeypatch, tmp_path):
    measured = tools("measured")
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    assert measured.block("study") == ""
    (tmp_path / "epoch-cpu.json").write_text(json.dumps({"half_over_full": {"median": 0.4951}}))
    lines = measured.block("measured").splitlines()
    assert lines[2:] == [
        "| a distillation epoch on half of the rows, over one on all | 0.495 | – |"
    ]


def test_conversion_is_told_with_its_images_and_what_it_means_for_imagenet(tools):
    ratios = {
        f"{workers} workers": {"median": 10.0 + workers, "min": 9.0, "max": 14.5}
        for workers in (1, 2)
    }
    result = {
        "settings": {"rows": 10000},
        "pixels": {"rows": 1000, "ours_bytes_identical_to_the_source": 1000},
        "ours_over_ffcv": ratios,
        "rows_per_second": {
            "cp": {"median": 1000.0},
            "ours 2 workers": {"median": 10000.0},
            "ours auto 2 workers": {"median": 1000.0},
        },
    }
    measured = tools("measured")
    assert measured._converting(result) == (
        "converting 10,000 rows (1,000 ImageNet JPEGs, repeated), over `ffcv.writer` at full size "
        "| with `--jpeg original` 11.0× (9.0–14.5) with one worker, 12.0× (9.0–14.5) with two, "
        "every byte identical"
    )
    shown = " ".join(measured.converting_imagenet(result).split())
    assert "that is 2.1 minutes, or 21.4 minutes in the fast layout *(extrapolated)*" in shown


def test_ffcv_on_its_own_encoding_stands_beside_the_same_bytes(tools):
    most = {
        "ours original over stock ffcv": {"median": 3.4},
        "ours original over stock ffcv q90-500": {"median": 2.5},
    }
    line = tools("measured")._over_ffcv({"ratios": {"full, 2 threads": most}})
    assert line == "views per second, over stock FFCV on the same bytes | 3.40× | 2.50×"


def test_loader_is_told_with_most_threads_and_by_layout(tools):
    ratios = {
        "full, 1 threads": {},
        "half, 2 threads": {},
        "full, 2 threads": {
            "ours original over dali files": {"median": 2.5},
            "ours fast over dali files": {"median": 3.25},
        },
    }
    line = tools("measured")._over_dali({"ratios": ratios})
    assert line.endswith("| 2.50×, 3.25× in the fast layout")


def test_decoding_is_told_with_most_threads_and_drawn_for_one_core(tools, tmp_path):
    page = tools("_decode_page")
    ratios = {"ours over stock ffcv": {"median": 3.0}}
    ratios["ours, restart rows over stock ffcv"] = {"median": 4.5}
    rates = {
        name: {"median": rate, "min": rate - 9, "max": rate + 9}
        for name, rate in (("stock ffcv", 900), ("ours", 2700))
    }
    threads = {"1": {"images_per_second": rates}, "2": {"ratios": ratios}}
    result = {"threads": threads, "machine": {"cpu": "a CPU"}}
    assert page.decode_line(result).endswith("| 3.00×, 4.50× with restart rows")
    assert "images/decode.png" in page.decode_in_docs(result)
    page.draw_decode(result, tmp_path / "decode.png")
    with Image.open(tmp_path / "decode.png") as image:
        assert np.asarray(image.convert("L")).std() > 10
