"""The writer's promises: the same bytes however it was run, and never half a beton."""

import errno
import itertools
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastprune import check_beton, convert, open_beton
from fastprune.base.errors import ArtifactError, ConversionError, InvalidValueError
from fastprune.beton import layout
from fastprune.beton.convert.folders import FolderSource
from fastprune.beton.convert.journal import Journal
from fastprune.beton.manifest import manifest_path, replace_pair
from fastprune.beton.output import PageCursor
from fastprune.jpeg.rewrite import to_restart_rows
from tests.images import jpeg_bytes, picture, write_image_folder

MIB = 1 << 20


def contents(folder, name="a.beton"):
    """The beton and its manifest, as bytes."""
    return (folder / name).read_bytes(), (folder / f"{name}.manifest.parquet").read_bytes()


def files_in(folder):
    """Name -> bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def many_images(root, count):
    """A folder of small images: enough chunks to be interrupted in between."""
    folder = root / "only"
    folder.mkdir(parents=True)
    distinct = [jpeg_bytes(seed, width=8 + seed, height=8) for seed in range(16)]
    for number in range(count):
        (folder / f"{number:05d}.jpg").write_bytes(distinct[number % 16])
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return many_images(tmp_path_factory.mktemp("source") / "images", 1500)


@pytest.fixture(scope="module")
def expected(images, tmp_path_factory):
    """What an uninterrupted conversion writes."""
    folder = tmp_path_factory.mktemp("expected")
    convert(images, folder / "a.beton", workers=1)
    return contents(folder)


# Layout


def test_images_are_aligned_inside_pages_behind_the_metadata(images, tmp_path):
    convert(images, tmp_path / "a.beton")
    beton = open_beton(tmp_path / "a.beton")
    assert (beton.offsets % layout.ALIGNMENT == 0).all()
    ends = beton.offsets + beton.sizes - 1
    assert (beton.offsets // beton.page_bytes == ends // beton.page_bytes).all()
    assert beton.offsets[0] == beton.page_bytes == layout.DEFAULT_PAGE_BYTES
    header = np.frombuffer(beton.content, layout.HEADER, 1)[0]
    assert header["alloc_table_ptr"] % beton.page_bytes == 0
    assert header["alloc_table_ptr"] + 24 * beton.num_rows == len(beton.content)


def test_gaps_between_images_are_zeros(tmp_path):
    root = write_image_folder(tmp_path / "images")
    convert(root, tmp_path / "a.beton")
    beton = open_beton(tmp_path / "a.beton")
    for row in range(beton.num_rows - 1):
        end = beton.offsets[row] + beton.sizes[row]
        assert not beton.content[end : beton.offsets[row + 1]].any()


@settings(deadline=None)
@given(st.lists(st.integers(1, 5 * MIB), max_size=60))
def test_no_place_crosses_a_page_however_the_page_grew(sizes):
    cursor = PageCursor(2 * MIB, 2 * MIB)
    starts = [cursor.place(size) for size in sizes]
    end = 2 * MIB
    for start, size in zip(starts, sizes, strict=True):
        assert start % layout.ALIGNMENT == 0
        assert start >= end
        end = start + size
        assert start // cursor.page_bytes == (end - 1) // cursor.page_bytes
    assert cursor.page_bytes == max(2 * MIB, 1 << (max(sizes, default=1) - 1).bit_length())


def test_an_image_larger_than_any_page_is_refused():
    with pytest.raises(ConversionError, match=r"image of 3,000,000,000 bytes.*--max-side"):
        PageCursor(0, 2 * MIB).place(3_000_000_000)


def test_the_page_grows_with_the_largest_image(tmp_path):
    root = write_image_folder(tmp_path / "images", classes=1)
    noise = np.random.default_rng(0).integers(0, 256, (3000, 3000, 3), dtype=np.uint8)
    picture_path = root / "class_00" / "big.jpg"
    Image.fromarray(noise).save(picture_path, quality=95, subsampling=0)
    assert picture_path.stat().st_size > layout.DEFAULT_PAGE_BYTES
    convert(root, tmp_path / "a.beton", jpeg="original")
    beton = open_beton(tmp_path / "a.beton")
    assert beton.page_bytes == 1 << (picture_path.stat().st_size - 1).bit_length()
    assert beton.image_bytes(4).tobytes() == picture_path.read_bytes()
    assert check_beton(tmp_path / "a.beton") == []


# The same bytes, however it was run


@pytest.mark.parametrize("workers", [2, 5])
def test_the_number_of_workers_changes_no_byte(images, expected, tmp_path, workers):
    convert(images, tmp_path / "a.beton", workers=workers)
    assert contents(tmp_path) == expected


def test_mixed_images_give_the_same_bytes_with_any_number_of_workers(tmp_path):
    root = write_image_folder(tmp_path / "images", per_class=40)
    for number in range(0, 40, 7):
        picture(number, mode="CMYK").save(root / "class_01" / f"cmyk{number}.jpg")
        (root / "class_01" / f"bad{number}.jpg").write_bytes(b"bad")
    for workers in (1, 2, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        convert(root, folder / "a.beton", workers=workers, on_error="skip")
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_an_older_beton_is_replaced(images, expected, tmp_path):
    convert(write_image_folder(tmp_path / "others"), tmp_path / "a.beton")
    convert(images, tmp_path / "a.beton")
    assert contents(tmp_path) == expected


def test_shuffled_rows_are_mapped_in_the_manifest(tmp_path):
    root = write_image_folder(tmp_path / "images", classes=4)
    plain = convert(root, tmp_path / "plain.beton")
    manifest = convert(root, tmp_path / "a.beton", shuffle_seed=7)
    beton, table = open_beton(tmp_path / "a.beton"), manifest.table()
    indices = table["source_index"].to_pylist()
    assert sorted(indices) == list(range(16))
    assert indices != list(range(16))
    names = plain.table()["source"].to_pylist()
    for row, index in enumerate(indices):
        assert table["source"][row].as_py() == names[index]
        assert beton.image_bytes(row).tobytes() == (root / names[index]).read_bytes()
        assert beton.labels[row] == index // 4
    again = convert(root, tmp_path / "b.beton", shuffle_seed=7)
    assert again.table()["source_index"].to_pylist() == indices


def test_the_manifest_holds_what_was_done(tmp_path):
    root = write_image_folder(tmp_path / "images")
    manifest = convert(root, tmp_path / "a.beton", quality=80)
    assert manifest.class_names == ("class_00", "class_01", "class_02")
    assert manifest.counts == {"copied": 12, "rewritten": 0, "transcoded": 0, "skipped": 0}
    assert manifest.settings["quality"] == 80
    line = manifest.table().to_pylist()[5]
    assert line["source"] == "class_01/001.jpg"
    assert (line["row"], line["label"], line["class_name"]) == (5, 1, "class_01")
    assert line["source_crc32c"] == line["stored_crc32c"]
    beton = open_beton(tmp_path / "a.beton")
    assert beton.fingerprint == manifest.fingerprint
    assert beton.class_names == manifest.class_names


def test_the_fingerprint_tells_images_of_equal_sizes_apart(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        folder = tmp_path / name / "only"
        folder.mkdir(parents=True)
        (folder / "x.jpg").write_bytes(jpeg_bytes(seed))
    first = convert(tmp_path / "a", tmp_path / "a.beton").fingerprint
    second = convert(tmp_path / "b", tmp_path / "b.beton").fingerprint
    assert first.structure == second.structure
    assert first.content != second.content


# Interrupted and resumed


def killed(images, folder, delay, **kwargs):
    """Run a conversion in a process of its own and kill it with SIGKILL after a while."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=convert, args=(images, folder / "a.beton"), kwargs=kwargs)
    process.start()
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_killed_at_any_moment_leaves_no_bad_beton_and_resumes_to_the_same_bytes(
    images, expected, tmp_path
):
    start = time.monotonic()
    (tmp_path / "timing").mkdir()
    convert(images, tmp_path / "timing" / "a.beton", workers=2)
    whole_seconds = time.monotonic() - start
    generator = np.random.default_rng(0)
    # Early moments too, for a machine that was slow while this was timed.
    early, any_moment = np.geomspace(0.01, whole_seconds, 12), generator.uniform(0, 1.2, 12)
    delays = generator.permutation(np.concatenate([early, any_moment * whole_seconds]))
    resumed = 0
    for number, delay in enumerate(delays):
        if number % 6 == 0:  # four conversions, each killed six times
            folder = tmp_path / str(number)
            folder.mkdir()
        killed(images, folder, delay, workers=2, resume=True)
        if (folder / "a.beton").exists():
            assert check_beton(folder / "a.beton", deep=True) == []
            assert contents(folder) == expected
        else:
            resumed += 1
        if number % 6 == 5:
            convert(images, folder / "a.beton", workers=2, resume=True)
            assert contents(folder) == expected
            names = sorted(path.name for path in folder.iterdir())
            assert names == ["a.beton", "a.beton.manifest.parquet"]
    assert resumed > 0


def partial_after_failure(tmp_path, *, count=900, **settings):
    """A kept partial file: the last image of the source is bad, and is repaired afterwards."""
    root = many_images(tmp_path / "images", count)
    last = sorted((root / "only").iterdir())[-1]
    good = last.read_bytes()
    status = last.stat()
    last.write_bytes(bytes(len(good)))
    os.utime(last, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ConversionError, match=last.name):
        convert(root, tmp_path / "a.beton", workers=1, keep_partial=True, **settings)
    last.write_bytes(good)
    os.utime(last, ns=(status.st_atime_ns, status.st_mtime_ns))
    return root


@pytest.mark.parametrize("jpeg", ["original", "fast"])
def test_a_kept_partial_file_is_taken_up_and_not_made_again(tmp_path, jpeg):
    root = partial_after_failure(tmp_path, jpeg=jpeg)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"images", "a.beton.partial", "a.beton.partial.journal"}
    # Take the first image's bytes away behind the writer's back: a resumed run does not miss it.
    first = root / "only" / "00000.jpg"
    status, good = first.stat(), first.read_bytes()
    first.write_bytes(bytes(len(good)))
    os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns))
    convert(root, tmp_path / "a.beton", resume=True, jpeg=jpeg)
    stored = open_beton(tmp_path / "a.beton").image_bytes(0).tobytes()
    assert stored == (good if jpeg == "original" else to_restart_rows(good))
    assert {path.name for path in tmp_path.iterdir()} == {
        "images",
        "a.beton",
        "a.beton.manifest.parquet",
    }


def test_damage_in_a_partial_file_is_found_and_written_again(tmp_path):
    root = partial_after_failure(tmp_path)
    whole = tmp_path / "whole"
    whole.mkdir()
    convert(root, whole / "a.beton")
    with (tmp_path / "a.beton.partial").open("r+b") as file:
        file.seek(layout.DEFAULT_PAGE_BYTES + 100 * layout.ALIGNMENT)
        file.write(b"\xff" * 4096)
        file.seek(0)
        file.write(b"\xff" * 4096)
    convert(root, tmp_path / "a.beton", resume=True)
    assert contents(tmp_path) == contents(whole)


def test_a_journal_whose_last_line_was_cut_is_taken_up(tmp_path):
    root = partial_after_failure(tmp_path)
    journal_path = tmp_path / "a.beton.partial.journal"
    journal_path.write_bytes(journal_path.read_bytes()[:-30])
    convert(root, tmp_path / "a.beton", resume=True)
    assert check_beton(tmp_path / "a.beton", deep=True) == []


def test_resume_without_a_partial_file_starts_from_nothing(images, expected, tmp_path):
    convert(images, tmp_path / "a.beton", resume=True)
    assert contents(tmp_path) == expected


def test_resume_with_other_settings_is_refused_and_the_partial_file_kept(tmp_path):
    root = partial_after_failure(tmp_path, count=200)
    with pytest.raises(
        ConversionError, match=r"settings were .*95.* now are .*80.*without --resume"
    ):
        convert(root, tmp_path / "a.beton", resume=True, quality=80)
    assert (tmp_path / "a.beton.partial").exists()


def test_resume_with_other_images_is_refused(tmp_path):
    root = partial_after_failure(tmp_path, count=200)
    (root / "only" / "new.jpg").write_bytes(jpeg_bytes(0))
    with pytest.raises(ConversionError, match=r"its images were .* and now are"):
        convert(root, tmp_path / "a.beton", resume=True)


@pytest.mark.parametrize(
    "text",
    ["hello\n", "{}\n[[], []]\n", "{}\n[[[1, 1, 0, 0, 0, 8, 8, 999]], {}]\n"],
    ids=["no JSON", "reasons of another shape", "a number out of range"],
)
def test_resume_with_a_file_that_is_not_a_journal_is_refused(images, tmp_path, text):
    (tmp_path / "a.beton.partial").write_bytes(b"x")
    (tmp_path / "a.beton.partial.journal").write_text(text)
    with pytest.raises(ConversionError, match=r"is not a journal.*Remove it"):
        convert(images, tmp_path / "a.beton", resume=True)


def test_starting_over_a_partial_file_gives_the_whole_beton(images, expected, tmp_path):
    killed(images, tmp_path, 0.05)
    convert(images, tmp_path / "a.beton")
    assert contents(tmp_path) == expected


def test_two_conversions_to_one_beton_do_not_mix(images, tmp_path):
    held = Journal(tmp_path / "a.beton.partial.journal")
    with held, pytest.raises(ConversionError, match=r"another conversion is writing .*a\.beton"):
        convert(images, tmp_path / "a.beton")


# Failures


def leaves_nothing(folder):
    return [path.name for path in folder.iterdir() if path.name != "images"] == []


def limited(images, folder, limit_bytes, queue):
    """Convert under a limit of the file size, as a full disk would stop it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    try:
        convert(images, folder / "a.beton", workers=2)
    except (ConversionError, ArtifactError) as error:
        queue.put(str(error))


@pytest.mark.parametrize(
    "limit_bytes",
    [50, 4 * MIB, layout.DEFAULT_PAGE_BYTES + 300_000, 2 * layout.DEFAULT_PAGE_BYTES + 9_000],
    ids=["journal", "first page", "images", "allocation table"],
)
def test_a_full_disk_ends_it_at_once_with_nothing_left(images, tmp_path, limit_bytes):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=limited, args=(images, tmp_path, limit_bytes, queue))
    process.start()
    message = queue.get(timeout=20)
    process.join()
    assert "cannot write" in message
    assert "a.beton" in message
    assert "File too large. Free some space" in message
    assert leaves_nothing(tmp_path)


class Misbehaving:
    """A dataset with one sample that does something terrible."""

    def __init__(self, act, *, count=200, at=150):
        self.act, self.count, self.at = act, count, at

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == self.at:
            self.act()
        return jpeg_bytes(0, width=8, height=8), 0


@pytest.mark.parametrize(
    "act",
    [lambda: signal.raise_signal(signal.SIGSEGV), lambda: os._exit(3)],
    ids=["crash", "exit"],
)
def test_a_crash_names_its_image_when_the_conversion_is_resumed(tmp_path, caplog, act):
    context = multiprocessing.get_context("fork")
    arguments = (Misbehaving(act), tmp_path / "a.beton")
    process = context.Process(target=convert, args=arguments, kwargs={"workers": 2})
    process.start()
    process.join()
    assert process.exitcode != 0
    assert not (tmp_path / "a.beton").exists()
    convert(Misbehaving(lambda: None), tmp_path / "a.beton", resume=True)
    assert re.search(r"crashed while it was working on .*Misbehaving/150\b.* remove", caplog.text)
    assert open_beton(tmp_path / "a.beton").num_rows == 200
    assert {path.name for path in tmp_path.iterdir()} == {"a.beton", "a.beton.manifest.parquet"}


def test_a_dataset_that_ends_its_thread_ends_it(tmp_path):
    with pytest.raises(ConversionError, match=r"Misbehaving/150: .*SystemExit\(3\)"):
        convert(Misbehaving(lambda: sys.exit(3)), tmp_path / "a.beton", workers=2)
    assert leaves_nothing(tmp_path)


def test_an_exception_in_a_dataset_ends_it_with_its_text(tmp_path):
    def act():
        raise RuntimeError("no such thing")

    with pytest.raises(
        ConversionError, match=r"Misbehaving/150: .*RuntimeError\('no such thing'\)"
    ):
        convert(Misbehaving(act), tmp_path / "a.beton", workers=2)


def test_a_file_that_vanishes_midway_ends_it_by_name(tmp_path, monkeypatch):
    root = many_images(tmp_path / "images", 300)
    listed = FolderSource.list_images

    def list_and_lose(source):
        listing = listed(source)
        (root / "only" / "00250.jpg").unlink()
        return listing

    monkeypatch.setattr(FolderSource, "list_images", list_and_lose)
    with pytest.raises(ConversionError, match=r"only/00250\.jpg: it cannot be read: No such file"):
        convert(root, tmp_path / "a.beton", workers=2)
    assert leaves_nothing(tmp_path)


def test_an_unreadable_file_is_named(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    root = write_image_folder(tmp_path / "images")
    (root / "class_00" / "000.jpg").chmod(0)
    with pytest.raises(ConversionError, match=r"000\.jpg: it cannot be read: Permission denied"):
        convert(root, tmp_path / "a.beton")


def test_an_interrupt_leaves_nothing(images, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(images, tmp_path / "a.beton")
    assert leaves_nothing(tmp_path)


def test_threads_that_cannot_all_be_started_leave_nothing_behind(images, tmp_path, monkeypatch):
    start, started = threading.Thread.start, []

    def start_three(thread):
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_three)
    with pytest.raises(ConversionError, match=r"only 3 of 200 threads .*ulimit -u"):
        convert(images, tmp_path / "a.beton", workers=200)
    assert not any(thread.is_alive() for thread in started)
    assert leaves_nothing(tmp_path)


@pytest.fixture
def pair(tmp_path):
    """A beton and its manifest in a folder of their own, and other images to replace them by."""
    folder = tmp_path / "betons"
    folder.mkdir()
    convert(write_image_folder(tmp_path / "old"), folder / "a.beton")
    return folder / "a.beton", write_image_folder(tmp_path / "new", classes=2)


def test_older_pair_comes_back_when_the_new_one_cannot_get_its_name(pair, monkeypatch):
    path, images = pair
    before = files_in(path.parent)
    replace = Path.replace

    def refuse_the_beton(self, target):
        if target == path and self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse_the_beton)
    with pytest.raises(ConversionError, match=r"a\.beton.*Input/output.*kept in .*--resume"):
        convert(images, path)
    after = files_in(path.parent)
    assert {name: after[name] for name in before} == before
    monkeypatch.undo()
    assert convert(images, path, resume=True).fingerprint.num_rows == 8
    assert check_beton(path, deep=True) == []
    assert sorted(files_in(path.parent)) == sorted(before)


def test_interrupt_between_the_renames_loses_neither_beton(pair, monkeypatch):
    path, images = pair
    before = files_in(path.parent)
    replace = Path.replace

    def interrupted_behind_the_manifest(self, target):
        replace(self, target)
        if self.name.startswith("a.beton.partial.manifest"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted_behind_the_manifest)
    with pytest.raises(KeyboardInterrupt):
        convert(images, path)
    monkeypatch.undo()
    after = files_in(path.parent)
    assert {name: after[name] for name in before} == before
    assert "a.beton.partial" in after
    assert convert(images, path, resume=True).fingerprint.num_rows == 8


def test_folder_under_the_manifests_name_loses_neither_beton(pair):
    path, images = pair
    manifest_path(path).unlink()
    manifest_path(path).mkdir()
    old = path.read_bytes()
    with pytest.raises(ConversionError, match=r"manifest\.parquet: Is a directory.*--resume"):
        convert(images, path)
    assert path.read_bytes() == old
    assert path.with_name("a.beton.partial").exists()


def write_pair(path, content):
    path.write_bytes(content)
    manifest_path(path).write_bytes(content)


def replace_pair_and_be_killed(folder, content, at_step):
    """Give a new pair its names in a process of its own, killed before a rename or removal."""
    write_pair(folder / "new", content)

    def run():
        steps = itertools.count()

        def mortal(real):
            def step(*args, **kwargs):
                if next(steps) == at_step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return step

        Path.replace, Path.unlink = mortal(Path.replace), mortal(Path.unlink)
        replace_pair(folder / "new", manifest_path(folder / "new"), folder / "a.beton")

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)


@pytest.mark.parametrize("at_steps", list(itertools.product(range(9), repeat=2)))
def test_killed_twice_between_renames_keeps_a_whole_pair_and_leaves_nothing_at_last(
    tmp_path, at_steps
):
    path = tmp_path / "a.beton"
    write_pair(path, b"first")
    for content, at_step in zip((b"second", b"third"), at_steps, strict=True):
        replace_pair_and_be_killed(tmp_path, content, at_step)
        found = files_in(tmp_path)
        named = [name for name in found if name.endswith(("a.beton", ".replaced"))]
        assert any(found.get(f"{name}.manifest.parquet") == found[name] for name in named) or (
            # The beton was set aside and its manifest not yet.
            found["a.beton.manifest.parquet"] == found["a.beton.replaced"]
        )
        if path.exists():
            assert found["a.beton.manifest.parquet"] == found["a.beton"]
    write_pair(tmp_path / "new", b"fourth")
    replace_pair(tmp_path / "new", manifest_path(tmp_path / "new"), path)
    assert files_in(tmp_path) == {"a.beton": b"fourth", "a.beton.manifest.parquet": b"fourth"}


def test_older_copies_of_a_betons_owner_stay(pair):
    path, images = pair
    path.with_name("a.beton.old").write_bytes(b"kept by its owner")
    convert(images, path)
    assert path.with_name("a.beton.old").read_bytes() == b"kept by its owner"


def test_fifo_is_not_replaced_by_a_beton(images, tmp_path):
    os.mkfifo(tmp_path / "a.beton")
    with pytest.raises(ConversionError, match=r"cannot write .*a\.beton: it is a FIFO"):
        convert(images, tmp_path / "a.beton")
    assert [path.name for path in tmp_path.iterdir()] == ["a.beton"]


def test_link_to_another_folder_is_followed(images, expected, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.beton").symlink_to(tmp_path / "disk" / "big.beton")
    convert(images, tmp_path / "a.beton")
    assert (tmp_path / "a.beton").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == [
        "big.beton",
        "big.beton.manifest.parquet",
    ]
    assert open_beton(tmp_path / "a.beton").fingerprint.content is not None


def test_a_failure_leaves_an_older_beton_untouched(tmp_path):
    convert(write_image_folder(tmp_path / "images"), tmp_path / "a.beton")
    before = contents(tmp_path)
    (tmp_path / "images" / "class_02" / "999.jpg").write_bytes(b"bad")
    with pytest.raises(ConversionError):
        convert(tmp_path / "images", tmp_path / "a.beton")
    assert contents(tmp_path) == before


def test_a_folder_that_does_not_exist_is_named(images, tmp_path):
    with pytest.raises(ConversionError, match=r"nowhere.*No such file.*Name a folder that exists"):
        convert(images, tmp_path / "nowhere" / "a.beton")


def test_a_folder_in_the_betons_place_is_named(images, tmp_path):
    with pytest.raises(ConversionError, match=r"is a folder. Name a file, such as .*train\.beton"):
        convert(images, tmp_path)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"jpeg": "best"}, "jpeg must be one of 'auto', 'fast', 'original', not 'best'"),
        ({"exif": "turn"}, "exif must be one of 'ignore', 'apply', not 'turn'"),
        ({"quality": 0}, "quality must be an integer from 1 to 100, not 0"),
        ({"max_side": 70_000}, "max_side must be an integer from 1 to 65,500, not 70000"),
        ({"workers": 0}, "workers must be an integer from 1 to 1,024, not 0"),
        ({"workers": 100_000}, "workers must be an integer from 1 to 1,024, not 100000"),
        ({"shuffle_seed": -1}, "shuffle_seed must be an integer >= 0, not -1"),
        ({"on_error": "ignore"}, "on_error must be one of 'stop', 'skip', not 'ignore'"),
    ],
)
def test_a_setting_outside_its_domain_is_named(tmp_path, setting, match):
    with pytest.raises(InvalidValueError, match=match):
        convert(tmp_path, tmp_path / "a.beton", **setting)


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        (MemoryError(), r"memory ran out\. Use fewer workers with --workers"),
        (OSError(errno.EMFILE, "Too many open files"), r"Too many open files\. .*`ulimit -n`"),
        (OSError(errno.ENOSPC, "No space left"), r"No space left on device\. Free some space"),
    ],
)
def test_a_fault_of_the_machine_ends_it_though_bad_images_are_skipped(tmp_path, fault, cure):
    def act():
        raise fault

    with pytest.raises(ConversionError, match=cure):
        convert(Misbehaving(act), tmp_path / "a.beton", workers=1, on_error="skip")
    assert leaves_nothing(tmp_path)
