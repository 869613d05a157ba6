"""Other loaders over the same beton, to be measured beside ours: stock FFCV and torchvision."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

from fastprune.beton.beton import Beton
from fastprune.beton.opening import image_and_label


def stock_ffcv(
    beton: Beton, rows: NDArray[np.int64], *, batch_size: int, image_size: int, num_workers: int
) -> Any:
    """Make a plain `ffcv.Loader` with RandomResizedCrop and flip: uint8 batches."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.transforms import RandomHorizontalFlip

    stages = [RandomResizedCropRGBImageDecoder((image_size, image_size)), RandomHorizontalFlip()]
    return _ffcv_loader(beton, rows, stages, batch_size, num_workers)


def our_decoder_in_ffcv(
    beton: Beton, rows: NDArray[np.int64], *, batch_size: int, image_size: int, num_workers: int
) -> Any:
    """Make the same `ffcv.Loader` with our decoder in place of FFCV's."""
    from fastprune.adapters.ffcv import ViewDecoder

    return _ffcv_loader(beton, rows, [ViewDecoder(image_size)], batch_size, num_workers)


def _ffcv_loader(
    beton: Beton, rows: NDArray[np.int64], stages: list[Any], batch_size: int, num_workers: int
) -> Any:
    """Make a loader with these stages, and with FFCV's side effects on thread counts."""
    import ffcv

    image, label = image_and_label(beton.fields, beton.path)
    pipelines: dict[str, Any] = {field.name: None for field in beton.fields}
    pipelines[beton.fields[image].name] = stages
    del pipelines[beton.fields[label].name]
    return ffcv.Loader(
        str(beton.path),
        batch_size,
        num_workers=num_workers,
        order=ffcv.loader.OrderOption.RANDOM,
        indices=rows,
        pipelines=pipelines,
        drop_last=False,
    )


def torchvision_loader(
    beton: Beton, rows: NDArray[np.int64], *, batch_size: int, image_size: int, num_workers: int
) -> Any:
    """Make a DataLoader whose processes decode and crop with torchvision: uint8 batches."""
    return DataLoader(
        _JpegViews(beton, rows, image_size),
        batch_size,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )


class _JpegViews(Dataset[tuple[torch.Tensor, int]]):
    """The rows as a map-style dataset of random views."""

    def __init__(self, beton: Beton, rows: NDArray[np.int64], image_size: int):
        self._path = str(beton.path)
        self._labels = beton.labels[rows]
        self._offsets = beton.offsets[rows]
        self._sizes = beton.sizes[rows]
        self._view = v2.Compose(
            [v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        jpeg = np.fromfile(
            self._path, np.uint8, count=self._sizes[index], offset=self._offsets[index]
        )
        image = decode_jpeg(torch.from_numpy(jpeg), mode="RGB")
        return self._view(image), int(self._labels[index])
