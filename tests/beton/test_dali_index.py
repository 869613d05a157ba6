"""DALI's native webdataset reader gives a subset's rows from a beton, and no others."""

import io

import numpy as np
import pytest
from PIL import Image

from fastprune import compact, convert, open_beton
from fastprune.base.errors import BetonError
from fastprune.beton.dali_index import write_dali_index
from tests.conftest import require_library
from tests.images import write_image_folder

require_library("dali")

from nvidia.dali import fn, pipeline_def, types  # noqa: E402


def read_with_dali(beton, index, count):
    """(row, label, pixels, JPEG bytes) of every sample, from DALI's CPU pipeline."""

    @pipeline_def(batch_size=count, num_threads=2, device_id=None)
    def pipeline():
        jpegs, labels = fn.readers.webdataset(
            paths=[str(beton)],
            index_paths=[str(index)],
            ext=["jpg", "cls"],
            dtypes=[types.UINT8, types.INT64],
        )
        rows = fn.get_property(jpegs, key="source_info")
        images = fn.decoders.image(jpegs, device="cpu", adjust_orientation=False)
        return jpegs, labels, rows, images

    outputs = pipeline()
    outputs.build()
    jpegs, labels, rows, images = outputs.run()
    return [
        (
            int(bytes(rows.at(i)).decode().split(":")[-1]),
            int(labels.at(i)[0]),
            images.at(i),
            jpegs.at(i).tobytes(),
        )
        for i in range(count)
    ]


def expect_rows(samples, rows, beton_path):
    """The samples are these rows of the beton: bytes, labels and pixels."""
    beton = open_beton(beton_path)
    assert [row for row, *_ in samples] == list(rows)
    for row, label, pixels, jpeg in samples:
        assert label == beton.labels[row]
        assert jpeg == beton.image_bytes(row).tobytes()
        by_pil = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
        assert pixels.shape == by_pil.shape
        assert np.abs(pixels.astype(int) - by_pil).mean() < 1


@pytest.fixture
def beton_path(tmp_path):
    root = write_image_folder(tmp_path / "images", classes=5)
    convert(root, tmp_path / "a.beton", workers=1)
    return tmp_path / "a.beton"


def test_dali_reads_exactly_the_rows_of_a_subset(beton_path, tmp_path):
    rows = np.array([0, 3, 4, 11, 19])
    assert write_dali_index(beton_path, tmp_path / "a.idx", subset=rows) == 5
    expect_rows(read_with_dali(beton_path, tmp_path / "a.idx", 5), rows, beton_path)


def test_dali_reads_all_rows_without_a_subset(beton_path, tmp_path):
    write_dali_index(beton_path, tmp_path / "a.idx")
    expect_rows(read_with_dali(beton_path, tmp_path / "a.idx", 20), range(20), beton_path)


def test_dali_reads_a_compacted_beton_with_the_labels_of_the_full_one(beton_path, tmp_path):
    rows = np.array([2, 5, 17])
    compact(beton_path, tmp_path / "b.beton", subset=rows)
    write_dali_index(tmp_path / "b.beton", tmp_path / "b.idx")
    samples = read_with_dali(tmp_path / "b.beton", tmp_path / "b.idx", 3)
    expect_rows(samples, range(3), tmp_path / "b.beton")
    assert [label for _, label, *_ in samples] == [0, 1, 4]


def test_index_lines_hold_extension_offset_size_and_row(beton_path, tmp_path):
    write_dali_index(beton_path, tmp_path / "a.idx", subset=np.array([7]))
    beton = open_beton(beton_path)
    end = int(beton.offsets[-1] + beton.sizes[-1])
    block = -(-end // 512) * 512 + 512 * 1
    assert (tmp_path / "a.idx").read_text() == (
        f"v1.2 1\njpg {beton.offsets[7]} {beton.sizes[7]} 7 cls {block} 8 7\n"
    )


def test_a_beton_without_label_blocks_is_refused_with_the_cure(beton_path, tmp_path):
    data = bytearray(beton_path.read_bytes())
    beton = open_beton(beton_path)
    end = int(beton.offsets[-1] + beton.sizes[-1])
    block = -(-end // 512) * 512 + 512 * 2
    data[block] = 77
    other = tmp_path / "other.beton"
    other.write_bytes(data)
    with pytest.raises(BetonError, match=r"no label block for class 2.*fastprune compact .*other"):
        write_dali_index(other, tmp_path / "a.idx")
