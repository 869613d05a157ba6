import os
import resource

import pytest

from fastprune.beton.convert.writer import convert
from fastprune.doctor import machine
from fastprune.doctor.machine import (
    check_caches,
    check_cpus,
    check_open_files,
    check_page_cache,
    check_shared_memory,
)
from tests.images import write_image_folder


@pytest.fixture
def eight_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(machine, "usable_cpus", lambda: 3)
    monkeypatch.setattr(machine, "cpu_quota", lambda: 2.5)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def test_threads_that_ignore_the_quota_are_told_how_many(eight_cpus):
    finding = check_cpus()
    assert "affinity 8, cgroup quota 2.5" in finding.found
    assert finding.advice == "Set OMP_NUM_THREADS=3."


def test_thread_variables_beyond_the_quota_are_named(eight_cpus, monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "16")
    finding = check_cpus()
    assert "NUMBA_NUM_THREADS=16 is more" in finding.found
    assert "3 or less" in finding.advice


def test_threads_within_the_quota_are_good(eight_cpus, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert check_cpus().verdict == "good"


@pytest.fixture
def beton(tmp_path):
    convert(write_image_folder(tmp_path / "images"), tmp_path / "train.beton", workers=1)
    return tmp_path / "train.beton"


def test_a_beton_that_fits_into_memory_is_good(beton, monkeypatch):
    monkeypatch.setattr(machine, "cacheable_bytes", lambda: 1 << 40)
    assert check_page_cache([beton]).verdict == "good"


def test_a_beton_beyond_memory_is_noted_with_what_to_do(beton, monkeypatch):
    monkeypatch.setattr(machine, "cacheable_bytes", lambda: 1000)
    finding = check_page_cache([beton])
    assert finding.verdict == "note"
    assert 'fastprune compact; or read page by page, Loader(order="pages")' in finding.advice


def test_the_memory_limit_of_the_cgroup_holds(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("5000\n")
    monkeypatch.setattr(machine, "cgroup_folders", lambda controller: [tmp_path])
    assert machine.cacheable_bytes() == 5000


def test_a_low_file_limit_is_noted_with_the_option_that_raises_it(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    assert "docker run --ulimit nofile=1024" in check_open_files().advice


def test_no_size_of_shared_memory_is_too_small():
    assert check_shared_memory().verdict == "good"


def test_a_machine_without_a_folder_for_compiled_code_is_noted(monkeypatch):
    monkeypatch.setattr(machine, "writable_folder", lambda: None)
    assert "mount one" in check_caches().advice


def test_the_folder_of_compiled_code_is_named(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert str(tmp_path) in check_caches().found
