"""A stock ffcv.Loader reads our betons, and we read the betons of a stock DatasetWriter."""

import gc
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from fastprune import compact, convert, open_beton
from fastprune.base.errors import BetonError
from fastprune.beton.dali_index import write_dali_index
from tests.conftest import require_library
from tests.images import write_image_folder

require_library("ffcv")

import ffcv.fields  # noqa: E402
import ffcv.fields.decoders as decoders  # noqa: E402
import ffcv.libffcv  # noqa: E402
from ffcv.loader import Loader, OrderOption  # noqa: E402
from ffcv.transforms import ToTensor  # noqa: E402
from ffcv.writer import DatasetWriter  # noqa: E402

# When Python collects FFCV's compiled functions, Numba's finalizers may fail to find a signature.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collect_here():
    """Let these finalizers run inside the tests that ignore them."""
    yield
    gc.collect()


def decode_as_ffcv(jpeg, height, width):
    """What FFCV's own library, with its own flags, makes of a JPEG."""
    source, pixels = np.frombuffer(jpeg, np.uint8), np.zeros((height, width, 3), np.uint8)
    ffcv.libffcv.imdecode(source, pixels, height, width, height, width)
    return pixels


def batches(path, decoder, **kwargs):
    """All rows as stock FFCV loads them."""
    loader = Loader(
        str(path),
        batch_size=4,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={
            "image": [decoder, ToTensor()],
            "label": [ffcv.fields.basics.IntDecoder(), ToTensor()],
        },
        **kwargs,
    )
    # FFCV reuses a batch's memory for a later one.
    loaded = [(images.numpy().copy(), labels.numpy().copy()) for images, labels in loader]
    images, labels = zip(*loaded, strict=True)
    return np.concatenate(images), np.concatenate(labels)[:, 0]


@pytest.mark.parametrize("jpeg", ["original", "fast"])
def test_stock_loader_decodes_the_source_files_pixels_under_the_right_labels(tmp_path, jpeg):
    root = write_image_folder(tmp_path / "images", same_size=True)
    convert(root, tmp_path / "a.beton", workers=2, jpeg=jpeg)
    images, labels = batches(tmp_path / "a.beton", decoders.SimpleRGBImageDecoder())
    samples = ImageFolder(str(root)).samples
    assert labels.tolist() == [label for _, label in samples]
    for pixels, (path, _) in zip(images, samples, strict=True):
        assert np.array_equal(pixels, decode_as_ffcv(Path(path).read_bytes(), 48, 64))


def test_stock_loader_reads_shards_one_by_one(tmp_path):
    images = write_image_folder(tmp_path / "images", same_size=True)
    convert(images, tmp_path / "one.beton")
    convert(images, tmp_path / "many", shards=3)

    decoder = decoders.SimpleRGBImageDecoder
    images, labels = batches(tmp_path / "one.beton", decoder())
    shards = [batches(path, decoder()) for path in sorted((tmp_path / "many").glob("*.beton"))]
    assert [len(part) for _, part in shards] == [4, 4, 4]
    assert np.array_equal(np.concatenate([part for part, _ in shards]), images)
    assert np.array_equal(np.concatenate([part for _, part in shards]), labels)


def test_stock_loader_center_crops_images_of_different_sizes(tmp_path):
    root = write_image_folder(tmp_path / "images")
    convert(root, tmp_path / "a.beton", workers=1)
    decoder = decoders.CenterCropRGBImageDecoder((36, 36), ratio=1)
    images, _ = batches(tmp_path / "a.beton", decoder, indices=np.arange(4))
    beton = open_beton(tmp_path / "a.beton")
    for row, pixels in enumerate(images):
        height, width = int(beton.heights[row]), int(beton.widths[row])
        assert height == 36  # the first class: a full-size crop, which FFCV's resize keeps as it is
        left = (width - 36) // 2
        whole = decode_as_ffcv(beton.image_bytes(row).tobytes(), height, width)
        assert np.array_equal(pixels, whole[:, left : left + 36])


class Stock:
    """What stock FFCV's writer takes: an indexable dataset of (image, label, ...)."""

    def __init__(self, *columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, index):
        return tuple(column[index] for column in self.columns)


def write_stock(path, columns, fields):
    DatasetWriter(str(path), fields, num_workers=2, page_size=1 << 21).from_indexed_dataset(
        Stock(*columns), chunksize=3
    )


def pictures(count):
    generator = np.random.default_rng(0)
    return [
        generator.integers(0, 256, (20 + row, 30 + row, 3), dtype=np.uint8) for row in range(count)
    ]


@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_reads_betons_of_the_stock_writer(tmp_path, mode):
    images = pictures(10)
    fields = {"image": ffcv.fields.RGBImageField(write_mode=mode), "label": ffcv.fields.IntField()}
    write_stock(tmp_path / "a.beton", (images, list(range(10))), fields)
    beton = open_beton(tmp_path / "a.beton")
    assert beton.labels.tolist() == list(range(10))
    assert beton.class_names is None
    assert beton.fingerprint.content is None
    for row, image in enumerate(images):
        assert (beton.heights[row], beton.widths[row]) == image.shape[:2]
        stored = beton.image_bytes(row)
        if mode == "raw":
            assert np.array_equal(stored.reshape(image.shape), image)
        else:
            assert Image.open(io.BytesIO(stored)).size == image.shape[1::-1]


def test_reads_stock_betons_with_more_fields_in_another_order(tmp_path):
    images = pictures(7)
    fields = {
        "weight": ffcv.fields.FloatField(),
        "note": ffcv.fields.BytesField(),
        "other": ffcv.fields.IntField(),
        "label": ffcv.fields.IntField(),
        "vector": ffcv.fields.NDArrayField(np.dtype("float32"), (5,)),
        "about": ffcv.fields.JSONField(),
        "image": ffcv.fields.RGBImageField(write_mode="jpg"),
    }
    columns = (
        [0.5] * 7,
        [np.full(row + 1, row, np.uint8) for row in range(7)],
        [9] * 7,
        list(range(7)),
        [np.full(5, row, np.float32) for row in range(7)],
        [{"row": row} for row in range(7)],
        images,
    )
    write_stock(tmp_path / "a.beton", columns, fields)
    beton = open_beton(tmp_path / "a.beton")
    assert beton.labels.tolist() == list(range(7))
    assert [field.kind for field in beton.fields] == [
        *("float", "bytes", "int", "int", "ndarray", "json", "image")
    ]
    assert Image.open(io.BytesIO(beton.image_bytes(6))).size == (36, 26)


def test_compaction_aligns_a_stock_beton_for_dali_and_stock_ffcv_reads_it(tmp_path):
    images = [picture[:20, :30] for picture in pictures(10)]
    fields = {"image": ffcv.fields.RGBImageField(write_mode="jpg"), "label": ffcv.fields.IntField()}
    write_stock(tmp_path / "a.beton", (images, list(range(10))), fields)
    with pytest.raises(BetonError, match=r"not a multiple of 512.*fastprune compact .*a\.beton"):
        write_dali_index(tmp_path / "a.beton", tmp_path / "a.idx")
    compact(tmp_path / "a.beton", tmp_path / "b.beton", subset=np.array([2, 3, 9]))
    assert write_dali_index(tmp_path / "b.beton", tmp_path / "b.idx") == 3
    loaded, labels = batches(tmp_path / "b.beton", decoders.SimpleRGBImageDecoder())
    assert labels.tolist() == [2, 3, 9]
    beton = open_beton(tmp_path / "a.beton")
    for pixels, row in zip(loaded, labels, strict=True):
        assert np.array_equal(pixels, decode_as_ffcv(beton.image_bytes(row).tobytes(), 20, 30))


def test_stock_loader_reads_pages_that_grew_without_the_system_cache(tmp_path):
    root = write_image_folder(tmp_path / "images", classes=1, same_size=True)
    noise = np.random.default_rng(0).integers(0, 256, (3000, 3000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "class_00" / "002b.jpg", quality=95, subsampling=0)
    convert(root, tmp_path / "a.beton", workers=1)
    decoder = decoders.CenterCropRGBImageDecoder((48, 48), ratio=1)
    images, _ = batches(
        tmp_path / "a.beton", decoder, os_cache=False, indices=np.array([0, 1, 2, 4])
    )
    beton = open_beton(tmp_path / "a.beton")
    assert beton.page_bytes > 1 << 23
    for row, pixels in zip((0, 1, 2, 4), images, strict=True):
        whole = decode_as_ffcv(beton.image_bytes(row).tobytes(), 48, 64)
        assert np.array_equal(pixels, whole[:, 8:56])
