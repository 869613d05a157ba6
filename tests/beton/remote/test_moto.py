"""The same against somebody else's S3 server: moto, where FASTPRUNE_MOTO_SERVER names its program.

It is no development dependency: its botocore wants python-dateutil below 3. `pipx install
'moto[server]>=5.2.5'` puts it beside. (The client takes 5.2.1's answer to a whole upload for an
error.)
"""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from fastprune import Loader, check_beton, convert, open_beton
from fastprune.base.errors import StorageError
from fastprune.beton.remote.stage import stage
from fastprune.beton.remote.store import Store
from tests.images import write_image_folder

PROGRAM = os.environ.get("FASTPRUNE_MOTO_SERVER")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="FASTPRUNE_MOTO_SERVER is not set")


@pytest.fixture(scope="module")
def endpoint():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [PROGRAM, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    try:
        while True:
            try:
                bucket = urllib.request.Request(f"{url}/bucket", method="PUT")
                urllib.request.urlopen(bucket).close()
                break
            except urllib.error.URLError:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def bucket(endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return "s3://bucket/sets/train/"


def test_beton_goes_there_and_its_rows_come_back(bucket, tmp_path):
    images = write_image_folder(tmp_path / "images", classes=4)
    convert(images, tmp_path / "train", shards=3)
    manifest = convert(images, bucket, shards=3)
    assert convert(images, bucket, shards=3, resume=True).fingerprint == manifest.fingerprint
    rows = np.arange(0, 16, 3)
    assert stage(bucket, rows, tmp_path / "mirror").num_fetched_rows == len(rows)
    assert check_beton(tmp_path / "mirror", deep=True) == []
    assert np.flatnonzero(open_beton(tmp_path / "mirror").present).tolist() == rows.tolist()

    def batches(source, **options):
        loader = Loader(source, batch_size=4, image_size=16, device="cpu", **options)
        return [(images.tolist(), labels.tolist()) for images, labels in loader]

    assert batches(bucket, cache=tmp_path / "mirror") == batches(tmp_path / "train")


def test_images_are_converted_from_there(bucket, tmp_path):
    images = write_image_folder(tmp_path / "images", classes=2)
    store = Store(f"{bucket}images")
    for path in images.rglob("*.jpg"):
        store.write(str(path.relative_to(images)), path)
    convert(images, tmp_path / "here.beton")
    convert(f"{bucket}images", tmp_path / "there.beton")
    assert (tmp_path / "there.beton").read_bytes() == (tmp_path / "here.beton").read_bytes()


@pytest.mark.parametrize("url", ["s3://bucket/nothing/", "s3://nobody/train/"])
def test_what_is_missing_is_named(bucket, tmp_path, url):
    with pytest.raises(StorageError, match=rf"{url}manifest\.json does not exist"):
        stage(url, None, tmp_path / "mirror")
