import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune import TeacherCache
from fastprune.base.errors import ArtifactError, ArtifactMismatch, InvalidValueError
from fastprune.rows import store, teacher_cache
from fastprune.rows.cache_filler import CacheFiller
from fastprune.rows.cache_format import decode, encode
from tests.rows.cache_writer import NUM_CLASSES, ROWS, logits_of, make_cache

IDENTITY = {
    "images": {"num_rows": 40, "structure": "a" * 32, "content": "b" * 32},
    "view": {
        "augment": {"kind": "rrc", "scale": [0.08, 1.0]},
        "image_size": 224,
        "seed": 3,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "transform": None,
    },
    "decoder": {"engine": "cpu", "version": 1},
    "teacher": {"weights_digest": "c" * 32, "precision": "float32"},
}


def replaced(path, value):
    """IDENTITY with another value at "a.b"."""
    changed = json.loads(json.dumps(IDENTITY))
    *sections, name = path.split(".")
    place = changed
    for section in sections:
        place = place[section]
    place[name] = value
    return changed


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache", dtype="float32")


def fill(cache, slot=0, rows=ROWS):
    cache.put(rows, slot, logits_of(rows, slot))
    cache.commit(seal=True)


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
def test_logits_come_back_as_put_returned_them(tmp_path, dtype):
    with make_cache(tmp_path / "cache", dtype=dtype) as cache:
        order = np.random.default_rng(0).permutation(ROWS)
        seen = cache.put(order, 1, logits_of(order, 1))
    reopened = TeacherCache.open(tmp_path / "cache")
    assert reopened.logits(order, 1).dtype == np.float32
    assert np.array_equal(reopened.logits(order, 1), seen)
    assert np.array_equal(reopened.logits(order[5:2:-1], 1), seen[5:2:-1])


def test_float32_is_exact_and_float16_is_exact_for_bfloat16_logits(tmp_path):
    drawn = np.random.default_rng(0).normal(scale=8, size=(10, NUM_CLASSES)).astype(np.float32)
    bfloat16 = (drawn.view(np.uint32) & 0xFFFF0000).view(np.float32)
    bfloat16[np.abs(bfloat16) < 2**-14] = 2**-14
    assert np.array_equal(decode(encode(drawn, ROWS[:10], "float32")), drawn)
    assert np.array_equal(decode(encode(bfloat16, ROWS[:10], "float16")), bfloat16)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-1000, 1000, width=32), min_size=2, max_size=20),
    st.sampled_from(["float16", "uint8"]),
)
def test_rounding_a_second_time_changes_nothing_beyond_one_step(values, dtype):
    logits = np.array([values], np.float32)
    once = decode(encode(logits, np.array([0]), dtype))
    span = float(logits.max() - logits.min())
    # Offset and scale are float16 themselves; codes are at most half a step off.
    step = 2.0**-10 * 1000 if dtype == "float16" else (span + 1) / 255
    assert np.abs(once - logits).max() <= step


def test_uint8_takes_four_bytes_beside_the_codes_and_holds_constant_rows(tmp_path):
    with make_cache(tmp_path / "cache", dtype="uint8") as cache:
        assert cache.summary()["bytes_per_view"] == NUM_CLASSES + 4
        constant = np.full((1, NUM_CLASSES), 2.5, np.float32)
        assert np.array_equal(cache.put(ROWS[:1], 0, constant), constant)


def test_files_are_plain_numpy_maps(tmp_path):
    with make_cache(tmp_path / "cache") as cache:
        cache.put(ROWS[2:4], 0, logits_of(ROWS[2:4], 0))
    folder = tmp_path / "cache"
    data = np.load(folder / "slot-000.npy", mmap_mode="r")
    assert data.shape == (len(ROWS), NUM_CLASSES)
    assert data.dtype == np.float16
    filled = np.load(folder / "filled-000.npy")
    assert filled.dtype == bool
    assert np.flatnonzero(filled).tolist() == [2, 3]
    assert np.load(folder / "rows.npy").tolist() == ROWS.tolist()
    assert np.array_equal(data[2:4], logits_of(ROWS[2:4], 0).astype(np.float16))
    header = json.loads((folder / "cache.json").read_text())
    assert (header["num_views"], header["num_classes"], header["dtype"]) == (3, 7, "float16")


def test_holes_are_known(cache):
    assert np.array_equal(cache.missing(0), ROWS)
    cache.put(ROWS[::2], 0, logits_of(ROWS[::2], 0))
    assert np.array_equal(cache.missing(0), ROWS[1::2])
    assert cache.has([ROWS[1], ROWS[0], 10**6], 0).tolist() == [False, True, False]
    assert not cache.has(ROWS, 1).any()
    with pytest.raises(
        ArtifactError, match=rf"no logits yet of row {ROWS[1]} in slot 0 .*cache fill"
    ):
        cache.logits(ROWS[:2], 0)
    with pytest.raises(ArtifactError, match="in slot 2"):
        cache.logits(ROWS[:1], 2)


def test_what_was_put_is_read_at_once_by_the_same_process(cache):
    cache.put(ROWS[:3], 0, logits_of(ROWS[:3], 0))
    assert np.array_equal(cache.logits(ROWS[:3], 0), logits_of(ROWS[:3], 0))


def test_rows_beyond_the_cache_and_slots_beyond_its_views_are_refused(cache):
    assert cache.holds([ROWS[0], -1, 10**9]).tolist() == [True, False, False]
    with pytest.raises(
        InvalidValueError, match=r"no room for row 1,000: it was made for 10,001 rows"
    ):
        cache.put([1000], 0, np.zeros((1, NUM_CLASSES)))
    with pytest.raises(InvalidValueError, match=r"slot \(3\) must be in \[0, 3\)"):
        cache.logits(ROWS[:1], 3)
    with pytest.raises(InvalidValueError, match=r"must be of shape \(1, 7\), not \(1, 8\)"):
        cache.put(ROWS[:1], 0, np.zeros((1, 8)))


def test_a_second_put_changes_nothing(cache):
    fill(cache)
    before = {file.name: file.read_bytes() for file in cache.path.iterdir()}
    cache.put(ROWS, 0, logits_of(ROWS, 0) + 1)
    cache.commit(seal=True)
    assert {file.name: file.read_bytes() for file in cache.path.iterdir()} == before


def test_of_a_row_that_is_put_twice_at_once_the_first_counts(cache):
    twice = np.array([ROWS[5], ROWS[5]])
    cache.put(twice, 0, np.stack([np.zeros(NUM_CLASSES), np.ones(NUM_CLASSES)]))
    assert not cache.logits(ROWS[5:6], 0).any()


def test_a_commit_comes_by_itself_when_much_was_put(cache, monkeypatch):
    monkeypatch.setattr(store, "_COMMIT_BYTES", 100)
    cache.put(ROWS[:9], 0, logits_of(ROWS[:9], 0))
    assert TeacherCache.open(cache.path).has(ROWS[:9], 0).all()


def test_reading_other_rows_does_not_wait_for_the_disk(cache, monkeypatch):
    fill(cache, rows=ROWS[:5])
    cache.put(ROWS[5:9], 0, logits_of(ROWS[5:9], 0))
    monkeypatch.setattr(os, "fdatasync", lambda _: pytest.fail("the disk was waited for"))
    logits, found = cache.lookup(ROWS[[0, 3, 20]], 0)
    assert found.tolist() == [True, True, False]
    assert np.array_equal(logits[:2], logits_of(ROWS[[0, 3]], 0))
    assert not logits[2].any()
    assert not cache.lookup([10**6], 0)[1].any()


def test_another_writer_s_rows_are_seen_without_opening_again(cache):
    other = TeacherCache.open(cache.path)
    assert not other.has(ROWS[:2], 0).any()
    fill(cache, rows=ROWS[:1])
    assert other.has(ROWS[:2], 0).tolist() == [True, False]
    fill(other, rows=ROWS[1:2])
    assert np.array_equal(cache.logits(ROWS[:2], 0), logits_of(ROWS[:2], 0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
def test_logits_that_are_not_finite_are_refused_with_their_row(tmp_path, dtype, bad):
    cache = make_cache(tmp_path / "cache", dtype=dtype)
    logits = logits_of(ROWS[:3], 0)
    logits[1, 2] = bad
    with pytest.raises(InvalidValueError, match=rf"row {ROWS[1]} is NaN or infinite.*Check"):
        cache.put(ROWS[:3], 0, logits)
    assert not cache.has(ROWS[:3], 0).any()


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_logits_beyond_the_range_of_the_dtype_are_refused(tmp_path, dtype):
    cache = make_cache(tmp_path / "cache", dtype=dtype)
    logits = logits_of(ROWS[:2], 0)
    logits[1, 0] = 1e8
    with pytest.raises(InvalidValueError, match=r'too large for .*\(largest 1e\+08\).*"float32"'):
        cache.put(ROWS[:2], 0, logits)


def test_slots_that_are_open_are_bounded(tmp_path):
    cache = make_cache(tmp_path / "cache", num_views=12)
    for slot in range(12):
        fill(cache, slot, ROWS[:2])
    assert len(cache._slots) == teacher_cache._MOST_OPEN_SLOTS
    assert cache.has(ROWS[:2], 0).all()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "teacher.weights_digest",
            "d" * 32,
            r"another teacher \(weights_digest\): c+, and not d+\.",
        ),
        ("teacher.precision", "bfloat16", r"teacher's precision: float32.*Set run\.precision"),
        ("view.seed", 4, r"seed of the views: 3, and not 4\. Set data\.seed = 3"),
        ("view.image_size", 192, r"image size seen by the teacher: 224.*data\.image_size = 224"),
        ("view.mean", [0, 0, 0], r"another mean: \[0\.5, 0\.5, 0\.5\], and not \[0, 0, 0\]"),
        ("view.std", [1, 1, 1], r"another std: .*Set data\.std = \[0\.2"),
        ("view.augment.kind", "pad_crop", r"crop policy \(kind\): rrc, and not pad_crop"),
        ("view.augment.scale", [0.5, 1.0], r"crop policy \(scale\)"),
        ("view.transform", "RandAugment()", "another transform: None, and not RandAugment"),
        ("decoder.version", 2, r"another decoder \(version\): 1, and not 2\. Use the backend"),
        ("decoder.engine", "dali", r"another decoder \(engine\): cpu, and not dali"),
        ("images.content", "e" * 32, r"was made from beton bbbbbbbb .* is eeeeeeee"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_name_and_with_the_cure(
    tmp_path, path, value, message
):
    make_cache(tmp_path / "cache", identity=IDENTITY)
    TeacherCache.open(tmp_path / "cache", identity=IDENTITY)
    with pytest.raises(ArtifactMismatch, match=message) as refused:
        TeacherCache.open(tmp_path / "cache", identity=replaced(path, value))
    assert "another folder" in str(refused.value)


def test_other_numbers_of_views_and_classes_and_another_dtype_are_refused(cache):
    sizes = {"num_views": 3, "num_classes": NUM_CLASSES}
    TeacherCache.open(cache.path, identity=sizes, dtype="float32")
    with pytest.raises(
        ArtifactMismatch, match=r"recurring views: 3, and not 4\. Set data\.num_views"
    ):
        TeacherCache.open(cache.path, identity={"num_views": 4})
    with pytest.raises(ArtifactMismatch, match="number of classes: 7, and not 10"):
        TeacherCache.open(cache.path, identity={"num_classes": 10})
    with pytest.raises(ArtifactMismatch, match="stores float32, but uint8 is asked for"):
        TeacherCache.open(cache.path, dtype="uint8")


def test_sections_that_are_not_asked_for_are_not_compared(tmp_path):
    make_cache(tmp_path / "cache", identity=IDENTITY)
    without_teacher = {name: IDENTITY[name] for name in ("images", "view", "decoder")}
    TeacherCache.open(tmp_path / "cache", identity=without_teacher)
    with pytest.raises(ArtifactMismatch, match=r"another teacher \(name\): None, and not resnet50"):
        TeacherCache.open(
            tmp_path / "cache", identity={"teacher": IDENTITY["teacher"] | {"name": "resnet50"}}
        )


def test_open_or_create_makes_it_once_and_takes_what_is_there(tmp_path):
    settings = {"rows": ROWS, "num_classes": NUM_CLASSES, "num_views": 2, "identity": IDENTITY}
    made = TeacherCache.open_or_create(tmp_path / "cache", **settings, dtype="uint8")
    fill(made, rows=ROWS[:2])
    # Fewer rows are trained on later: the cache keeps those it has room for.
    found = TeacherCache.open_or_create(tmp_path / "cache", **settings | {"rows": ROWS[:2]})
    assert found.dtype == "uint8"
    assert np.array_equal(found.rows, ROWS)
    with pytest.raises(ArtifactMismatch, match="recurring views: 2, and not 3"):
        TeacherCache.open_or_create(tmp_path / "cache", **settings | {"num_views": 3})


def test_of_threads_that_make_a_cache_at_once_one_makes_it(tmp_path):
    settings = {"rows": ROWS, "num_classes": NUM_CLASSES, "num_views": 2, "identity": IDENTITY}
    with ThreadPoolExecutor(8) as pool:
        made = pool.map(
            lambda _: TeacherCache.open_or_create(tmp_path / "cache", **settings), range(8)
        )
        assert {cache.num_views for cache in made} == {2}


def test_tuples_in_an_identity_are_the_lists_that_json_makes_of_them(tmp_path):
    make_cache(tmp_path / "cache", identity=replaced("view.mean", (0.1, 0.2, 0.3)))
    opened = TeacherCache.open(tmp_path / "cache", identity=replaced("view.mean", (0.1, 0.2, 0.3)))
    assert opened.identity["view"]["mean"] == [0.1, 0.2, 0.3]


def test_a_cache_is_made_once(cache):
    with pytest.raises(ArtifactError, match="holds a teacher cache already"):
        make_cache(cache.path)


def test_no_cache_and_no_folder_are_named_with_the_cure(tmp_path):
    with pytest.raises(ArtifactError, match=r"cache\.json is missing.*fastprune cache fill"):
        TeacherCache.open(tmp_path)
    with pytest.raises(ArtifactError, match=r"cannot make the teacher cache .*parent exists"):
        make_cache(tmp_path / "no" / "folder")
    with pytest.raises(InvalidValueError, match="dtype must be one of 'float16'"):
        make_cache(tmp_path / "cache", dtype="int8")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "dtype": "float16", "num_rows": -1}']
)
def test_a_damaged_header_is_refused(cache, text):
    (cache.path / "cache.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"cache\.json cannot be read: .*remove the folder"):
        TeacherCache.open(cache.path)


def test_a_fingerprint_that_is_none_is_a_damaged_header(cache):
    header = json.loads((cache.path / "cache.json").read_text())
    header["identity"]["images"] = "these"
    (cache.path / "cache.json").write_text(json.dumps(header))
    with pytest.raises(
        ArtifactError, match=r"'identity' has no fingerprint of images \(it is 'these'"
    ):
        TeacherCache.open(cache.path)


def test_a_file_is_no_cache_and_nobody_is_asked_to_remove_it(tmp_path):
    (tmp_path / "scores.parquet").write_bytes(b"")
    with pytest.raises(
        ArtifactError, match=r"Not a directory\. Name the folder of a teacher cache"
    ):
        TeacherCache.open(tmp_path / "scores.parquet")


def test_a_format_to_come_is_refused(cache):
    header = json.loads((cache.path / "cache.json").read_text())
    (cache.path / "cache.json").write_text(json.dumps(header | {"format": 2}))
    with pytest.raises(ArtifactError, match=r"'format' is 2, but must be 1\. Use the version"):
        TeacherCache.open(cache.path)


def test_other_rows_than_those_it_was_made_with_are_refused(cache):
    np.save(cache.path / "rows.npy", ROWS + 1)
    with pytest.raises(ArtifactError, match=r"rows\.npy holds other rows than"):
        TeacherCache.open(cache.path)
    with (cache.path / "rows.npy").open("wb") as file:
        np.save(file, np.array([None]), allow_pickle=True)
    with pytest.raises(ArtifactError, match=r"rows\.npy cannot be read .*Remove the folder"):
        TeacherCache.open(cache.path)


def damage_by_truncation(path):
    os.truncate(path, path.stat().st_size - 1)


def damage_by_dtype(path):
    np.save(path, np.zeros(np.load(path, mmap_mode="r").shape, np.float64))


def damage_by_pickle(path):
    array = np.empty(np.load(path, mmap_mode="r").shape, object)
    np.save(path, array, allow_pickle=True)


def damage_by_another_file(path):
    path.write_bytes(pickle.dumps({"no": "array"}))


def damage_by_shape(path):
    shape = np.load(path, mmap_mode="r").shape
    np.save(path, np.zeros((shape[0] - 1, *shape[1:]), np.load(path, mmap_mode="r").dtype))


def damage_by_absence(path):
    path.unlink()


@pytest.mark.parametrize("name", ["slot-000.npy", "filled-000.npy", "crc32c-000.npy"])
@pytest.mark.parametrize(
    "damage",
    [
        damage_by_truncation,
        damage_by_dtype,
        damage_by_pickle,
        damage_by_another_file,
        damage_by_shape,
        damage_by_absence,
    ],
)
def test_a_damaged_file_is_refused_by_name_and_with_the_cure(cache, name, damage):
    fill(cache)
    damage(cache.path / name)
    reopened = TeacherCache.open(cache.path)
    if damage is damage_by_absence and name == "filled-000.npy":
        # Without its bitmap a slot is an empty one, and is filled anew.
        assert not reopened.has(ROWS, 0).any()
        fill(reopened)
        assert list(reopened.check()) == []
        return
    with pytest.raises(
        ArtifactError, match=rf"{name} .*Remove slot-000\.npy, filled-000\.npy, crc"
    ):
        reopened.logits(ROWS[:1], 0)
    assert len(list(reopened.check())) == 1


def test_a_slot_that_shrinks_while_it_is_open_is_an_error_and_no_crash(cache):
    fill(cache)
    cache.logits(ROWS[:1], 0)
    damage_by_truncation(cache.path / "slot-000.npy")
    with pytest.raises(ArtifactError, match=r"slot-000\.npy shrank while it was open"):
        cache.logits(ROWS[-1:], 0)


def test_a_cache_that_is_removed_while_it_is_open_is_an_error_that_names_it(cache):
    fill(cache)
    cache.logits(ROWS[:3], 0)
    shutil.rmtree(cache.path)
    with pytest.raises(ArtifactError, match=r"slot-000\.npy was removed .* Put it back"):
        cache.logits(ROWS[:3], 0)
    assert cache.disk_bytes == 0
    cache.put(ROWS[:3], 1, logits_of(ROWS[:3], 1))
    with pytest.raises(ArtifactError, match=r"cannot write .*: the folder .* does not exist"):
        cache.commit()


def test_files_that_come_and_go_do_not_disturb_the_count_of_bytes(cache, monkeypatch):
    fill(cache)
    expected = cache.disk_bytes
    files = [*cache.path.iterdir(), cache.path / ".slot-001.npy.0a1b.tmp"]
    monkeypatch.setattr("pathlib.Path.iterdir", lambda _: iter(files))
    assert cache.disk_bytes == expected


@pytest.mark.parametrize("filled", [ROWS, ROWS[::3]])
def test_damaged_logits_are_refused_by_their_block(cache, filled):
    fill(cache, rows=filled)
    entry = int(np.searchsorted(ROWS, filled[-1]))
    data = np.load(cache.path / "slot-000.npy", mmap_mode="r+")
    data[entry, 3] += 1
    data.flush()
    reopened = TeacherCache.open(cache.path)
    reopened.logits(filled[:5], 0)  # of another block
    first = entry // 4096 * 4096
    with pytest.raises(
        ArtifactError, match=rf"entries {first:,} to 10,000 do not have the CRC-32C"
    ):
        reopened.logits(filled[-1:], 0)
    assert [fault for fault in reopened.check() if "is damaged" in fault] != []


def test_a_damaged_bitmap_is_found(cache):
    fill(cache, rows=ROWS[:100])
    filled = np.load(cache.path / "filled-000.npy", mmap_mode="r+")
    filled[7] = False
    filled.flush()
    assert "damaged" in next(iter(TeacherCache.open(cache.path).check()))


def test_a_block_that_gets_more_rows_is_summed_again(cache):
    for part in (ROWS[:100], ROWS[100:200]):
        fill(cache, rows=part)
        assert list(TeacherCache.open(cache.path).check()) == []
    assert np.array_equal(cache.logits(ROWS[:200], 0), logits_of(ROWS[:200], 0))


def test_a_block_is_not_called_damaged_while_it_is_not_summed(cache):
    fill(cache, rows=ROWS[:100])
    cache.put(ROWS[100:200], 0, logits_of(ROWS[100:200], 0))
    cache.commit()
    reopened = TeacherCache.open(cache.path)
    assert list(reopened.check()) == []
    assert np.array_equal(reopened.logits(ROWS[:200], 0), logits_of(ROWS[:200], 0))


def test_a_whole_cache_is_sealed_again_without_writing(cache):
    fill(cache)
    cache.commit(seal=True)
    before = {file: file.stat().st_mtime_ns for file in cache.path.iterdir()}
    TeacherCache.open(cache.path).commit(seal=True)
    assert {file: file.stat().st_mtime_ns for file in cache.path.iterdir()} == before


def test_verify_recomputes_entries_and_refuses_another_teacher(tmp_path):
    with make_cache(tmp_path / "cache") as cache:
        assert cache.verify(logits_of) == 0.0
        cache.put(ROWS[:50], 0, logits_of(ROWS[:50], 0))
        cache.put(ROWS[:50], 2, logits_of(ROWS[:50], 2))
        asked = []

        def teacher(rows, slot):
            asked.extend((int(row), slot) for row in rows)
            return logits_of(rows, slot) + 1e-4

        assert cache.verify(teacher, n=64) < 0.01
        assert len(set(asked)) == 64
        assert {slot for _, slot in asked} == {0, 2}
        with pytest.raises(ArtifactMismatch, match=r"is not of this teacher.*row \d+ in slot [02]"):
            cache.verify(lambda rows, slot: logits_of(rows, slot + 1))


def test_a_read_only_cache_is_read(cache):
    fill(cache)
    for file in [*cache.path.iterdir(), cache.path]:
        file.chmod(0o555 if file.is_dir() else 0o444)
    try:
        code = (
            "import mmap, os, sys; import numpy as np; from fastprune import TeacherCache\n"
            "os.getuid() or os.setuid(65534)\n"
            "cache = TeacherCache.open(sys.argv[1])\n"
            "assert not list(cache.check()); cache.logits(np.load(sys.argv[1] + '/rows.npy'), 0)\n"
            "try: cache.put([0], 1, np.zeros((1, 7))); cache.commit()\n"
            "except Exception as error: print(error)\n"
        )
        for parent in cache.path.parents[:4]:
            parent.chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-c", code, cache.path], capture_output=True, text=True, check=False
        )
        assert "cannot write" in done.stdout, done.stderr
        assert "Permission denied" in done.stdout
    finally:
        cache.path.chmod(0o755)


def test_a_copy_without_the_lock_file_is_read_and_filled(cache):
    fill(cache, rows=ROWS[:10])
    (cache.path / "lock").unlink()
    copy = TeacherCache.open(cache.path)
    np.testing.assert_array_equal(copy.logits(ROWS[:10], 0), cache.logits(ROWS[:10], 0))
    (cache.path / "lock").unlink(missing_ok=True)
    fill(copy, rows=ROWS[10:20])
    assert not list(copy.check())
    assert (cache.path / "lock").exists()


def test_a_full_disk_is_named_and_what_is_filled_stays(cache):
    fill(cache, rows=ROWS[:10])
    # A file size limit stands in for a full disk; it must not outlive this process.
    code = (
        "import resource, signal, sys; import numpy as np\n"
        "from tests.rows.cache_writer import ROWS, logits_of\n"
        "from fastprune import TeacherCache\n"
        "from fastprune.base.errors import ArtifactError\n"
        "cache = TeacherCache.open(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "for slot in (0, 1):\n"
        "    cache.put(ROWS[10:], slot, logits_of(ROWS[10:], slot))\n"
        "    try: cache.commit()\n"
        "    except ArtifactError as error: print(error)\n"
        "print(cache.has(ROWS, 0).sum(), cache.has(ROWS, 1).sum())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, cache.path], capture_output=True, text=True, check=True
    )
    in_place, at_creation, counts = done.stdout.splitlines()
    assert in_place.startswith(f"cannot write {cache.path}: File too large.")
    assert "free some space" in in_place
    assert "slot-001.npy: File too large" in at_creation
    assert counts == "10 0"
    assert list(TeacherCache.open(cache.path).check()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    try:
        is_mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    if not is_mounted:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_leaves_a_whole_cache_that_is_filled_later(small_disk):
    with make_cache(small_disk / "cache", num_classes=100, dtype="float32") as cache:
        put = 0
        with pytest.raises(ArtifactError, match="No space left on device"):
            for part in np.array_split(ROWS, 100):
                cache.put(part, 0, np.ones((len(part), 100)))
                cache.commit()
                put += len(part)
        assert cache.has(ROWS, 0).sum() == put > 0
        cache.commit(seal=True)
        assert np.array_equal(cache.logits(ROWS[:put], 0), np.ones((put, 100)))
    assert list(TeacherCache.open(small_disk / "cache").check()) == []
    subprocess.run(["mount", "-o", "remount,size=9m", small_disk], check=True)
    with TeacherCache.open(small_disk / "cache") as cache:
        rest = cache.missing(0)
        cache.put(rest, 0, np.ones((len(rest), 100)))
    assert len(TeacherCache.open(small_disk / "cache").missing(0)) == 0


def test_threads_of_one_process_put_and_read_at_once(cache):
    failures = []

    def fill_part(part):
        try:
            for chunk in np.array_split(part, 20):
                seen = cache.put(chunk, 0, logits_of(chunk, 0))
                assert np.array_equal(cache.logits(chunk, 0), seen)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=fill_part, args=(ROWS[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    cache.commit(seal=True)
    assert list(TeacherCache.open(cache.path).check()) == []


def test_logits_that_cannot_be_had_raise_in_the_caller_who_is_not_left_waiting(cache):
    def broken():
        raise RuntimeError("the device was lost")

    with CacheFiller(cache) as filler:
        for _ in range(20):  # more than wait in the queue
            with suppress(RuntimeError):
                filler.put(ROWS[:4], 0, broken)
        with pytest.raises(RuntimeError, match="the device was lost"):
            filler.flush()
    assert not cache.has(ROWS[:4], 0).any()


def test_closing_writes_what_was_put_and_leaves_no_descriptors(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    with make_cache(tmp_path / "cache") as cache:
        cache.put(ROWS, 0, logits_of(ROWS, 0))
        cache.logits(ROWS, 0)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert TeacherCache.open(tmp_path / "cache").has(ROWS, 0).all()


def test_empty_slots_take_no_room_on_the_disk(tmp_path):
    with make_cache(tmp_path / "cache", num_classes=1000) as cache:
        cache.put(ROWS[:1], 0, np.zeros((1, 1000)))
    apparent = (cache.path / "slot-000.npy").stat().st_size
    assert apparent > 20_000_000
    assert cache.disk_bytes < 500_000
    assert resource.getpagesize() < cache.disk_bytes


def test_summary_tells_what_is_there(tmp_path):
    with make_cache(tmp_path / "cache", identity=IDENTITY) as cache:
        fill(cache, 1)
        fill(cache, 0, ROWS[:4])
        summary = cache.summary()
    assert summary["filled"] == [4, len(ROWS), 0]
    assert summary["whole_slots"] == 1
    assert summary["identity"] == IDENTITY
    assert json.loads(json.dumps(summary)) == summary


def test_blocks_are_of_the_documented_size():
    assert store.BLOCK_ROWS == 4096
