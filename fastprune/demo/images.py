"""The demo's images, drawn or the user's, split into train and val."""

import os
from pathlib import Path

import numpy as np

from fastprune.base.errors import ConversionError
from fastprune.beton.convert.folders import EXTENSIONS
from fastprune.demo.pictures import write_demo_images

# CIFAR's folders have `test`, ImageNet's `val`.
_VAL_NAMES = ("val", "validation", "test")
_VAL_SHARE = 0.1
_DRAWN_TRAIN_PER_CLASS = 150
_DRAWN_VAL_PER_CLASS = 75


def prepare_images(
    images: Path | None, root: Path, *, per_class: int | None, seed: int = 0
) -> tuple[Path, Path]:
    """Make two ImageFolders, one to train on and one to validate on.

    The user's images are linked, not copied. A folder that holds `train` and one of `val`,
    `validation`, `test` counts as split; else a tenth of every class is held out, of the classes in
    `train` if that folder holds folders.

    Args:
        images: an ImageFolder; None draws pictures.
        root: folder to fill.
        per_class: training images per class at most, drawn at random; the validation images are
            then at most half as many. None for all.
        seed: of the drawing and of the choice.

    Returns:
        The train folder and the val folder.

    Raises:
        ConversionError: `images` is not a folder, has no class folders, or a class is too small.
    """
    train, val = root / "train", root / "val"
    if images is None:
        count = per_class or _DRAWN_TRAIN_PER_CLASS
        val_count = min(_DRAWN_VAL_PER_CLASS, max(count // 2, 1))
        write_demo_images(root, train_per_class=count, val_per_class=val_count, seed=seed)
        return train, val
    generator = np.random.default_rng(seed)
    val_limit = None if per_class is None else max(per_class // 2, 1)
    given_train, given_val = _given_split(images)
    for name, files in _classes(given_train).items():
        # Shuffled first: neighbors in a folder are often similar.
        files = [files[i] for i in generator.permutation(len(files))]
        if given_val is None:
            held_out = max(round(len(files) * _VAL_SHARE), 1)
            if len(files) < 2:
                raise ConversionError(
                    f"{given_train / name} holds one image; train and val need one each. Add "
                    "images to this class or remove its folder."
                )
            _link(files[:held_out][:val_limit], given_train, val)
            files = files[held_out:]
        _link(files[:per_class], given_train, train)
    if given_val is not None:
        for files in _classes(given_val).values():
            files = [files[i] for i in generator.permutation(len(files))]
            _link(files[:val_limit], given_val, val)
    return train, val


def _given_split(images: Path) -> tuple[Path, Path | None]:
    """Find the folder to train on and, where the images are split already, to validate on."""
    train = images / "train"
    if not train.is_dir():
        return images, None
    val = next((images / name for name in _VAL_NAMES if (images / name).is_dir()), None)
    # A folder of files is a class, not a split; trains are one of COCO's.
    if val is None and not any(path.is_dir() for path in train.iterdir()):
        return images, None
    return train, val


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Map class names to their images, at any depth below; every class must have some."""
    if not folder.is_dir():
        raise ConversionError(f"{folder} is not a folder. Name one that holds a folder per class.")
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise ConversionError(f"{folder} holds no class folders. Put every class in its own.")
    classes = {
        name: sorted(
            path
            for path in (folder / name).rglob("*")
            if path.suffix.lower() in EXTENSIONS and path.is_file()
        )
        for name in names
    }
    for name, files in classes.items():
        if not files:
            raise ConversionError(
                f"{folder / name} holds no images. Add some or remove the folder."
            )
    return classes


def _link(files: list[Path], source: Path, folder: Path) -> None:
    """Link files of `source` into `folder`, with the same names below it."""
    for file in files:
        link = folder / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.resolve())
