"""The wheel, in a fresh virtual environment and outside the source tree, without ffcv and DALI."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import fastprune

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="module")
def wheel_alone(dist, tmp_path_factory):
    """An environment with the wheel and what it depends on, but neither ffcv nor DALI."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", symlinks=True)
    libraries = next((folder / "venv" / "lib").glob("python3*/site-packages"))
    installed = Path(sysconfig.get_path("purelib"))
    left_out = ("fastprune", "_editable", "__editable", "ffcv", "_libffcv", "nvidia")
    found = [path for path in installed.iterdir() if not path.name.lower().startswith(left_out)]
    # DALI shares its folder with the CUDA libraries of torch.
    found += [path for path in (installed / "nvidia").glob("*") if path.name != "dali"]
    (libraries / "nvidia").mkdir()
    for path in found:
        (libraries / path.relative_to(installed)).symlink_to(path)
    options = ["--quiet", "--no-deps", "--no-index", "--target", libraries]
    pip = [sys.executable, "-m", "pip", "install", *options]
    subprocess.run([*pip, *dist.glob("*.whl")], check=True)
    return folder


def _run(environment, *command, **options):
    """Run the environment's Python in a folder beside it."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [environment / "venv" / "bin" / "python", *command],
        cwd=environment,
        env=variables,
        capture_output=True,
        text=True,
        **options,
    )


def test_version_is_that_of_the_package(dist):
    names = sorted(path.name for path in dist.iterdir())
    assert names == [
        f"fastprune-{fastprune.__version__}-py3-none-any.whl",
        f"fastprune-{fastprune.__version__}.tar.gz",
    ]


def test_wheel_holds_the_package_alone_and_the_sdist_what_builds_the_image(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        assert {name.split("/")[0].split("-")[0] for name in wheel.namelist()} == {"fastprune"}
        assert "fastprune/py.typed" in wheel.namelist()
    with tarfile.open(next(dist.glob("*.tar.gz"))) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert {"Dockerfile", "Makefile", "constraints.txt", "tools/image.sh", "LICENSE"} <= names


def test_wheel_imports_from_its_environment(wheel_alone):
    done = _run(wheel_alone, "-c", "import fastprune; print(fastprune.__file__)", check=True)
    assert Path(done.stdout.strip()).is_relative_to(wheel_alone)


def test_every_public_name_imports_from_the_wheel_alone(wheel_alone):
    script = "import fastprune; [getattr(fastprune, name) for name in fastprune.__all__]"
    _run(wheel_alone, "-c", script, check=True)


def test_doctor_finds_the_wheel_alone_fit_and_advises_on_the_other_engines(wheel_alone):
    done = _run(wheel_alone, "-m", "fastprune", "doctor", "--json", check=True)
    found = {finding["topic"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["engine cpu, cpu"]["verdict"] == "good"
    assert found["engine dali, cpu"]["verdict"] == "note"
    assert found["engine ffcv, cpu"]["verdict"] == "note"
    assert "libopencv-dev" in found["engine ffcv, cpu"]["advice"]


def test_the_wheel_alone_converts_scores_selects_and_trains(wheel_alone):
    options = ["--per-class", "14", "--epochs", "1", "--teacher-epochs", "1", "--image-size", "32"]
    done = _run(wheel_alone, "-m", "fastprune", "demo", "--teacher", "resnet8", *options)
    assert done.returncode == 0, done.stderr
    assert (wheel_alone / "demo" / "result.json").exists()
