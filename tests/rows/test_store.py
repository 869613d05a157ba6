"""The contract of the store by row, over its users."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastprune import TeacherCache
from fastprune.base.errors import ArtifactError
from fastprune.rows import store as store_module
from fastprune.rows.store import Marks, RowStore
from tests.rows import pass_writer
from tests.rows.cache_writer import ROWS, logits_of, make_cache
from tests.rows.store_writer import FIELDS, NUM_ROWS, open_store, values_of

ROOT = Path(__file__).parents[2]
ALL = np.arange(NUM_ROWS)


class PlainStore:
    """A store of two fields."""

    writer = "tests.rows.store_writer"

    def make(self, folder):
        open_store(folder).create()

    def faults(self, folder):
        return list(open_store(folder).check())

    def require_intact(self, folder, *, is_whole):
        """Every row that is there has its values, to the bit."""
        store = open_store(folder)
        rows = np.flatnonzero(store.has(ALL))
        assert not is_whole or len(rows) == NUM_ROWS
        for field, expected in zip(FIELDS, values_of(rows), strict=True):
            assert np.array_equal(store.read(field, rows), expected)


class Cache:
    """A teacher cache of three slots."""

    writer = "tests.rows.cache_writer"

    def make(self, folder):
        make_cache(folder, dtype="float32")

    def faults(self, folder):
        return list(TeacherCache.open(folder).check())

    def require_intact(self, folder, *, is_whole):
        cache = TeacherCache.open(folder)
        for slot in range(cache.num_views):
            rows = ROWS[cache.has(ROWS, slot)]
            assert not is_whole or len(rows) == len(ROWS)
            assert np.array_equal(cache.logits(rows, slot), logits_of(rows, slot))


class ScoringPass:
    """The files of a scoring pass, whose features are in two stores."""

    writer = "tests.rows.pass_writer"

    def make(self, out_path):
        with pass_writer.opened(out_path, 0):
            pass

    def faults(self, out_path):
        with pass_writer.opened(out_path, 1) as unfinished:
            return list(unfinished.check())

    def require_intact(self, out_path, *, is_whole):
        with pass_writer.opened(out_path, 0) as unfinished:
            rows = np.setdiff1d(np.arange(pass_writer.NUM_ROWS), unfinished.missing())
            assert not is_whole or len(rows) == pass_writer.NUM_ROWS
            features, records = pass_writer.results_of(rows)
            assert np.array_equal(unfinished.records[rows], records)
            if is_whole:
                assert np.array_equal(unfinished.features(), features)


@pytest.fixture(params=[PlainStore, Cache, ScoringPass])
def user(request):
    return request.param()


def writers(user, folder, ranks):
    """Processes that fill the same folder, each its share of the rows."""
    return [
        subprocess.Popen(
            [sys.executable, "-m", user.writer, folder, str(rank), str(ranks)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]


def finish(processes):
    for process in processes:
        process.communicate()
        assert process.returncode == 0


def test_two_processes_fill_one_folder(user, tmp_path):
    user.make(tmp_path / "rows")
    finish(writers(user, tmp_path / "rows", 2))
    user.require_intact(tmp_path / "rows", is_whole=True)
    assert user.faults(tmp_path / "rows") == []


def test_two_processes_that_write_the_same_rows_do_not_disturb_one_another(user, tmp_path):
    user.make(tmp_path / "rows")
    finish([*writers(user, tmp_path / "rows", 1), *writers(user, tmp_path / "rows", 1)])
    user.require_intact(tmp_path / "rows", is_whole=True)


@pytest.mark.parametrize(
    ("tries", "ranks"),
    [
        (3, 1),
        pytest.param(30, 1, marks=pytest.mark.full),
        pytest.param(30, 2, marks=pytest.mark.full),
    ],
)
def test_a_kill_at_any_moment_leaves_missing_rows_and_nothing_else(user, tmp_path, tries, ranks):
    folder, rng = tmp_path / "rows", np.random.default_rng(ranks)
    user.make(folder)
    for _ in range(tries):
        processes = writers(user, folder, ranks)
        for process in processes:
            process.stdout.readline()  # it has begun to write
        time.sleep(rng.uniform(0, 0.25))
        for process in processes:
            process.kill()
            process.communicate()
        assert user.faults(folder) == []
        user.require_intact(folder, is_whole=False)
    finish(writers(user, folder, ranks))
    user.require_intact(folder, is_whole=True)


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "rows")


def test_every_field_is_under_the_checksum(store):
    store.put(ALL, *values_of(ALL))
    store.commit(seal=True)
    for name in FIELDS:
        path = store.path(name)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        reopened = open_store(store.folder)
        reopened.read(name, ALL[:9])  # of another block
        with pytest.raises(ArtifactError, match=rf"{name}\.npy.*entries 8,192 to 10,000 do not"):
            reopened.read(name, ALL[-1:])
        assert len(list(reopened.check())) == 1
        path.write_bytes(whole)
    assert list(open_store(store.folder).check()) == []


def test_files_are_plain_numpy_maps(store):
    store.put(ALL[2:4], *values_of(ALL[2:4]))
    store.close()
    assert np.flatnonzero(np.load(store.path("marks"))).tolist() == [2, 3]
    assert np.array_equal(np.load(store.path("records"))[2:4], values_of([2, 3])[1])
    assert len(np.load(store.path("crc32c"))) == 3


def test_rows_that_wait_are_missing_no_more_and_are_read(store):
    assert not store.is_made
    store.put(ALL[[9, 2]], *values_of([9, 2]))
    assert store.has(ALL[[1, 2]]).tolist() == [False, True]
    assert len(store.missing()) == NUM_ROWS - 2
    assert np.array_equal(store.read("vectors", ALL[[2, 9]]), values_of([2, 9])[0])


def test_a_disk_that_is_too_small_is_noticed_when_room_is_reserved(store, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(
        ArtifactError, match=r"cannot reserve 0\.0 GB for .*vectors\.npy: No space left.*Free some"
    ):
        store.create(reserve=True)
    assert not store.is_made


def test_reserved_room_is_taken_at_once_and_holes_are_not(tmp_path):
    sizes = {}
    for reserve in (True, False):
        (tmp_path / str(reserve)).mkdir()
        store = RowStore(tmp_path / str(reserve), 9999, {"data": np.dtype((np.float32, (100,)))})
        store.create(reserve=reserve)
        sizes[reserve] = store_module.disk_bytes(store.folder)
    assert sizes[True] > 9999 * 400 > 50_000 > sizes[False]


def test_a_file_system_without_locks_is_written_all_the_same(store, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    store.put(ALL, *values_of(ALL))
    store.commit()
    with Marks(store.path("marks"), NUM_ROWS, cure="").claim(ALL[:3]) as absent:
        assert len(absent) == 0


@pytest.fixture
def marks(tmp_path):
    Marks.create(tmp_path / "marks.npy", 20)
    return Marks(tmp_path / "marks.npy", 20, cure="Make it again.")


def test_claimed_rows_are_refused_to_another_thread_and_process(marks, tmp_path):
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from fastprune.rows.store import Marks\n"
        "with Marks(Path(sys.argv[1]), 20, cure='').claim(np.array([4, 7])) as absent:\n"
        "    print(absent)\n"
    )
    command = [sys.executable, "-c", code, marks.path]
    with marks.claim(np.array([3, 7, 8])) as absent:
        assert absent.tolist() == [3, 7, 8]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        assert done.stdout == "None\n"

        def claim(rows):
            with marks.claim(np.array(rows)) as found:
                return None if found is None else found.tolist()

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(claim, [8, 9]).result() is None
            assert pool.submit(claim, [2, 4, 9]).result() == [2, 4, 9]
        marks.done(absent[:2])
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[4]\n"
    assert np.flatnonzero(np.load(marks.path)).tolist() == [3, 7]


def test_marks_of_another_number_of_rows_or_none_are_refused(marks, tmp_path):
    with pytest.raises(ArtifactError, match=r"marks\.npy holds bool of shape \(20,\).*Make it"):
        Marks(marks.path, 21, cure="Make it again.")
    with pytest.raises(ArtifactError, match=r"none\.npy is missing\. Make it again"):
        Marks(tmp_path / "none.npy", 20, cure="Make it again.")


def test_no_rows_are_claimed_and_marked_without_harm(marks):
    with marks.claim(np.array([], np.int64)) as absent:
        marks.done(absent)
    assert not marks.array.any()
