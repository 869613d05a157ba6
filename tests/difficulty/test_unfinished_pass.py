import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from fastprune.base.errors import ArtifactError
from fastprune.base.ranks import Ranks
from fastprune.difficulty.teacher import RECORD
from fastprune.difficulty.unfinished_pass import open_pass
from fastprune.rows.store import BLOCK_ROWS


def opened(folder, *, num_rows=6, width=3, identity=None, resume=True, ranks=None):
    return open_pass(
        folder / "s.parquet",
        num_rows=num_rows,
        width=width,
        identity={"teacher": "any"} if identity is None else identity,
        resume=resume,
        started=time.monotonic(),
        ranks=ranks or Ranks(),
    )


def put(unfinished, rows, value):
    records = np.zeros(len(rows), RECORD)
    records["loss"] = value
    unfinished.put(np.array(rows), np.full((len(rows), 3), value, np.float32), records)


def anonymous_bytes():
    """What this process holds in memory that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))


def test_a_pass_goes_on_with_the_rows_that_are_missing(tmp_path):
    with opened(tmp_path) as unfinished:
        put(unfinished, [0, 4], 1.5)
    with opened(tmp_path) as unfinished:
        assert unfinished.missing().tolist() == [1, 2, 3, 5]
        put(unfinished, [1, 2], 7)
        unfinished.commit()
        assert unfinished.features().dtype == np.float16
        assert unfinished.features()[:, 0].tolist() == [1.5, 7, 7, 0, 1.5, 0]
        assert unfinished.records["loss"].tolist() == [1.5, 7, 7, 0, 1.5, 0]


def test_seconds_of_earlier_processes_are_counted_and_those_between_are_not(tmp_path):
    with opened(tmp_path) as unfinished:
        put(unfinished, [0], 1.5)
    path = tmp_path / "s.parquet.partial" / "pass.json"
    state = json.loads(path.read_text())
    assert 0 < state["seconds"] < 60
    path.write_text(json.dumps({**state, "seconds": 3600.0}))
    with opened(tmp_path) as unfinished:
        assert 3600 < unfinished.seconds < 3660


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_features_beyond_float16_are_kept_in_float32_whatever_the_order(tmp_path, order):
    values = np.array([1.0001, 65504, -65536], np.float32)
    for row in order:
        with opened(tmp_path, num_rows=3) as unfinished:
            put(unfinished, [row], values[row])
    with opened(tmp_path, num_rows=3) as unfinished:
        assert len(unfinished.missing()) == 0
        assert unfinished.features().dtype == np.float32
        assert unfinished.features()[:, 1].tolist() == [1, 65504, -65536]
        unfinished.keep_features(tmp_path / "features.npy")
    assert np.load(tmp_path / "features.npy")[:, 2].tolist() == [1, 65504, -65536]


@pytest.mark.parametrize(
    "options", [{"identity": {"teacher": "other"}}, {"resume": False}, {"width": 4}]
)
def test_another_pass_starts_over(tmp_path, options):
    with opened(tmp_path) as unfinished:
        put(unfinished, [0, 1], 1.5)
    with opened(tmp_path, **options) as unfinished:
        assert len(unfinished.missing()) == 6
        assert unfinished.records["loss"].tolist() == [0] * 6


def damage_header(folder):
    path = folder / "pass.json"
    path.write_text(path.read_text()[:-9])


def cut_features(folder):
    os.truncate(folder / "features.npy", (folder / "features.npy").stat().st_size - 1)


def flip_a_bit(folder):
    content = bytearray((folder / "features.npy").read_bytes())
    content[128] ^= 1
    (folder / "features.npy").write_bytes(content)


def change_metrics(folder):
    np.save(folder / "records.npy", np.zeros(6, [("loss", "<f8")]))


@pytest.mark.parametrize("damage", [damage_header, cut_features, flip_a_bit, change_metrics])
def test_a_damaged_pass_starts_over_with_a_warning(tmp_path, damage, caplog):
    with opened(tmp_path) as unfinished:
        put(unfinished, [0, 1], 1.5)
    damage(tmp_path / "s.parquet.partial")
    with opened(tmp_path) as unfinished:
        assert len(unfinished.missing()) == 6
        put(unfinished, [0, 1], 7)
    assert "is damaged and starts over" in caplog.text
    with opened(tmp_path) as unfinished:
        assert unfinished.records["loss"].tolist() == [7, 7, 0, 0, 0, 0]


def test_what_an_earlier_version_left_starts_over(tmp_path):
    folder = tmp_path / "s.parquet.partial"
    folder.mkdir()
    np.save(folder / "rows.npy", np.zeros(6))
    (folder / "pass.json").write_text('{"identity": {"teacher": "any"}, "rows_done": 3}')
    with opened(tmp_path) as unfinished:
        assert len(unfinished.missing()) == 6
        assert not (folder / "rows.npy").exists()


def test_second_writer_is_refused(tmp_path):
    with (
        opened(tmp_path),
        pytest.raises(ArtifactError, match=r"another process is writing into .*s\.parquet\.partia"),
        opened(tmp_path),
    ):
        pass


def test_a_rank_that_does_not_see_the_folder_is_told(tmp_path):
    class Second(Ranks):
        def from_first(self, value):
            return value

    with (
        pytest.raises(ArtifactError, match=r"rank 1 does not see .*a disk that they share"),
        opened(tmp_path, ranks=Second(1, 2)),
    ):
        pass


def test_rows_take_no_memory_of_the_process(tmp_path):
    features = np.random.default_rng(0).standard_normal((500, 2048), dtype=np.float32)
    records = np.zeros(500, RECORD)
    with opened(tmp_path, num_rows=40_000, width=2048) as unfinished:
        for start in range(0, 2 * BLOCK_ROWS, 500):
            unfinished.put(np.arange(start, start + 500), features, records)
        before = anonymous_bytes()
        for start in range(2 * BLOCK_ROWS, 39_500, 500):
            unfinished.put(np.arange(start, start + 500), features, records)
        grown = anonymous_bytes() - before
        assert unfinished.features().nbytes > 160e6
    assert grown < 40e6
