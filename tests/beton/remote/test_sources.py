"""Images in a bucket become the beton that local ones become."""

import io
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastprune import check_beton, convert, open_beton
from fastprune.base.errors import ConversionError, InvalidValueError, StorageError
from fastprune.beton.convert.sources import source_for
from fastprune.beton.manifest import manifest_path
from fastprune.beton.remote.store import Store
from tests.beton.remote.s3_server import SECRET
from tests.images import jpeg_bytes, write_image_folder

SETS = ["folder", "tree", "flat", "tars", "pattern", "one tar", "parquet", "data"]


def write_tar(path, first, count):
    with tarfile.open(path, "w") as archive:
        for number in range(first, first + count):
            for name, content in (("jpg", jpeg_bytes(number)), ("cls", str(number % 5).encode())):
                info = tarfile.TarInfo(f"{number:04d}.{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def write_parquet(path, first, count):
    rows = range(first, first + count)
    images = [{"bytes": jpeg_bytes(row), "path": None} for row in rows]
    table = pa.table({"image": images, "label": [row % 5 for row in rows]})
    pq.write_table(table, path, row_group_size=7)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The same kinds of sets that a disk may hold."""
    bucket = tmp_path_factory.mktemp("store") / "bucket"
    folder = write_image_folder(bucket / "folder", classes=3)
    # "-" sorts before "/": folders come in their own order, not in that of whole names.
    for name in ("class_00/b/z.jpg", "class_00/b-c/a.jpg", "class_00-x/y & z.JPEG"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg_bytes(len(name)))
    (folder / "class_01" / "notes.txt").write_text("no image")
    (bucket / "flat").mkdir()
    for number in range(5):
        (bucket / "flat" / f"{number}.jpg").write_bytes(jpeg_bytes(number))
    (bucket / "tars").mkdir()
    (bucket / "parquet" / "data").mkdir(parents=True)
    for number in range(3):
        write_tar(bucket / "tars" / f"train-{number}.tar", 100 * number, 10)
        name = f"train-{number:05d}-of-00003.parquet"
        write_parquet(bucket / "parquet" / "data" / name, 100 * number, 20)
    return bucket


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setitem(Store.__init__.__kwdefaults__, "retry_seconds", 0.5)


def place_and_settings(name, tmp_path):
    """Where a set is in the bucket, and how it is converted."""
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"{number}.jpg class{number % 2}\n" for number in range(5)))
    return {
        "folder": ("folder", {}),
        "tree": ("folder", {"unlabeled": True}),
        "flat": ("flat", {"labels": labels}),
        "tars": ("tars", {}),
        "pattern": ("tars/train-*.tar", {}),
        "one tar": ("tars/train-1.tar", {}),
        "parquet": ("parquet", {}),
        "data": ("parquet/data/*.parquet", {}),
    }[name]


def both_files(path):
    return path.read_bytes(), manifest_path(path).read_bytes()


def require_equal(bucket, name, tmp_path, **settings):
    place, own = place_and_settings(name, tmp_path)
    convert(bucket / place, tmp_path / "here.beton", workers=2, **own, **settings)
    convert(f"s3://bucket/{place}", tmp_path / "there.beton", workers=2, **own, **settings)
    assert both_files(tmp_path / "there.beton") == both_files(tmp_path / "here.beton")


@pytest.mark.parametrize("name", SETS)
def test_both_files_are_those_of_local_images(server, bucket, tmp_path, name):
    require_equal(bucket, name, tmp_path)


@pytest.mark.parametrize("name", ["folder", "tars"])
def test_shuffled_rows_are_those_of_local_images(server, bucket, tmp_path, name):
    require_equal(bucket, name, tmp_path, shuffle_seed=3)


@pytest.mark.parametrize("fault", ["503", "cut", "slow"])
@pytest.mark.parametrize("name", ["folder", "tars", "parquet"])
def test_faults_of_some_requests_do_no_harm(server, bucket, tmp_path, name, fault):
    server.fault = lambda method, key, number: fault if number % 3 == 0 else None
    require_equal(bucket, name, tmp_path)


def test_images_go_from_bucket_to_bucket(server, bucket, tmp_path):
    convert(bucket / "tars", tmp_path / "here", shards=3)
    convert("s3://bucket/tars/", "s3://bucket/made/", shards=3)
    for shard in (tmp_path / "here").glob("*.beton"):
        assert (bucket / "made" / shard.name).read_bytes() == shard.read_bytes()


def test_neighbors_in_a_tar_come_in_one_request(server, tmp_path):
    listed = source_for("s3://bucket/tars", None).list_images()
    assert len(listed) == 30
    before = len(server.requests)
    convert("s3://bucket/tars", tmp_path / "there.beton")
    listing = [r for r in server.requests[before:] if not r[1].endswith(".tar")]
    assert len(server.requests) - before - len(listing) == 3 * 3, "HEAD, headers, images of each"


def test_unreadable_image_is_named_or_skipped_as_a_local_one(server, bucket, tmp_path):
    bad = write_image_folder(bucket / "bad", classes=2) / "class_01" / "002.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(ConversionError, match=r"s3://bucket/bad/class_01/002\.jpg: it is no image"):
        convert("s3://bucket/bad", tmp_path / "there.beton")
    assert list(tmp_path.iterdir()) == []
    convert(bucket / "bad", tmp_path / "here.beton", on_error="skip")
    convert("s3://bucket/bad", tmp_path / "there.beton", on_error="skip")
    assert both_files(tmp_path / "there.beton") == both_files(tmp_path / "here.beton")


def test_parquet_row_without_bytes_is_named(server, bucket, tmp_path):
    (bucket / "empty").mkdir()
    images = [{"bytes": jpeg_bytes(1)}, {"bytes": None}]
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), bucket / "empty" / "a.parquet")
    with pytest.raises(ConversionError, match=r"s3://bucket/empty/a\.parquet#1: it has no bytes"):
        convert("s3://bucket/empty", tmp_path / "there.beton")


@pytest.mark.parametrize(
    ("name", "named"),
    [("folder", r"class_..(-x)?/.*\.(jpg|JPEG)"), ("tars", r"train-.\.tar"), ("data", "parquet")],
)
def test_faults_of_all_requests_name_the_object(server, bucket, tmp_path, impatient, name, named):
    place, settings = place_and_settings(name, tmp_path)
    source = source_for(f"s3://bucket/{place}", None)
    source.list_images()
    server.fault = lambda method, key, number: "503" if "." in key else None
    with pytest.raises(StorageError, match=rf"s3://bucket/.*{named} could not be read"):
        convert(f"s3://bucket/{place}", tmp_path / "there.beton", **settings)
    assert not list(tmp_path.glob("*.beton*"))


def test_server_that_dies_midway_is_named_and_nothing_is_left(server, bucket, tmp_path, impatient):
    seen = []

    def fault(method, key, number):
        seen.append(key)
        return "503" if sum(key.endswith(".jpg") for key in seen) > 8 else None

    server.fault = fault
    with pytest.raises(StorageError, match=r"s3://bucket/folder/class_.*jpg could not be read"):
        convert("s3://bucket/folder", tmp_path / "there.beton", on_error="skip")
    assert list(tmp_path.iterdir()) == []


def test_denied_access_is_named_without_the_credentials(server, tmp_path):
    server.denied = True
    for place in ("folder", "tars", "tars/train-0.tar"):
        with pytest.raises(StorageError, match=r"access to s3://bucket/tars|folder was den") as e:
            convert(f"s3://bucket/{place}", tmp_path / "there.beton")
        assert SECRET not in str(e.value)


@pytest.mark.parametrize("place", ["nowhere", "tars/none-*.tar", "tars/no.tar", "p/x.parquet"])
def test_missing_images_are_named(server, tmp_path, place):
    with pytest.raises(StorageError, match=r"s3://bucket/.* does not exist\. Compare the URL"):
        convert(f"s3://bucket/{place}", tmp_path / "there.beton")


def test_folder_that_can_be_read_in_two_ways_is_refused(server, bucket, tmp_path):
    (bucket / "both" / "class").mkdir(parents=True)
    (bucket / "both" / "class" / "a.jpg").write_bytes(jpeg_bytes(1))
    write_tar(bucket / "both" / "train-0.tar", 0, 1)
    with pytest.raises(ConversionError, match=r"s3://bucket/both holds both folders and \.tar"):
        convert("s3://bucket/both", tmp_path / "there.beton")
    write_tar(bucket / "both" / "val-0.tar", 0, 1)
    with pytest.raises(ConversionError, match=r"several splits \(train, val\).*both/val-\*\.tar"):
        convert("s3://bucket/both", tmp_path / "there.beton")


def test_images_without_class_folders_are_named(server, tmp_path):
    with pytest.raises(ConversionError, match=r"s3://bucket/flat has objects, but no folders"):
        convert("s3://bucket/flat", tmp_path / "there.beton")


def test_image_that_changed_since_the_listing_is_named(server, bucket, tmp_path):
    folder = write_image_folder(bucket / "changing", classes=1)

    def fault(method, key, number):
        if key.endswith("003.jpg"):
            (folder / "class_00" / "003.jpg").write_bytes(jpeg_bytes(3, width=100))

    server.fault = fault
    with pytest.raises(StorageError, match=r"class_00/003\.jpg changed since it was listed: it"):
        convert("s3://bucket/changing", tmp_path / "there.beton")


def test_cut_tar_is_named(server, bucket, tmp_path):
    (bucket / "cut").mkdir()
    write_tar(bucket / "cut" / "a.tar", 0, 20)
    whole = (bucket / "cut" / "a.tar").read_bytes()
    (bucket / "cut" / "a.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConversionError, match=r"s3://bucket/cut/a\.tar is cut"):
        convert("s3://bucket/cut", tmp_path / "there.beton")


def test_damaged_parquet_is_named(server, bucket, tmp_path):
    (bucket / "damaged").mkdir()
    (bucket / "damaged" / "a.parquet").write_bytes(b"PAR1 no footer")
    with pytest.raises(ConversionError, match=r"s3://bucket/damaged/a\.parquet cannot be read as"):
        convert("s3://bucket/damaged", tmp_path / "there.beton")


@pytest.mark.parametrize("name", ["folder", "tars", "parquet"])
def test_source_that_was_sent_to_another_process_reads_the_same(server, tmp_path, name):
    source = source_for(f"s3://bucket/{name}", None)
    listing = source.list_images()
    sent = pickle.dumps((source, listing.take(np.array([3, 4]))))
    assert SECRET.encode() not in sent
    assert len(sent) < 4000, "the listing stays behind"
    copy, part = pickle.loads(sent)
    where = [part.location(0), part.location(1)]

    def images(source):
        import threading

        stop = threading.Event()
        reader = source.reader
        return [image for piece in reader.pieces(where) for image in reader.fetch(piece, stop)]

    assert images(copy) == images(source)
    assert images(copy)[0].startswith(b"\xff\xd8")


def test_resumed_conversion_fetches_what_is_missing(server, bucket, tmp_path, impatient):
    convert(bucket / "folder", tmp_path / "here.beton")
    failing = "class_02/003.jpg"
    server.fault = lambda method, key, number: "503" if key.endswith(failing) else None
    with pytest.raises(StorageError, match=failing):
        convert("s3://bucket/folder", tmp_path / "there.beton", resume=True)
    server.fault = lambda *_: None
    convert("s3://bucket/folder", tmp_path / "there.beton", resume=True)
    assert both_files(tmp_path / "there.beton") == both_files(tmp_path / "here.beton")
    assert check_beton(tmp_path / "there.beton", deep=True) == []
    assert open_beton(tmp_path / "there.beton").num_rows == 15


def test_url_with_a_secret_is_refused_without_showing_it(tmp_path):
    with pytest.raises(InvalidValueError, match="has credentials in it") as error:
        convert(f"s3://key:{SECRET}@bucket/images", tmp_path / "there.beton")
    assert SECRET not in str(error.value)
