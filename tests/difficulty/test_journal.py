import errno
import fcntl
import json
import os
from pathlib import Path

import numpy as np
import pytest

from fastprune.base.errors import ArtifactError
from fastprune.difficulty.journal import ROW_DTYPE, PassJournal


def open_journal(folder, *, num_rows=6, identity=None, resume=True):
    identity = {"teacher": "any"} if identity is None else identity
    return PassJournal(folder / "s.parquet", num_rows=num_rows, identity=identity, resume=resume)


def append(journal, value, count=2):
    records = np.zeros(count, ROW_DTYPE)
    records["loss"] = value
    journal.append(np.full((count, 3), value, np.float32), records)


def anonymous_bytes():
    """What this process holds in memory that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))


def test_journal_goes_on_with_the_rows_that_were_done(tmp_path):
    with open_journal(tmp_path) as journal:
        append(journal, 1.5)
    with open_journal(tmp_path) as journal:
        assert journal.rows_done == 2
        append(journal, 7)
        assert journal.features.dtype == np.float16
        assert journal.features[:, 0].tolist() == [1.5, 1.5, 7, 7, 0, 0]
        assert journal.rows["loss"].tolist() == [1.5, 1.5, 7, 7, 0, 0]


def test_seconds_of_earlier_processes_are_counted_and_those_between_are_not(tmp_path):
    with open_journal(tmp_path) as journal:
        append(journal, 1.5)
    path = tmp_path / "s.parquet.partial" / "pass.json"
    state = json.loads(path.read_text())
    assert 0 < state["seconds"] < 60
    path.write_text(json.dumps({**state, "seconds": 3600.0}))
    with open_journal(tmp_path) as journal:
        assert 3600 < journal.seconds < 3660


def test_features_that_outgrow_float16_are_copied_to_float32(tmp_path):
    with open_journal(tmp_path) as journal:
        append(journal, 1.5)
        append(journal, 65504)
        assert journal.features.dtype == np.float16
    with open_journal(tmp_path) as journal:
        append(journal, -65536)
        assert journal.features.dtype == np.float32
    with open_journal(tmp_path) as journal:
        assert journal.rows_done == 6
        assert journal.features[:, 0].tolist() == [1.5, 1.5, 65504, 65504, -65536, -65536]
    assert not (tmp_path / "s.parquet.partial/features-float16.npy").exists()


@pytest.mark.parametrize("options", [{"identity": {"teacher": "other"}}, {"resume": False}])
def test_journal_of_another_pass_is_started_anew(tmp_path, options):
    with open_journal(tmp_path) as journal:
        append(journal, 1.5)
    with open_journal(tmp_path, **options) as journal:
        assert journal.rows_done == 0
        assert journal.rows["loss"].tolist() == [0] * 6


def test_damaged_journal_is_started_anew(tmp_path):
    with open_journal(tmp_path) as journal:
        append(journal, 1.5)
    state = tmp_path / "s.parquet.partial/pass.json"
    state.write_text(state.read_text()[:-9])
    with open_journal(tmp_path) as journal:
        assert journal.rows_done == 0


@pytest.mark.parametrize("name", ["rows.npy", "features-float16.npy"])
def test_a_file_that_was_cut_is_not_filled_up_with_zeros(tmp_path, name, caplog):
    with open_journal(tmp_path) as journal:
        append(journal, 1.5)
    path = tmp_path / "s.parquet.partial" / name
    os.truncate(path, path.stat().st_size - 1)
    with open_journal(tmp_path) as journal:
        assert journal.rows_done == 0
        append(journal, 7)
    assert "is damaged (mmap length is greater than file size) and is started anew" in caplog.text


def test_a_journal_of_other_metrics_is_started_anew(tmp_path):
    with open_journal(tmp_path) as journal:
        append(journal, 1.5)
    np.save(tmp_path / "s.parquet.partial/rows.npy", np.zeros(6, [("loss", "<f8")]))
    with open_journal(tmp_path) as journal:
        assert journal.rows_done == 0
        append(journal, 7)


def test_rows_after_the_last_commit_are_done_again(tmp_path):
    journal = open_journal(tmp_path)
    append(journal, 1.5)
    journal.commit()
    append(journal, 7)
    journal.commit(older_than_seconds=3600)
    state = json.loads((journal.folder / "pass.json").read_text())
    journal.close()
    assert state["rows_done"] == 2


def test_second_writer_is_refused(tmp_path):
    with (
        open_journal(tmp_path),
        pytest.raises(ArtifactError, match=r"s\.parquet\.partial is being written by another"),
    ):
        open_journal(tmp_path)


def test_file_system_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open_journal(tmp_path) as journal:
        append(journal, 1.5)
    with open_journal(tmp_path) as journal:
        assert journal.rows_done == 2


def test_full_disk_is_told_when_the_files_are_made(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(
        ArtifactError, match=r"cannot reserve 0\.0 GB for .*rows\.npy: No space left.*Free some"
    ):
        open_journal(tmp_path)


def test_rows_take_no_memory_of_the_process(tmp_path):
    features = np.random.default_rng(0).standard_normal((500, 2048), dtype=np.float32)
    records = np.zeros(500, ROW_DTYPE)
    with open_journal(tmp_path, num_rows=40_000) as journal:
        journal.append(features, records)
        before = anonymous_bytes()
        for _ in range(79):
            journal.append(features, records)
        grown = anonymous_bytes() - before
        assert journal.features.nbytes > 160e6
    assert grown < 20e6
