"""The demo's images: drawn, or the user's, split in train and val."""

import os
from pathlib import Path

import numpy as np

from fastprune.demo.pictures import write_demo_images
from fastprune.errors import ConversionError

_VAL_NAMES = ("val", "validation", "test")
_VAL_SHARE = 0.1
_DRAWN_TRAIN_PER_CLASS = 300
_DRAWN_VAL_PER_CLASS = 100


def prepare_images(
    images: Path | None, root: Path, *, per_class: int | None, seed: int = 0
) -> tuple[Path, Path]:
    """Give two ImageFolders, one to train on and one to validate on.

    The user's images are linked, not copied. A folder that holds `train` and one of `val`,
    `validation`, `test` is taken as split; from another, a tenth of every class is held out.

    Args:
        images: an ImageFolder; None draws pictures.
        root: folder to fill.
        per_class: training images per class at most, drawn at random; the validation images are
            then at most half as many. None for all.
        seed: of the drawing and of the choice.

    Returns:
        The train folder and the val folder.

    Raises:
        ConversionError: `images` is no folder, has no class folders, or a class is too small.
    """
    train, val = root / "train", root / "val"
    if images is None:
        count = per_class or _DRAWN_TRAIN_PER_CLASS
        val_count = min(_DRAWN_VAL_PER_CLASS, max(count // 2, 1))
        write_demo_images(root, train_per_class=count, val_per_class=val_count, seed=seed)
        return train, val
    generator = np.random.default_rng(seed)
    val_limit = None if per_class is None else max(per_class // 2, 1)
    given_val = _given_val(images)
    for name, files in _classes(images / "train" if given_val else images).items():
        files = [files[i] for i in generator.permutation(len(files))]
        if given_val is None:
            held_out = max(round(len(files) * _VAL_SHARE), 1)
            if len(files) < 2:
                raise ConversionError(
                    f"{images / name} holds one file; train and val need one each. Add images "
                    "to this class or remove its folder."
                )
            _link(files[:held_out][:val_limit], val / name)
            files = files[held_out:]
        _link(files[:per_class], train / name)
    if given_val is not None:
        for name, files in _classes(given_val).items():
            files = [files[i] for i in generator.permutation(len(files))]
            _link(files[:val_limit], val / name)
    return train, val


def _given_val(images: Path) -> Path | None:
    """The folder of validation images, where the user's images are split already."""
    if not (images / "train").is_dir():
        return None
    return next((images / name for name in _VAL_NAMES if (images / name).is_dir()), None)


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its files; every class must have some."""
    if not folder.is_dir():
        raise ConversionError(f"{folder} is no folder. Name one that holds a folder per class.")
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise ConversionError(f"{folder} holds no class folders. Put every class in its own.")
    classes = {
        name: sorted(path for path in (folder / name).iterdir() if path.is_file()) for name in names
    }
    for name, files in classes.items():
        if not files:
            raise ConversionError(
                f"{folder / name} holds no images. Add some or remove the folder."
            )
    return classes


def _link(files: list[Path], folder: Path) -> None:
    """Symbolic links to the files, under their names."""
    folder.mkdir(parents=True)
    for file in files:
        (folder / file.name).symlink_to(file.resolve())
