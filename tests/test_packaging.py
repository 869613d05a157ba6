"""The wheel, in a fresh virtual environment and outside the source tree, without ffcv."""

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
from tests.conftest import require_library

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
def install(dist, tmp_path_factory):
    """Makes an environment with the wheel and all that is installed here but some packages."""

    def make(*left_out):
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder / "venv", symlinks=True)
        libraries = next((folder / "venv" / "lib").glob("python3*/site-packages"))
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.lower().startswith(
                ("fastprune", "_editable", "__editable", *left_out)
            ):
                (libraries / entry.name).symlink_to(entry)
        options = ["--quiet", "--no-deps", "--no-index", "--target", libraries]
        pip = [sys.executable, "-m", "pip", "install", *options]
        subprocess.run([*pip, *dist.glob("*.whl")], check=True)
        return folder

    return make


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


@pytest.fixture(scope="module")
def without_ffcv(install):
    require_library("dali")
    return install("ffcv", "_libffcv")


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


def test_wheel_imports_from_its_environment(without_ffcv):
    done = _run(without_ffcv, "-c", "import fastprune; print(fastprune.__file__)", check=True)
    assert Path(done.stdout.strip()).is_relative_to(without_ffcv)


def test_every_public_name_imports_without_ffcv(without_ffcv):
    script = "import fastprune; [getattr(fastprune, name) for name in fastprune.__all__]"
    _run(without_ffcv, "-c", script, check=True)


def test_doctor_advises_where_ffcv_is_missing(without_ffcv):
    done = _run(without_ffcv, "-m", "fastprune", "doctor", "--json", check=True)
    found = {finding["topic"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["engine ffcv, cpu"]["verdict"] == "note"
    assert "libopencv-dev" in found["engine ffcv, cpu"]["advice"]
    assert found["engine dali, cpu"]["verdict"] == "good"


def test_demo_runs_outside_the_source_tree_without_ffcv(without_ffcv):
    options = ["--per-class", "14", "--epochs", "1", "--teacher-epochs", "1", "--image-size", "32"]
    done = _run(without_ffcv, "-m", "fastprune", "demo", "--teacher", "resnet8", *options)
    assert done.returncode == 0, done.stderr
    assert (without_ffcv / "demo" / "result.json").exists()


def test_without_any_engine_doctor_says_so_instead_of_an_import_error(install):
    done = _run(install("ffcv", "_libffcv", "nvidia"), "-m", "fastprune", "doctor")
    assert done.returncode == 1
    assert "no engine decodes" in done.stdout
    assert "Traceback" not in done.stderr
