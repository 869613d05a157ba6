"""Every kind of source gives the right images, in the right order, under the right labels."""

import io
import json
import os
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from fastprune import convert, open_beton
from fastprune.base.errors import ConversionError, InvalidValueError
from fastprune.beton.convert.parquet import ParquetSource
from tests.images import jpeg_bytes, picture, write_image_folder


def converted(images, tmp_path, **kwargs):
    """The rows' bytes and labels, and the manifest's sources."""
    manifest = convert(images, tmp_path / "out.beton", workers=2, **kwargs)
    beton = open_beton(tmp_path / "out.beton")
    stored = [beton.image_bytes(row).tobytes() for row in range(beton.num_rows)]
    return stored, beton.labels.tolist(), manifest.table()["source"].to_pylist(), beton


def refused(match, images, tmp_path, **kwargs):
    """The conversion stops with this message and leaves nothing behind."""
    out = tmp_path / "target"
    out.mkdir()
    with pytest.raises(ConversionError, match=match):
        convert(images, out / "out.beton", workers=2, **kwargs)
    assert list(out.iterdir()) == []


# ImageFolder


def test_rows_are_torchvisions_image_folder_samples(tmp_path):
    root = write_image_folder(tmp_path / "images", classes=2)
    for name in ("b/z.jpg", "b/c/a.jpg", "B/y.JPEG", "a.jpg", "b.jpg", "notes.txt"):
        path = root / "class_01" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg_bytes(len(name)))
    stored, labels, sources, beton = converted(root, tmp_path)
    folder = ImageFolder(str(root))
    assert sources == [os.path.relpath(path, root) for path, _ in folder.samples]
    assert labels == [label for _, label in folder.samples]
    assert beton.class_names == tuple(folder.classes)
    assert stored == [(root / source).read_bytes() for source in sources]


def test_a_missing_folder_is_named(tmp_path):
    refused(
        r"cannot list .*nowhere: No such file.*one subfolder per class",
        tmp_path / "nowhere",
        tmp_path,
    )


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "images").mkdir()
    refused("images is empty. It must have one subfolder", tmp_path / "images", tmp_path)


def test_a_folder_without_class_folders_is_named(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg_bytes(0))
    refused("has files, but no folders", tmp_path / "images", tmp_path)


def test_a_class_folder_without_images_is_named(tmp_path):
    root = write_image_folder(tmp_path / "images")
    (root / "class_99").mkdir()
    (root / "class_99" / "readme.txt").write_text("nothing here")
    refused("class_99 holds no images .*Remove the folder", root, tmp_path)


def test_names_with_spaces_newlines_and_other_alphabets_are_converted(tmp_path):
    root = tmp_path / "images"
    folder = root / "große Katze\n猫"
    folder.mkdir(parents=True)
    names = ["a b.jpg", "line\nbreak.jpg", "écureuil.jpg", "\udcff.jpg"]
    for name in names:
        (folder / name).write_bytes(jpeg_bytes(1))
    _, _, sources, beton = converted(root, tmp_path)
    assert beton.class_names == ("große Katze\n猫",)
    assert sorted(sources) == sorted(
        f"große Katze\n猫/{name}"
        for name in ["a b.jpg", "line\nbreak.jpg", "écureuil.jpg", "\\xff.jpg"]
    )


def test_a_bad_image_with_a_newline_in_its_name_is_named_on_one_line(tmp_path):
    root = write_image_folder(tmp_path / "images")
    (root / "class_00" / "bad\nname.jpg").write_bytes(b"no image")
    refused(r"class_00/bad\\nname.jpg': it is no image", root, tmp_path)


def test_a_symbolic_link_that_loops_is_named(tmp_path):
    root = write_image_folder(tmp_path / "images")
    (root / "class_01" / "again").symlink_to(root / "class_01")
    refused("class_01/again leads back to a folder above it.*Remove the link", root, tmp_path)


def test_a_link_to_itself_is_named_if_it_should_be_an_image_and_else_passed_over(tmp_path):
    root = write_image_folder(tmp_path / "images", classes=1)
    (root / "class_00" / "itself").symlink_to("itself")
    stored, *_ = converted(root, tmp_path)
    assert len(stored) == 4
    (root / "class_00" / "itself.jpg").symlink_to("itself.jpg")
    refused(r"itself\.jpg: Too many levels of symbolic links", root, tmp_path)


def test_a_class_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    root = write_image_folder(tmp_path / "images")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("class_01"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    refused(r"cannot list .*class_01: Permission denied. Make it readable", root, tmp_path)


def test_symbolic_links_to_other_folders_are_followed_as_torchvision_does(tmp_path):
    elsewhere = write_image_folder(tmp_path / "elsewhere", classes=1)
    root = write_image_folder(tmp_path / "images", classes=1)
    (root / "class_00" / "more").symlink_to(elsewhere / "class_00")
    _, _, sources, _ = converted(root, tmp_path)
    samples = ImageFolder(str(root)).samples
    assert sources == [os.path.relpath(path, root) for path, _ in samples]


def test_a_dangling_link_is_named(tmp_path):
    root = write_image_folder(tmp_path / "images")
    (root / "class_01" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    refused("gone.jpg: No such file.*repair what it links to", root, tmp_path)


def test_a_pipe_named_like_an_image_is_refused_instead_of_waited_for(tmp_path):
    root = write_image_folder(tmp_path / "images")
    os.mkfifo(root / "class_01" / "pipe.jpg")
    refused(r"class_01/pipe.jpg is not a regular file. Remove", root, tmp_path)


@pytest.mark.full
def test_a_hundred_thousand_files_in_one_folder(tmp_path):
    folder = tmp_path / "images" / "only"
    folder.mkdir(parents=True)
    content = jpeg_bytes(0, width=8, height=8)
    for number in range(100_000):
        (folder / f"{number}.jpg").write_bytes(content)
    manifest = convert(tmp_path / "images", tmp_path / "out.beton")
    assert manifest.counts["copied"] == 100_000


# Flat folder with a label file


@pytest.fixture
def flat(tmp_path):
    folder = tmp_path / "val"
    folder.mkdir()
    for number in range(4):
        (folder / f"val_{number}.JPEG").write_bytes(jpeg_bytes(number))
    return folder


def test_flat_folder_takes_classes_by_name_in_sorted_order(flat, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text(
        "ImageId,PredictionString\nval_3,n02 1 2 3 4\nval_0,n07 5 6 7 8\nval_1,n02 1 1 1 1\n"
        "val_2,n01 1 1 1 1\n"
    )
    stored, found, sources, beton = converted(flat, tmp_path, labels=labels)
    assert sources == [f"val_{number}.JPEG" for number in range(4)]
    assert found == [2, 1, 0, 1]
    assert beton.class_names == ("n01", "n02", "n07")
    assert stored == [jpeg_bytes(number) for number in range(4)]


@pytest.mark.parametrize(
    "text",
    [
        "val_0.JPEG 0\nval_2.JPEG 5\nval_1.JPEG 3\nval_3.JPEG 0\n",
        "0\n3\n5\n0\n",
        "\ufeff0\n3\n5\n0\n",
    ],
    ids=["named lines", "bare lines", "byte order mark"],
)
def test_flat_folder_takes_class_numbers(flat, tmp_path, text):
    (tmp_path / "labels.txt").write_text(text)
    _, found, _, beton = converted(flat, tmp_path, labels=tmp_path / "labels.txt")
    assert found == [0, 3, 5, 0]
    assert beton.class_names is None
    assert beton.num_classes == 6


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("490\n361\n171\n822\n", "start at 171, but must start at 0.*development kit"),
        ("1\n2\n", "has 2 classes, but .* has 4 images. Give one line per image"),
        ("val_0 0\nval_1 0\nval_3 0\n", "has no line for .*val_2.JPEG. Add it"),
    ],
)
def test_a_label_file_that_does_not_fit_is_named(flat, tmp_path, text, match):
    (tmp_path / "labels.txt").write_text(text)
    refused(match, flat, tmp_path, labels=tmp_path / "labels.txt")


def test_a_missing_label_file_is_named(flat, tmp_path):
    refused("cannot read the label file .*nowhere", flat, tmp_path, labels=tmp_path / "nowhere")


def test_a_flat_folder_without_images_is_named(tmp_path):
    (tmp_path / "val").mkdir()
    refused("val holds no images.*--labels", tmp_path / "val", tmp_path, labels=tmp_path / "x")


def test_a_missing_flat_folder_is_named(tmp_path):
    refused("cannot list the image folder .*val", tmp_path / "val", tmp_path, labels="x")


# WebDataset tars


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def samples(numbers):
    for number in numbers:
        yield f"{number:04d}.cls", str(number % 3).encode()
        yield f"{number:04d}.jpg", jpeg_bytes(number)
        yield f"{number:04d}.json", b"{}"


def test_tar_shards_are_read_in_order(tmp_path):
    write_tar(tmp_path / "train-0000.tar", samples(range(5)))
    write_tar(tmp_path / "train-0001.tar", samples(range(5, 8)))
    stored, labels, sources, beton = converted(tmp_path, tmp_path)
    assert stored == [jpeg_bytes(number) for number in range(8)]
    assert labels == [number % 3 for number in range(8)]
    assert sources[5] == "train-0001.tar/0005.jpg"
    assert beton.class_names is None


def test_a_pattern_names_the_shards_of_one_split(tmp_path):
    write_tar(tmp_path / "train-0000.tar", samples(range(5)))
    write_tar(tmp_path / "val-0000.tar", samples(range(3)))
    stored, *_ = converted(tmp_path / "val-*.tar", tmp_path)
    assert len(stored) == 3


def test_shards_of_several_splits_in_one_folder_are_refused(tmp_path):
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "train-0000.tar", samples(range(5)))
    write_tar(tmp_path / "shards" / "val-0000.tar", samples(range(3)))
    refused(r"several splits \(train, val\).*val-\*.tar", tmp_path / "shards", tmp_path)


def test_left_over_tars_beside_class_folders_are_not_taken_for_the_data(tmp_path):
    root = write_image_folder(tmp_path / "images")
    write_tar(root / "n01440764.tar", [("a.JPEG", b"x")])
    refused(r"images holds both folders and \.tar files.*or move them away", root, tmp_path)


def test_names_that_climb_out_of_the_folder_stay_data(tmp_path):
    (tmp_path / "shards").mkdir()
    files = [
        ("../../evil.jpg", jpeg_bytes(0)),
        ("../../evil.cls", b"0"),
        ("/abs/olute.jpg", jpeg_bytes(1)),
        ("/abs/olute.cls", b"1"),
    ]
    write_tar(tmp_path / "shards" / "a.tar", files)
    before = sorted(tmp_path.rglob("*"))
    _, labels, sources, _ = converted(tmp_path / "shards", tmp_path)
    assert labels == [0, 1]
    assert sources == ["a.tar/../../evil.jpg", "a.tar//abs/olute.jpg"]
    made = {path.name for path in set(tmp_path.rglob("*")) - set(before)}
    assert made == {"out.beton", "out.beton.manifest.parquet"}


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ([("a.jpg", b"x")], r"sample 'a' of .*a.tar has no .cls file; it has jpg"),
        ([("a.cls", b"1")], r"sample 'a' of .*a.tar has no image; it has cls"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "has the class b'cat'.*number of a class"),
        ([("a.jpg", b"x"), ("a.cls", b"1_0")], "has the class b'1_0'.*number of a class"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "has the class b'-1'.*number of a class"),
        (
            [("a.jpg", b"x"), ("a.cls", b"1"), ("a.jpg", b"y")],
            r"sample 'a' of .*a.tar has two \.jpg files",
        ),
        ([("a.jpg", b"x"), ("a.cls", b"0")], "a.tar/a.jpg: it is no image"),
        (
            [("a.jpg", jpeg_bytes(0)), ("a.cls", b"9" * 40)],
            r"label is 9.*must lie in \[0, 1,000,000",
        ),
        ([], "hold no samples"),
    ],
)
def test_a_tar_with_a_bad_sample_is_named(tmp_path, files, match):
    write_tar(tmp_path / "a.tar", files)
    refused(match, tmp_path / "a.tar", tmp_path)


def test_a_compressed_tar_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", samples(range(3)), mode="w:gz")
    refused(
        "a.tar cannot be read as an uncompressed tar.*decompress it", tmp_path / "a.tar", tmp_path
    )


def test_a_cut_tar_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", samples(range(3)))
    content = (tmp_path / "a.tar").read_bytes()
    place = content.index(jpeg_bytes(2))
    (tmp_path / "a.tar").write_bytes(content[: place + 100])
    refused("a.tar is cut: '0002.jpg' should end at byte", tmp_path / "a.tar", tmp_path)


@pytest.mark.parametrize("rest", [b"", b"0002", b"\xff" * 512], ids=["cut", "cut header", "damage"])
def test_a_tar_that_stops_before_its_end_mark_is_named(tmp_path, rest):
    write_tar(tmp_path / "a.tar", samples(range(3)))
    with tarfile.open(tmp_path / "a.tar") as archive:
        place = archive.getmember("0002.cls").offset
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:place] + rest)
    refused(f"a.tar is cut or damaged: byte {place:,} starts", tmp_path / "a.tar", tmp_path)


# Hugging Face style Parquet


def write_parquet(path, numbers, *, label="label", names=None, **kwargs):
    images = [{"bytes": jpeg_bytes(number), "path": f"{number}.jpg"} for number in numbers]
    table = pa.table(
        {
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            label: pa.array([number % 3 for number in numbers], pa.int64()),
        }
    )
    if names:
        features = {label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    pq.write_table(table, path, **kwargs)


def test_parquet_files_are_read_in_order_with_their_class_names(tmp_path):
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    names = ["cat", "dog", "frog"]
    write_parquet(data / "train-00000-of-00002.parquet", range(5), names=names, row_group_size=2)
    write_parquet(data / "train-00001-of-00002.parquet", range(5, 8), names=names)
    stored, labels, sources, beton = converted(tmp_path / "set", tmp_path)
    assert stored == [jpeg_bytes(number) for number in range(8)]
    assert labels == [number % 3 for number in range(8)]
    assert sources[6] == "train-00001-of-00002.parquet#1"
    assert beton.class_names == ("cat", "dog", "frog")


def test_parquet_tells_about_how_large_images_are_so_that_no_worker_holds_too_many(tmp_path):
    write_parquet(tmp_path / "a.parquet", range(20), row_group_size=10)
    sizes = ParquetSource([tmp_path / "a.parquet"]).list_images().sizes
    mean_bytes = np.mean([len(jpeg_bytes(number)) for number in range(20)])
    assert sizes.shape == (20,)
    assert mean_bytes <= sizes.mean() < 2 * mean_bytes  # labels and names count, too


def test_parquet_splits_in_one_folder_are_refused(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00001.parquet", range(2))
    write_parquet(tmp_path / "test-00000-of-00001.parquet", range(2))
    refused(r"several splits \(test, train\)", tmp_path, tmp_path)


def test_a_parquet_file_without_labels_is_named_with_its_columns(tmp_path):
    table = pa.table({"image": pa.array([b"x"]), "caption": ["a cat"]})
    pq.write_table(table, tmp_path / "a.parquet")
    refused(
        r"no label column .*its columns are image \(binary\), caption",
        tmp_path / "a.parquet",
        tmp_path,
    )


def test_a_parquet_file_without_images_is_named_with_its_columns(tmp_path):
    pq.write_table(pa.table({"label": [1]}), tmp_path / "a.parquet")
    refused("no image column .*its columns are label", tmp_path / "a.parquet", tmp_path)


def test_null_images_and_labels_are_named(tmp_path):
    table = pa.table({"image": pa.array([None], pa.binary()), "label": [0]})
    pq.write_table(table, tmp_path / "a.parquet")
    refused("a.parquet#0: it has no bytes", tmp_path / "a.parquet", tmp_path)
    table = pa.table({"image": [b"x"], "label": pa.array([None], pa.int64())})
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(ConversionError, match=r"b\.parquet has 1 rows without a label"):
        convert(tmp_path / "b.parquet", tmp_path / "out.beton")


def test_an_empty_parquet_file_is_named(tmp_path):
    table = pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())})
    pq.write_table(table, tmp_path / "a.parquet")
    refused("a.parquet and its like hold no rows", tmp_path / "a.parquet", tmp_path)


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    refused("a.parquet cannot be read as Parquet", tmp_path / "a.parquet", tmp_path)


def test_unlabeled_rows_marked_minus_one_are_refused(tmp_path):
    table = pa.table({"image": [jpeg_bytes(0)], "label": [-1]})
    pq.write_table(table, tmp_path / "a.parquet")
    refused(r"a.parquet#0: its label is -1.*\[0, 1,000,000\)", tmp_path / "a.parquet", tmp_path)


def test_parquet_rows_cannot_be_shuffled(tmp_path):
    write_parquet(tmp_path / "a.parquet", range(3))
    with pytest.raises(InvalidValueError, match="shuffle_seed cannot be used with Parquet"):
        convert(tmp_path / "a.parquet", tmp_path / "out.beton", shuffle_seed=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet"]


# Datasets


class Pairs:
    classes = ("cat", "dog")

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def test_dataset_of_bytes_arrays_pictures_and_dicts(tmp_path):
    pixels = np.asarray(picture(3))
    dataset = Pairs(
        [
            (jpeg_bytes(0), 0),
            (picture(1), np.int64(1)),
            (pixels, 1),
            (pixels[..., 0], 0, "more"),
            {"image": jpeg_bytes(4), "label": 1},
        ]
    )
    stored, labels, sources, beton = converted(dataset, tmp_path)
    assert (stored[0], stored[4]) == (jpeg_bytes(0), jpeg_bytes(4))
    assert labels == [0, 1, 1, 0, 1]
    assert sources == ["0", "1", "2", "3", "4"]
    assert beton.class_names == ("cat", "dog")
    actions = beton.manifest.table()["action"].to_pylist()
    assert actions == ["copied", "transcoded", "transcoded", "transcoded", "copied"]


def test_dataset_that_cannot_be_pickled_is_converted(tmp_path):
    class Local(Pairs):
        """Pickle finds no class inside a function."""

    stored, *_ = converted(Local([(jpeg_bytes(0), 0)]), tmp_path)
    assert stored == [jpeg_bytes(0)]


@pytest.mark.parametrize(
    ("sample", "match"),
    [
        ((jpeg_bytes(0), "cat"), "Pairs/1: its label is 'cat', but must be an integer"),
        ((jpeg_bytes(0), 2), r"Pairs/1: its label is 2, but labels must lie in \[0, 2\)"),
        (([1, 2], 0), "Pairs/1: it is a list, but must be a PIL image"),
        ((np.zeros((4, 4, 4), np.uint8), 0), r"its pixels are uint8 of shape \(4, 4, 4\)"),
        ((np.zeros((4, 4, 3), np.float32), 0), "its pixels are float32"),
        ((Image.new("RGB", (0, 4)), 0), "Pairs/1: reading it failed with"),
        ({"img": 0}, r"Pairs/1: reading it failed with KeyError\('image'\)"),
    ],
)
def test_a_bad_sample_is_named(tmp_path, sample, match):
    refused(match, Pairs([(jpeg_bytes(0), 0), sample]), tmp_path)


def test_skipped_samples_have_no_class_that_nobody_told(tmp_path):
    dataset = Pairs([(jpeg_bytes(0), 1), (b"bad", 0)])
    manifest = convert(dataset, tmp_path / "out.beton", on_error="skip")
    lines = manifest.table(["label", "class_name", "action"]).to_pylist()
    assert [tuple(line.values()) for line in lines] == [
        (1, "dog", "copied"),
        (-1, None, "skipped"),
    ]


def test_an_empty_dataset_is_named(tmp_path):
    refused("the dataset Pairs is empty", Pairs([]), tmp_path)


def test_what_is_neither_path_nor_dataset_is_refused(tmp_path):
    with pytest.raises(InvalidValueError, match=re.escape("images is a int, but must be a path")):
        convert(7, tmp_path / "out.beton")
