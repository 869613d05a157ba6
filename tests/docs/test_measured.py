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
    *(ROOT / "docs" / name for name in ("imagenet.md", "choosing.md", "log.md")),
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

    def make(*, random, medium):
        reached = {"full": (0.7, 0.72), "random50": random, "medium50-centroid": medium}
        runs = [
            {
                "name": name,
                "seed": seed,
                "keep_ratio": 1.0 if name == "full" else 0.5,
                "epochs": 10,
                "train_seconds": 100.0 if name == "full" else 50.0,
                "score_seconds": 4.0 if name == "medium50-centroid" else 0.0,
                "total_seconds": 110.0,
                "data_wait_share": 0.015,
                "top1_last": top1,
                "top1_best": top1 + 0.01,
            }
            for name, values in reached.items()
            for seed, top1 in enumerate(values)
        ]
        return {
            "settings": {"teacher": "t", "student": "s", "epochs": 10, "device": "cpu"},
            "prepared": {
                "convert": {"train_rows": 7000, "val_rows": 10000, "seconds": 1.0},
                "teacher": {"network": "t", "seconds": 90.0, "top1_last": 0.8},
                "score": {"pass_seconds": 4.0, "seconds": 7.0},
            },
            "machine": {"cpu": "CPU", "cores": 2, "gpus": []},
            "date": "2026-01-02",
            "commit": "abc",
            "runs": runs,
            "summary": tools("wallclock").summarize(runs),
        }

    return make


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers_in_the_pages_are_those_of_the_results(tools, page):
    text = page.read_text()
    assert "<!-- numbers: " in text
    assert tools("measured").updated(text) == text, "run python tools/measured.py"


def test_table_has_a_line_per_variant_with_mean_and_spread(tools, study):
    text = tools("_study_page").study_in_readme(study(random=(0.6, 0.62), medium=(0.5, 0.54)))
    line = (
        "| `medium50-centroid` | 52.0 ± 2.8 | -9.0 ± 1.4 | 50.0 ± 0.0 | 4.0 | 0.500 ± 0.000 | "
        "0.540 ± 0.000 | 0.504 | 1.5 |"
    )
    assert line in text.splitlines()
    assert "| `random50` | 61.0 ± 1.4 | – | 50.0 ± 0.0 | 0.0 |" in text
    assert "t → s on 7,000 training images of CIFAR-10, 10 epochs each" in text


@pytest.mark.parametrize(
    ("random", "medium", "sentence"),
    [
        ((0.6, 0.62), (0.5, 0.54), "at 61.0 ± 1.4%, number 1 of 2; the best of the others"),
        ((0.5, 0.54), (0.6, 0.62), "at 52.0 ± 2.8%, number 2 of 2; the best of the others"),
        ((0.5, 0.54), (0.5, 0.54), "at 52.0 ± 2.8%, number 1 of 2; the best of the others"),
    ],
)
def test_sentences_follow_the_numbers_whoever_wins(tools, study, random, medium, sentence):
    text = tools("_study_page").study_in_readme(study(random=random, medium=medium))
    assert sentence in " ".join(text.split())


def test_ratio_at_a_long_schedule_is_shown_with_its_arithmetic(tools, study):
    text = tools("_study_page").study_in_log(study(random=(0.6, 0.6), medium=(0.5, 0.5)))
    shown = " ".join(text.split())
    assert "(4.00 + 100 × 5.000) / (100 × 10.000) = 0.504" in shown
    assert text.startswith("## 2026-01-02: students on some of the rows\n")
    assert not [line for line in text.splitlines() if line.count("`") % 2]


def test_study_that_has_only_begun_is_shown_without_findings(tools, study):
    begun = study(random=(0.6, 0.6), medium=(0.5, 0.5))
    begun["runs"] = [run for run in begun["runs"] if run["name"] == "random50"]
    begun["summary"] = tools("wallclock").summarize(begun["runs"])
    page = tools("_study_page")
    assert "| `random50` | 60.0 ± 0.0 | – |" in page.study_in_choosing(begun)
    assert page.findings(begun) == []


def test_variant_that_lacks_a_seed_says_so_and_is_no_finding(tools, study):
    begun = study(random=(0.5, 0.52), medium=(0.6, 0.62))
    begun["runs"] = [
        run for run in begun["runs"] if (run["name"], run["seed"]) != ("medium50-centroid", 1)
    ]
    begun["summary"] = tools("wallclock").summarize(begun["runs"])
    page = tools("_study_page")
    assert "| `medium50-centroid` (1 of 2 seeds so far) | 60.0 |" in page.study_in_choosing(begun)
    assert page.findings(begun) == []


@pytest.mark.parametrize("names", [("full", "random50", "medium50-centroid"), ("random50",)])
def test_chart_is_drawn_of_what_is_there(tools, study, tmp_path, names):
    drawn = study(random=(0.6, 0.61), medium=(0.5, 0.52))
    drawn["summary"] = {name: drawn["summary"][name] for name in names}
    tools("_study_page").draw_study(drawn, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as image:
        assert np.asarray(image.convert("L")).std() > 10


def test_pages_name_no_study_that_was_not_measured(tools, monkeypatch, tmp_path):
    measured = tools("measured")
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    assert measured.block("study") == ""
    (tmp_path / "epoch-cpu.json").write_text(json.dumps({"half_over_full": {"median": 0.4951}}))
    lines = measured.block("measured").splitlines()
    assert lines[2:] == ["| a distillation epoch on half of the rows, over one on all | 0.495 |"]


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
    assert "docs/images/decode.png" in page.decode_in_readme(result)
    page.draw_decode(result, tmp_path / "decode.png")
    with Image.open(tmp_path / "decode.png") as image:
        assert np.asarray(image.convert("L")).std() > 10
