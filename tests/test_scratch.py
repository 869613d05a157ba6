import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastprune import scratch
from fastprune.scratch import keep_compiled_code_somewhere, scratch_folders


@pytest.fixture
def nowhere_to_write(tmp_path, monkeypatch):
    """Numba's usual folders cannot be written; scratch can."""
    monkeypatch.setattr(scratch, "_can_be_made", lambda folder: False)
    monkeypatch.setattr(scratch, "scratch_folders", lambda: iter([tmp_path]))
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/cache/numba")
    monkeypatch.setitem(sys.modules, "numba", SimpleNamespace(config=SimpleNamespace()))
    return tmp_path


def test_compiled_code_goes_to_scratch_where_nothing_else_can_be_written(nowhere_to_write):
    keep_compiled_code_somewhere()
    folder = nowhere_to_write / f"fastprune-{os.getuid()}"
    assert os.environ["NUMBA_CACHE_DIR"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_write_is_not_trusted(nowhere_to_write):
    folder = nowhere_to_write / f"fastprune-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    keep_compiled_code_somewhere()
    assert os.environ["NUMBA_CACHE_DIR"] == "/cache/numba"


def test_a_link_in_place_of_the_folder_is_not_trusted(nowhere_to_write):
    elsewhere = nowhere_to_write / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (nowhere_to_write / f"fastprune-{os.getuid()}").symlink_to(elsewhere)
    keep_compiled_code_somewhere()
    assert os.environ["NUMBA_CACHE_DIR"] == "/cache/numba"


def test_a_folder_that_can_be_made_is_left_to_numba(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "not" / "yet"))
    keep_compiled_code_somewhere()
    assert os.environ["NUMBA_CACHE_DIR"] == str(tmp_path / "not" / "yet")


def test_the_named_temporary_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert next(scratch_folders()) == tmp_path


def test_without_a_home_the_package_imports():
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(scratch.__file__).parents[1])}
    script = "import fastprune; print(fastprune.__version__)"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True)
