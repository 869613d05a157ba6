"""The bare package, without the extras: it loads, converts, scores and selects."""

import subprocess
import sys

import pytest

from tests.difficulty.betons import small_beton

# What the extras bring, and what only tests have.
EXTRAS = (
    "accelerate", "datasets", "ffcv", "lightning", "matplotlib", "nvidia.dali",
    "prometheus_client", "ray", "tensorboard", "timm", "torchdistill", "torchvision", "tqdm",
)  # fmt: skip
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}))\n"


def run_without_extras(code):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code], capture_output=True, text=True, timeout=280
    )


def test_a_beton_is_converted_scored_selected_and_loaded_without_the_extras(tmp_path):
    beton = small_beton(tmp_path)
    done = run_without_extras(
        "import torch, fastprune\n"
        "from fastprune.networks import build_network\n"
        f"folder = {str(tmp_path)!r}\n"
        "fastprune.convert(folder + '/images', folder + '/again.beton')\n"
        "fastprune.check_beton(folder + '/again.beton', deep=True)\n"
        "network = build_network('resnet8', num_classes=3)\n"
        "torch.save(network.state_dict(), folder + '/teacher.pt')\n"
        f"table = fastprune.score({str(beton)!r}, network, folder + '/scores.parquet',\n"
        "    batch_size=8, image_size=32, device='cpu')\n"
        "subset = fastprune.select_rows(table.metric('el2n'), table.labels, keep_ratio=0.5)\n"
        f"loader = fastprune.Loader({str(beton)!r}, subset, image_size=32, batch_size=4,\n"
        "    device='cpu')\n"
        "print(len(list(loader)))\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"


NETWORK = "from fastprune.networks import build_network as build; "


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        (NETWORK + "build('resnet50', num_classes=2)", "train"),
        (NETWORK + "build('timm:vgg11', num_classes=2)", "timm"),
        ("from fastprune.distillation.runlog import RunLog; RunLog('.')", "train"),
        ("import fastprune.report.run_charts", "report"),
        ("import fastprune.report.score_pictures", "report"),
    ],
)
def test_a_missing_extra_is_named_with_the_line_that_installs_it(code, extra):
    done = run_without_extras(code)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(f"Install it with: pip install 'fastprune[{extra}]'")
    assert "MissingDependencyError: " in done.stderr
