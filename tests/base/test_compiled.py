"""Compiled code on disk: found again when nothing changed, made anew otherwise, never others'."""

import fcntl
import logging
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numba.core.errors import TypingError

from fastprune.base import compiled as compile_cache
from fastprune.base.compiled import cached, ensure_compile_cache, scratch_folders, writable_folder

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs to give files to other users")
OTHER, THIRD = 54_321, 54_322


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of ours that compiled code goes to."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A folder that everybody may make files in, like /tmp."""
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)  # others can pass
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder))
    return folder


def double(number):
    return 2 * number


def compiled(*sources):
    """A new dispatcher, as in a new process; how often it compiles is in its statistics."""
    return cached(*(sources or (Path(__file__),)))(double)


def num_compiled(dispatcher):
    return sum(dispatcher.stats.cache_misses.values())


def test_code_that_was_kept_is_not_compiled_again(folder):
    assert compiled()(3) == 6
    again = compiled()
    assert again(4) == 8
    assert num_compiled(again) == 0
    assert [path.stat().st_mode & 0o077 for path in folder.iterdir()] == [0]


def test_each_signature_has_a_file(folder):
    function = compiled()
    function(3), function(3.0), function(np.zeros(2))
    assert len(list(folder.iterdir())) == 3
    again = compiled()
    assert again(1.5) == 3.0
    assert num_compiled(again) == 0


TOGETHER = """
import pathlib, sys, time
from fastprune.base.compiled import cached

def slow(values, number):
    for i in range(len(values)):
        values[i] = values[i] ** number + sum(values[:i])
    return values.sum()

source = pathlib.Path(sys.argv[1])
function = cached(source)(slow)
print("ready", flush=True)
sys.stdin.readline()
import numpy
function(numpy.ones(3), 3)
print(sum(function.stats.cache_misses.values()), sum(function.stats.cache_hits.values()))
"""


def start_together(tmp_path, count):
    source = tmp_path / "source.py"
    source.write_text("")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, source], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(count)
    ]
    for process in processes:
        assert process.stdout.readline() == b"ready\n"
    return processes


def test_of_processes_that_start_together_one_compiles(folder, tmp_path):
    processes = start_together(tmp_path, 3)
    for process in processes:
        process.stdin.write(b"\n")
        process.stdin.flush()
    counts = sorted(process.communicate()[0] for process in processes)
    assert counts == [b"0 1\n", b"0 1\n", b"1 0\n"]


def test_a_compiler_that_was_killed_blocks_no_other(folder, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, os, sys, time\n"
         "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
         "print('held', flush=True); time.sleep(60)", folder],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout.readline() == b"held\n"
    function = compiled()
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(function, 3)
        with pytest.raises(TimeoutError):
            call.result(timeout=0.5)
        holder.kill()
        holder.communicate()
        assert call.result(timeout=60) == 6


def test_a_compiler_that_hangs_is_not_waited_for_any_longer(folder, monkeypatch):
    monkeypatch.setattr(compile_cache, "_LONGEST_WAIT_SECONDS", 0.2)
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    function = compiled()
    assert function(3) == 6
    assert num_compiled(function) == 1
    os.close(descriptor)


def test_a_function_that_cannot_be_compiled_gives_up_its_turn(folder):
    @cached(Path(__file__))
    def wrong(number):
        return number + "text"

    with pytest.raises(TypingError):
        wrong(3)
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_an_edit_of_any_source_compiles_anew(folder, tmp_path):
    source = tmp_path / "source.py"
    source.write_text("1")
    compiled(source)(3)
    source.write_text("2")
    compile_cache._source_digest.cache_clear()  # as in a new process
    again = compiled(source)
    again(3)
    assert num_compiled(again) == 1


@pytest.mark.parametrize(
    "damage", [lambda code: code[:-9], lambda code: b"", lambda code: code[::-1]]
)
def test_a_damaged_file_is_made_anew_with_one_line(folder, caplog, damage):
    compiled()(3)
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        again = compiled()
        assert again(5) == 10
    assert num_compiled(again) == 1
    (record,) = caplog.records
    assert str(file) in record.message
    assert "compiled again" in record.message
    third = compiled()
    third(5)
    assert num_compiled(third) == 0


def test_code_that_cannot_be_kept_is_compiled_all_the_same(folder, caplog, monkeypatch):
    def fail(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compile_cache, "temporary_path", fail)
    assert compiled()(3) == 6
    assert "cannot be kept" in caplog.text
    assert "No space left" in caplog.text


def test_without_any_folder_a_line_names_the_cure(monkeypatch, caplog):
    monkeypatch.setattr(compile_cache, "writable_folder", lambda: None)
    monkeypatch.setattr(compile_cache, "_readable_folders", lambda: ())
    compile_cache._note_no_folder.cache_clear()
    assert compiled()(3) == 6
    assert compiled()(3) == 6
    assert caplog.text.count("Name a folder in NUMBA_CACHE_DIR") == 1


def test_files_that_nobody_loads_are_removed_after_a_month(folder):
    compiled()(3)
    (file,) = folder.iterdir()
    os.utime(file, (0, 0))
    compiled()(3.0)
    assert file not in list(folder.iterdir())


def test_code_in_a_folder_that_can_only_be_read_is_found(folder, monkeypatch):
    compiled()(3)
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != folder and access(path, mode)
    )
    assert writable_folder() != folder
    again = compiled()
    again(3)
    assert num_compiled(again) == 0


def test_a_folder_of_our_own_is_taken_as_it_is(folder):
    assert writable_folder() == folder


def test_a_missing_folder_is_made_private(folder, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder / "missing"))
    assert writable_folder() == folder / "missing"
    assert stat.S_IMODE((folder / "missing").stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_to_is_not_used(folder, mode):
    folder.chmod(mode)
    assert writable_folder() not in (folder, folder / f"fastprune-{os.geteuid()}")


def test_a_folder_below_one_that_others_can_write_to_is_not_used(folder, monkeypatch):
    folder.chmod(0o777)
    (folder / "mine").mkdir(mode=0o700)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder / "mine"))
    assert folder not in writable_folder().parents


@as_root
def test_in_a_shared_sticky_folder_each_user_has_a_private_one(shared):
    own = writable_folder()
    assert own == shared / "fastprune-0"
    assert stat.S_IMODE(own.stat().st_mode) == 0o700


@as_root
def test_a_folder_of_another_user_is_not_used(folder):
    os.chown(folder, OTHER, OTHER)
    assert writable_folder() != folder


@as_root
def test_a_link_of_another_user_is_not_followed(shared, folder, monkeypatch):
    link = shared / "link"
    link.symlink_to(folder)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(link))
    assert writable_folder() == link
    os.chown(link, OTHER, OTHER, follow_symlinks=False)
    assert link not in (writable_folder(), *writable_folder().parents)


def as_user(user, code, shared, tmp_path):
    """Run code as another user; what it prints."""
    home = tmp_path / f"home-{user}"
    home.mkdir(mode=0o700)
    os.chown(home, user, user)
    # What is imported may lie where the other user cannot read.
    imports = "import os\nfrom fastprune.base import compiled as c\n"
    change = f"os.setgid({user}); os.setuid({user})\n"
    change += f"os.environ |= {{'HOME': {str(home)!r}, 'NUMBA_CACHE_DIR': {str(shared)!r}}}\n"
    program = imports + change + code
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WHERE = "print(c.writable_folder())"


@as_root
def test_another_user_gets_a_folder_of_its_own(shared, tmp_path):
    assert as_user(OTHER, WHERE, shared, tmp_path) == str(shared / f"fastprune-{OTHER}")
    assert (shared / f"fastprune-{OTHER}").stat().st_uid == OTHER


@as_root
def test_code_that_another_user_has_planted_is_not_run(shared, tmp_path):
    planted = shared / f"fastprune-{THIRD}"
    as_user(
        OTHER,
        f"os.mkdir({str(planted)!r}, 0o777); os.chmod({str(planted)!r}, 0o777)",
        shared,
        tmp_path,
    )
    code = "print(*c._readable_folders(), c.writable_folder())"
    assert str(planted) not in as_user(THIRD, code, shared, tmp_path)


@as_root
def test_root_does_not_run_what_a_user_has_kept(shared, tmp_path, monkeypatch):
    as_user(OTHER, WHERE, shared, tmp_path)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(shared / f"fastprune-{OTHER}"))
    readable = list(compile_cache._readable_folders())
    assert shared / f"fastprune-{OTHER}" not in readable


def test_numba_is_kept_from_a_folder_that_others_can_write_to(folder):
    folder.chmod(0o777)
    ensure_compile_cache()
    assert os.environ["NUMBA_CACHE_DIR"] == str(writable_folder())
    assert os.environ["NUMBA_CACHE_DIR"] != str(folder)


def test_numba_is_left_alone_where_its_usual_folders_will_do(monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    ensure_compile_cache()
    assert "NUMBA_CACHE_DIR" not in os.environ


def test_numba_gets_a_folder_where_its_usual_ones_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")  # so that it is undone
    monkeypatch.setattr(compile_cache, "_is_writable", lambda folder: False)
    ensure_compile_cache()
    assert os.environ["NUMBA_CACHE_DIR"] == str(writable_folder())


def test_user_without_a_home_is_served_too(monkeypatch):
    def unknown(user):
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert writable_folder().is_absolute()
    assert writable_folder().name == f"fastprune-{os.geteuid()}"


def test_the_named_temporary_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert next(scratch_folders()) == tmp_path


def test_a_temporary_folder_that_cannot_be_written_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    assert tmp_path / "missing" not in list(scratch_folders())
