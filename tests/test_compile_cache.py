import os
from pathlib import Path

import pytest

from fastprune import compile_cache
from fastprune.compile_cache import ensure_compile_cache


@pytest.fixture
def nothing_writable(monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(compile_cache, "_is_writable", lambda folder: False)
    yield
    os.environ.pop("NUMBA_CACHE_DIR", None)


def test_process_gets_a_private_folder_where_nothing_can_be_written(nothing_writable):
    ensure_compile_cache()
    folder = Path(os.environ["NUMBA_CACHE_DIR"])
    assert folder.stat().st_mode & 0o077 == 0


def test_folder_of_the_users_choice_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "missing"))
    ensure_compile_cache()
    assert os.environ["NUMBA_CACHE_DIR"] == str(tmp_path / "missing")


def test_folder_that_cannot_be_written_is_replaced(nothing_writable, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/cache/numba")
    ensure_compile_cache()
    assert Path(os.environ["NUMBA_CACHE_DIR"]).name.startswith("fastprune-numba-")


def test_compiled_code_in_a_read_only_folder_is_taken_along(
    nothing_writable, tmp_path, monkeypatch
):
    (tmp_path / "fastprune_1").mkdir()
    (tmp_path / "fastprune_1" / "decode.nbi").write_bytes(b"code")
    tmp_path.chmod(0o555)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    ensure_compile_cache()
    folder = Path(os.environ["NUMBA_CACHE_DIR"])
    assert folder != tmp_path
    assert (folder / "fastprune_1" / "decode.nbi").read_bytes() == b"code"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_compiled_code_is_taken_along_though_other_places_can_be_written(tmp_path, monkeypatch):
    filled = tmp_path / "filled"
    filled.mkdir()
    (filled / "decode.nbi").write_bytes(b"code")
    _forbid_writing(monkeypatch, filled)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(filled))
    ensure_compile_cache()
    folder = Path(os.environ["NUMBA_CACHE_DIR"])
    assert folder != filled
    assert (folder / "decode.nbi").read_bytes() == b"code"


def test_an_empty_folder_that_cannot_be_written_is_left_to_numba(tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    _forbid_writing(monkeypatch, empty)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(empty))
    ensure_compile_cache()
    assert os.environ["NUMBA_CACHE_DIR"] == str(empty)


def test_a_folder_that_may_not_be_entered_counts_as_not_writable(tmp_path, monkeypatch):
    closed, exists = tmp_path / "closed", Path.exists
    closed.mkdir()
    _forbid_writing(monkeypatch, closed)

    def refuse(path):
        if closed in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refuse)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(closed / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ensure_compile_cache()
    assert not compile_cache._is_writable(closed / "cache")


def _forbid_writing(monkeypatch, folder):
    """Take away the right to write, from the superuser too."""
    access = os.access
    folder.chmod(0o555)
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != folder and access(path, mode)
    )


def test_usual_places_are_used_where_they_can_be_written(monkeypatch, tmp_path):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "missing" / "cache"))
    ensure_compile_cache()
    assert "NUMBA_CACHE_DIR" not in os.environ


def test_user_without_a_home_is_served_too(monkeypatch):
    def unknown(user):
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    ensure_compile_cache()
