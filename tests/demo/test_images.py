import pytest

from fastprune.base.errors import ConversionError
from fastprune.demo.images import prepare_images
from tests.images import write_image_folder


def count(folder):
    return {p.name: len(list(p.iterdir())) for p in sorted(folder.iterdir())}


def test_a_tenth_of_every_class_is_held_out_of_an_unsplit_folder(tmp_path):
    write_image_folder(tmp_path / "mine", classes=2, per_class=20)
    train, val = prepare_images(tmp_path / "mine", tmp_path / "images", per_class=None)
    assert count(train) == {"class_00": 18, "class_01": 18}
    assert count(val) == {"class_00": 2, "class_01": 2}
    for name in ("class_00", "class_01"):
        names = [p.name for folder in (train, val) for p in (folder / name).iterdir()]
        assert len(set(names)) == 20


@pytest.mark.parametrize("val_name", ["val", "validation", "test"])
def test_split_folder_is_taken_as_it_is(tmp_path, val_name):
    write_image_folder(tmp_path / "mine" / "train", classes=2, per_class=4)
    write_image_folder(tmp_path / "mine" / val_name, classes=2, per_class=3)
    train, val = prepare_images(tmp_path / "mine", tmp_path / "images", per_class=None)
    assert (count(train)["class_01"], count(val)["class_01"]) == (4, 3)


def test_per_class_limits_both_splits(tmp_path):
    write_image_folder(tmp_path / "mine", classes=2, per_class=20)
    train, val = prepare_images(tmp_path / "mine", tmp_path / "images", per_class=2)
    assert (count(train)["class_00"], count(val)["class_00"]) == (2, 1)


def test_images_are_linked_not_copied(tmp_path):
    write_image_folder(tmp_path / "mine", classes=1, per_class=3)
    train, _ = prepare_images(tmp_path / "mine", tmp_path / "images", per_class=None)
    assert all(path.is_symlink() and path.exists() for path in (train / "class_00").iterdir())


def test_files_that_are_no_images_are_left_out_and_folders_in_a_class_are_not(tmp_path):
    write_image_folder(tmp_path / "mine", classes=2, per_class=4)
    (tmp_path / "mine" / "class_00" / "Thumbs.db").write_bytes(b"no image")
    (tmp_path / "mine" / "class_00" / "more").mkdir()
    image = tmp_path / "mine" / "class_00" / "000.jpg"
    image.rename(image.parent / "more" / "001.JPG")
    train, val = prepare_images(tmp_path / "mine", tmp_path / "images", per_class=None)
    linked = {
        path.relative_to(folder / "class_00").as_posix()
        for folder in (train, val)
        for path in (folder / "class_00").rglob("*")
        if path.is_symlink()
    }
    assert linked == {"001.jpg", "002.jpg", "003.jpg", "more/001.JPG"}


def test_train_folder_without_a_val_folder_is_split(tmp_path):
    write_image_folder(tmp_path / "mine" / "train", classes=2, per_class=4)
    train, val = prepare_images(tmp_path / "mine", tmp_path / "images", per_class=None)
    assert (count(train)["class_01"], count(val)["class_01"]) == (3, 1)


def test_class_that_is_called_train_is_a_class(tmp_path):
    write_image_folder(tmp_path / "mine", classes=2, per_class=4)
    (tmp_path / "mine" / "class_01").rename(tmp_path / "mine" / "train")
    train, _ = prepare_images(tmp_path / "mine", tmp_path / "images", per_class=None)
    assert count(train) == {"class_00": 3, "train": 3}


def test_pictures_are_drawn_where_no_folder_is_given(tmp_path):
    train, val = prepare_images(None, tmp_path / "images", per_class=2)
    assert (count(train)["star"], count(val)["star"]) == (2, 1)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ConversionError, match=r"nowhere is not a folder"):
        prepare_images(tmp_path / "nowhere", tmp_path / "images", per_class=None)


def test_folder_without_classes_is_named(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConversionError, match="mine holds no class folders"):
        prepare_images(tmp_path / "mine", tmp_path / "images", per_class=None)


def test_class_without_images_is_named(tmp_path):
    write_image_folder(tmp_path / "mine", classes=1)
    (tmp_path / "mine" / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"empty holds no images\. Add some or remove"):
        prepare_images(tmp_path / "mine", tmp_path / "images", per_class=None)


def test_class_that_cannot_be_split_is_named(tmp_path):
    write_image_folder(tmp_path / "mine", classes=1, per_class=1)
    with pytest.raises(ConversionError, match="class_00 holds one image; train and val need one"):
        prepare_images(tmp_path / "mine", tmp_path / "images", per_class=None)
