"""A loader of a beton in object storage gives the batches of the local one."""

import pickle
import threading

import numpy as np
import pytest

from fastprune import Loader, convert, open_beton
from fastprune.base.errors import InvalidValueError, LoadingError, StorageError
from fastprune.beton.remote.stage import stage
from fastprune.beton.shards import shard_name
from tests.beton.remote.s3_server import serving
from tests.images import write_image_folder

ROWS = np.arange(0, 20, 2)
SETTINGS = {"batch_size": 3, "image_size": 16, "device": "cpu", "seed": 3}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    images = write_image_folder(root / "images", classes=5)
    (root / "bucket").mkdir()
    convert(images, root / "bucket" / "train", shards=3)
    return root / "bucket" / "train"


@pytest.fixture
def server(train, monkeypatch):
    with serving(train.parent.parent) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield server


def epoch(loader):
    return [(images.tolist(), labels.tolist()) for images, labels in loader]


def test_batches_are_those_of_the_local_beton_and_the_second_epoch_fetches_nothing(
    server, train, tmp_path
):
    loader = Loader(
        open_beton("s3://bucket/train/", cache=tmp_path / "mirror"), ROWS, tail="exact", **SETTINGS
    )
    local = Loader(train, ROWS, tail="exact", **SETTINGS)
    assert epoch(loader) == epoch(local)
    num_requests = len(server.requests)
    assert epoch(loader) == epoch(local)
    assert len(server.requests) == num_requests
    assert open_beton(tmp_path / "mirror").present.nonzero()[0].tolist() == ROWS.tolist()


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_every_engine_waits_for_its_rows(train, tmp_path, backend):
    pytest.importorskip({"dali": "nvidia.dali"}.get(backend, "torch"))
    beton = open_beton(train)
    samples = [(beton.image_bytes(row).tobytes(), int(beton.labels[row])) for row in range(20)]
    convert(samples, tmp_path / "one.beton")
    settings = {**SETTINGS, "backend": backend}
    local = epoch(Loader(tmp_path / "one.beton", ROWS, **settings))
    url = f"file://{tmp_path}/one.beton"
    assert epoch(Loader(open_beton(url, cache=tmp_path / "mirror"), ROWS, **settings)) == local


def test_ranks_share_a_mirror(train, tmp_path):
    loaders = [
        Loader(
            open_beton(f"file://{train}", cache=tmp_path / "m"),
            ROWS,
            distributed=(rank, 2),
            **SETTINGS,
        )
        for rank in range(2)
    ]
    local = [Loader(train, ROWS, distributed=(rank, 2), **SETTINGS) for rank in range(2)]
    assert [epoch(loader) for loader in loaders] == [epoch(loader) for loader in local]


def test_staged_mirror_is_a_beton_for_its_rows(train, tmp_path):
    stage(f"file://{train}", ROWS, tmp_path / "mirror")
    loader = Loader(tmp_path / "mirror", ROWS, verify_crc=True, **SETTINGS)
    assert epoch(loader) == epoch(Loader(train, ROWS, **SETTINGS))


def test_mirror_may_be_filled_while_a_loader_reads_it(train, tmp_path):
    stage(f"file://{train}", ROWS, tmp_path / "mirror")
    batches = iter(Loader(tmp_path / "mirror", ROWS, **SETTINGS))
    next(batches)
    stage(f"file://{train}", np.array([1, 3]), tmp_path / "mirror")
    assert len(list(batches)) == 2


def test_loader_left_early_leaves_no_threads(train, tmp_path):
    loader = Loader(open_beton(f"file://{train}", cache=tmp_path / "mirror"), **SETTINGS)
    batches = iter(loader)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if "fetch" in thread.name]
    assert len(epoch(loader)) == 6


def test_pickled_loader_reads_the_same_mirror(train, tmp_path):
    loader = Loader(open_beton(f"file://{train}", cache=tmp_path / "mirror"), ROWS, **SETTINGS)
    copy = pickle.loads(pickle.dumps(loader))
    assert epoch(copy) == epoch(Loader(train, ROWS, **SETTINGS))


def test_object_that_fails_while_the_loader_waits_is_named(server, tmp_path):
    loader = Loader(open_beton("s3://bucket/train/", cache=tmp_path / "mirror"), ROWS, **SETTINGS)
    server.denied = True
    with pytest.raises(StorageError, match=r"access to s3://bucket/train/shard-0000.\.beton was"):
        list(loader)


def test_tampered_row_is_found_by_its_checksum(train, tmp_path):
    stage(f"file://{train}", ROWS, tmp_path / "mirror")
    beton = open_beton(tmp_path / "mirror")
    with (tmp_path / "mirror" / shard_name(0)).open("r+b") as file:
        file.seek(beton.offsets[4] + 300)
        file.write(b"tampered")
    with pytest.raises(LoadingError, match=r"row 4 of .* \(CRC-32C\)"):
        list(Loader(tmp_path / "mirror", ROWS, verify_crc=True, **SETTINGS))


@pytest.mark.parametrize(
    ("url", "cache", "match"),
    [(True, False, "cache must be a folder"), (False, True, "cache is for betons in object st")],
)
def test_url_and_cache_come_together(train, tmp_path, url, cache, match):
    with pytest.raises(InvalidValueError, match=match):
        open_beton(
            f"file://{train}" if url else train, cache=tmp_path / "mirror" if cache else None
        )
