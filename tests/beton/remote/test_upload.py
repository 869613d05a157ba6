"""A conversion into object storage leaves the bytes that a local one does."""

import pytest

from fastprune import Loader, convert, open_beton
from fastprune.base.errors import ConversionError, InvalidValueError, StorageError
from fastprune.beton.shards import SET_NAME, shard_name
from tests.images import write_image_folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("source") / "images", classes=5)


@pytest.fixture(scope="module")
def made(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "train"
    convert(images, folder, shards=3)
    return folder


@pytest.fixture
def bucket(tmp_path):
    """An empty one."""
    folder = tmp_path / "store" / "bucket"
    folder.mkdir(parents=True)
    return folder


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_objects_are_the_files_of_a_local_conversion(server, images, made, tmp_path):
    manifest = convert(images, "s3://bucket/train/", shards=3)
    assert manifest.fingerprint.num_rows == 20
    assert files_in(server.root / "bucket" / "train") == files_in(made)
    put = [key for method, key, _ in server.requests if method == "PUT"]
    assert put[-1] == "bucket/train/manifest.json", "a reader begins with it"
    settings = {"batch_size": 4, "image_size": 16, "device": "cpu"}
    assert len(list(Loader(open_beton("s3://bucket/train", cache=tmp_path / "m"), **settings))) == 5


def test_tasks_of_an_array_make_a_shard_each(images, made, tmp_path):
    url = f"file://{tmp_path}/train"
    for index in (2, 0):
        manifest = convert(images, url, shards=3, shard=index)
        assert manifest.fingerprint.num_rows < 20
        assert not (tmp_path / "train" / SET_NAME).exists()
    assert convert(images, url, shards=3, shard=1).fingerprint.num_rows == 20
    assert files_in(tmp_path / "train") == files_in(made)


def test_whole_shards_are_kept(images, made, tmp_path):
    url = f"file://{tmp_path}/train"
    convert(images, url, shards=3, shard=0)
    before = (tmp_path / "train" / shard_name(0)).stat().st_ino
    # Cut off between the two uploads: without its manifest a shard is not whole.
    (tmp_path / "train" / shard_name(1)).write_bytes(b"half of it")
    convert(images, url, shards=3, resume=True)
    assert (tmp_path / "train" / shard_name(0)).stat().st_ino == before
    assert files_in(tmp_path / "train") == files_in(made)
    with pytest.raises(ConversionError, match=r"holds a sharded beton already\. Add --resume"):
        convert(images, url, shards=3)


def test_shard_of_another_conversion_is_named(images, tmp_path):
    url = f"file://{tmp_path}/train"
    convert(images, url, shards=3, shard=0)
    with pytest.raises(ConversionError, match=r"shard-00000\.beton was made from other images or"):
        convert(images, url, shards=3, resume=True, quality=80)


def test_denied_upload_is_named(server, images):
    server.denied = True
    with pytest.raises(
        StorageError, match=r"access to s3://bucket/train/manifest\.json was denied"
    ):
        convert(images, "s3://bucket/train/", shards=3)


def test_single_beton_is_not_uploaded(images):
    with pytest.raises(InvalidValueError, match=r"shards must be at least 1 where .* s3://bucket"):
        convert(images, "s3://bucket/train.beton")
