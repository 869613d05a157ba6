"""Staging fetches the rows of a subset, each once, and never leaves wrong bytes behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastprune import Subset, check_beton, compact, convert, open_beton
from fastprune.base.errors import (
    ArtifactError,
    ArtifactMismatch,
    BetonError,
    InvalidValueError,
    StorageError,
)
from fastprune.beton.opening import MIRROR_NAME
from fastprune.beton.remote.mirror import MARKS_NAME
from fastprune.beton.remote.opening import open_mirrored
from fastprune.beton.remote.plan import MOST_BYTES
from fastprune.beton.remote.stage import stage
from fastprune.beton.shards import SET_NAME, shard_name
from tests.beton.remote.s3_server import SECRET
from tests.images import jpeg_bytes, write_image_folder

ROWS = np.array([0, 3, 6, 7, 8, 19])
URL = "s3://bucket/train/"
ALWAYS = (1, 3, 8, 11, 13)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A folder with a sharded beton and a single one, as a bucket holds them."""
    root = tmp_path_factory.mktemp("store")
    images = write_image_folder(root / "images", classes=5)
    (root / "bucket").mkdir()
    convert(images, root / "bucket" / "train", shards=3)
    convert(images, root / "bucket" / "train.beton")
    return root / "bucket"


@pytest.fixture
def copied(bucket, tmp_path):
    """The sharded beton, to be damaged."""
    return shutil.copytree(bucket / "train", tmp_path / "store" / "train")


def require_rows(mirror, bucket, rows):
    """The mirror holds these rows, bit by bit, and no others."""
    here, there = open_beton(mirror), open_beton(bucket / "train")
    assert np.flatnonzero(here.present).tolist() == list(rows)
    for row in rows:
        assert np.array_equal(here.image_bytes(row), there.image_bytes(row))
    assert here.fingerprint == there.fingerprint
    assert check_beton(mirror, deep=True) == []


def row_ranges(server):
    """The byte ranges of pages that were asked for, of each shard."""
    ranges = []
    for method, key, asked in server.requests:
        if method == "GET" and key.endswith(".beton"):
            start, end = map(int, asked.removeprefix("bytes=").split("-"))
            if 1 << 23 <= start < 1 << 24:  # behind the tables, before the allocations
                ranges.append((key, start, end + 1))
    return ranges


@pytest.mark.parametrize("name", ["train/", "train.beton"])
def test_rows_of_a_subset_are_fetched_and_no_others(bucket, tmp_path, name):
    staged = stage(f"file://{bucket}/{name}", ROWS, tmp_path / "mirror")
    assert (staged.num_rows, staged.num_fetched_rows) == (6, 6)
    beton = tmp_path / "mirror" / ("" if name == "train/" else name)
    require_rows(beton, bucket, ROWS)
    stored = sum(path.stat().st_blocks for path in beton.parent.rglob("*.beton")) * 512
    assert stored < 1 << 20, "the files are sparse"


def test_rows_that_are_there_are_not_fetched_again(server, bucket, tmp_path):
    stage(URL, ROWS, tmp_path / "mirror")
    server.requests.clear()
    assert stage(URL, ROWS, tmp_path / "mirror").fetched_bytes == 0
    assert server.requests == [], "a whole mirror asks nothing of the server"
    staged = stage(URL, np.array([0, 5]), tmp_path / "mirror")
    assert (staged.num_rows, staged.num_fetched_rows, staged.num_requests) == (2, 1, 1)
    require_rows(tmp_path / "mirror", bucket, [0, 3, 5, 6, 7, 8, 19])


def test_bytes_at_the_server_are_those_of_the_rows_and_tables(server, tmp_path):
    images = [jpeg_bytes(seed, width=700, height=500) for seed in range(5)]
    folder = server.root / "bucket" / "large"
    convert([(image, 0) for image in images * 8], folder, shards=2, jpeg="original")
    beton = open_beton(folder)
    rows = np.flatnonzero(np.random.default_rng(0).random(40) < 0.5)
    stage("s3://bucket/large", rows, tmp_path / "mirror")
    small = sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".beton")
    tables = 2 * (24 + 2 * 1041) + 40 * 48
    wanted = int(beton.sizes[rows].sum()) + small + tables
    # 16 KiB of each file's start are asked for, however few rows there are.
    assert wanted <= server.sent_bytes <= 1.02 * wanted + 2 * (16 << 10)
    assert len(row_ranges(server)) < len(rows), "neighbors come together"


def test_subset_of_other_images_is_refused(bucket, tmp_path):
    convert([(jpeg_bytes(1), 0)] * 3, tmp_path / "other.beton")
    other = open_beton(tmp_path / "other.beton").fingerprint
    Subset(np.array([1]), fingerprint=other).save(tmp_path / "subset.npy")
    with pytest.raises(ArtifactMismatch, match=r"subset\.npy was made from beton"):
        stage(f"file://{bucket}/train", tmp_path / "subset.npy", tmp_path / "mirror")


@pytest.mark.parametrize("fault", ["503", "cut", "wrong range", "slow"])
def test_faults_of_some_requests_do_no_harm(server, bucket, tmp_path, fault):
    server.fault = lambda method, key, number: fault if number % 3 == 0 else None
    stage(URL, ROWS, tmp_path / "mirror", retry_seconds=20)
    require_rows(tmp_path / "mirror", bucket, ROWS)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("503", "SLOW_DOWN|SERVICE_UNAVAILABLE"),
        ("cut", "NETWORK_CONNECTION"),
        ("wrong range", r"row \d+ are others \(CRC"),
    ],
)
def test_faults_of_all_requests_end_in_a_named_error(server, tmp_path, fault, reason):
    stage(URL, np.array([0]), tmp_path / "mirror")
    server.fault = lambda method, key, number: fault if method == "GET" else None
    with pytest.raises(StorageError, match=rf"train/shard-0000.\.beton could not be .*({reason})"):
        stage(URL, ROWS, tmp_path / "mirror", retry_seconds=0.5)
    server.fault = lambda *_: None
    stage(URL, ROWS, tmp_path / "mirror")
    assert check_beton(tmp_path / "mirror", deep=True) == []


def test_denied_access_is_named_without_the_credentials(server, tmp_path):
    server.denied = True
    with pytest.raises(StorageError, match=r"access to s3://bucket/train/manifest\.json was") as e:
        stage(URL, ROWS, tmp_path / "mirror")
    assert SECRET not in str(e.value)
    assert len(server.requests) == 1, "no attempt mends it"


def test_missing_object_is_named(copied, tmp_path):
    (copied / shard_name(1)).unlink()
    with pytest.raises(StorageError, match=r"shard-00001\.beton does not exist\. Compare the URL"):
        stage(f"file://{copied}", ROWS, tmp_path / "mirror")


def test_missing_object_of_a_bucket_is_named(server, tmp_path):
    with pytest.raises(StorageError, match=r"s3://bucket/nowhere/manifest\.json does not exist"):
        stage("s3://bucket/nowhere/", ROWS, tmp_path / "mirror")


def test_object_that_changed_is_refused(server, bucket, tmp_path):
    stage(URL, ROWS, tmp_path / "mirror")
    server.etags["bucket/train/shard-00001.beton"] = '"another"'
    with pytest.raises(StorageError, match=r'shard-00001\.beton changed since .* is "another"'):
        stage(URL, np.array([9]), tmp_path / "mirror")
    require_rows(tmp_path / "mirror", bucket, ROWS)


def test_object_that_changes_while_it_is_read_is_refused(server, tmp_path):
    beton = open_mirrored(URL, tmp_path / "mirror", retry_seconds=20)
    server.fault = lambda method, key, number: "wrong range" if method == "GET" else None
    server.etags["bucket/train/shard-00000.beton"] = '"another"'
    with pytest.raises(StorageError, match=r'shard-00000\.beton changed since .* is "another"'):
        list(beton.arriving([np.array([0, 1])]))
    assert len(beton.absent(np.arange(20))) == 20


def test_url_with_credentials_is_refused_without_showing_them(tmp_path):
    with pytest.raises(InvalidValueError, match="by the environment") as error:
        stage(f"s3://someone:{SECRET}@bucket/train", ROWS, tmp_path / "mirror")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("url", ["ftp://bucket/train", "s3://", "file://train", "train.beton"])
def test_what_is_no_url_is_refused(tmp_path, url):
    with pytest.raises(InvalidValueError, match=r"s3://bucket/|three slashes"):
        stage(url, ROWS, tmp_path / "mirror")


@pytest.mark.parametrize("name", ["../evil.beton", "/tmp/evil.beton", "mirror.json", "a.beton"])
def test_names_in_a_bucket_cannot_leave_the_mirror(copied, tmp_path, name):
    record = json.loads((copied / SET_NAME).read_text())
    record["shards"][0]["file"] = name
    (copied / SET_NAME).write_text(json.dumps(record))
    with pytest.raises(BetonError, match="which is not a shard's name"):
        stage(f"file://{copied}", ROWS, tmp_path / "inner" / "mirror")
    assert [path.name for path in (tmp_path / "inner").iterdir()] == ["mirror"]


def test_folder_with_something_else_is_refused(bucket, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds files, but not a mirror"):
        stage(f"file://{bucket}/train", ROWS, tmp_path)


def test_mirror_of_another_url_is_refused(bucket, tmp_path):
    stage(f"file://{bucket}/train", ROWS, tmp_path / "mirror")
    with pytest.raises(ArtifactError, match=r"is a mirror of file://.*/train, not of file://.*\.b"):
        stage(f"file://{bucket}/train.beton", ROWS, tmp_path / "mirror")


@pytest.mark.parametrize("name", [MARKS_NAME, MIRROR_NAME])
def test_damaged_state_of_a_mirror_is_named(bucket, tmp_path, name):
    stage(f"file://{bucket}/train", ROWS, tmp_path / "mirror")
    (tmp_path / "mirror" / name).write_bytes(b"x")
    with pytest.raises(ArtifactError, match=rf"{name}.*fastprune stage"):
        open_beton(tmp_path / "mirror")


def test_record_that_names_files_elsewhere_is_refused(bucket, tmp_path):
    stage(f"file://{bucket}/train", ROWS, tmp_path / "mirror")
    record = json.loads((tmp_path / "mirror" / MIRROR_NAME).read_text())
    record["files"][0]["name"] = "../evil.beton"
    (tmp_path / "mirror" / MIRROR_NAME).write_text(json.dumps(record))
    with pytest.raises(
        ArtifactError, match=r"'files\.0\.name' is '\.\./evil\.beton', which is not a file name"
    ):
        stage(f"file://{bucket}/train", ROWS, tmp_path / "mirror")


def test_full_disk_is_named_with_the_bytes_that_are_wanted(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ArtifactError, match=r"has 1,000 bytes free, but 6 rows with 8,\d+ bytes"):
        stage(f"file://{bucket}/train", ROWS, tmp_path / "mirror")
    assert open_beton(tmp_path / "mirror").present.sum() == 0


def test_tampered_row_is_found_by_check(bucket, tmp_path):
    stage(f"file://{bucket}/train", ROWS, tmp_path / "mirror")
    beton = open_beton(tmp_path / "mirror")
    with (tmp_path / "mirror" / shard_name(1)).open("r+b") as file:
        file.seek(beton.offsets[7] - beton.files[1].start + 300)
        file.write(b"tampered")
    [fault] = check_beton(tmp_path / "mirror", deep=True)
    assert (fault.kind, fault.row) == ("crc", 7)


def test_rows_that_are_absent_are_refused_by_what_reads_them(bucket, tmp_path):
    stage(f"file://{bucket}/train", ROWS, tmp_path / "mirror")
    compact(tmp_path / "mirror", tmp_path / "half.beton", subset=ROWS)
    assert check_beton(tmp_path / "half.beton", deep=True) == []
    with pytest.raises(ArtifactError, match=r"holds 6 of 20 rows, and row 1 is not .*19 of 20|14"):
        compact(tmp_path / "mirror", tmp_path / "whole.beton")


STAGE = """
import sys
import numpy as np
from fastprune.beton.remote.stage import stage
from fastprune.beton.remote.plan import MOST_BYTES
print("ready", flush=True)
sys.stdin.readline()
stage(sys.argv[1], None, sys.argv[2], threads=2)
"""


def start_staging(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE, "s3://bucket/many", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.fixture
def many(server):
    """A beton of several requests of the largest size."""
    folder = server.root / "bucket" / "many"
    if not folder.exists():
        images = [jpeg_bytes(seed, width=900, height=600, quality=97) for seed in range(3)]
        convert([(image, 0) for image in images * 40], folder, shards=2, jpeg="original")
    assert open_beton(folder).sizes.sum() > 2 * MOST_BYTES
    return folder


# When so many requests have come, and a little later: 25 moments, of which 5 are always tried.
MOMENTS = [
    pytest.param(number, delay, marks=() if delay == 0 and number in ALWAYS else pytest.mark.full)
    for number in range(1, 14)
    for delay in (0, 0.1)
    if (number, delay) != (13, 0.1)
]


@pytest.mark.parametrize(("num_requests", "delay"), MOMENTS)
def test_killed_while_staging_fetches_only_what_was_under_way_again(
    server, many, tmp_path, num_requests, delay
):
    server.fault = lambda method, key, number: "slow" if method == "GET" else None
    process = start_staging(tmp_path / "mirror")
    go(process)
    deadline = time.monotonic() + 60
    while len(server.requests) < num_requests and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    server.fault = lambda *_: None
    time.sleep(0.3)  # answers that were under way
    stage("s3://bucket/many", None, tmp_path / "mirror")
    assert open_beton(tmp_path / "mirror").present.all()
    assert check_beton(tmp_path / "mirror", deep=True) == []
    ranges = row_ranges_of_any_page(server)
    assert len(ranges) - len(set(ranges)) <= 2, "two threads had one request each under way"


def row_ranges_of_any_page(server):
    return [
        (key, asked)
        for method, key, asked in server.requests
        if method == "GET" and key.endswith(".beton") and int(asked[6:].split("-")[0]) >= 1 << 23
    ]


@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.full)])
def test_processes_that_share_a_mirror_fetch_each_byte_once(server, many, tmp_path, count):
    server.fault = lambda method, key, number: "slow" if method == "GET" else None
    processes = [start_staging(tmp_path / "mirror") for _ in range(count)]
    for process in processes:
        go(process)
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    ranges = row_ranges_of_any_page(server)
    assert len(ranges) == len(set(ranges))
    assert open_beton(tmp_path / "mirror").present.all()
    assert check_beton(tmp_path / "mirror", deep=True) == []
