"""Settings of the loader: how a row is looked at, in which order, and how it is delivered."""

from typing import Annotated, Literal

from pydantic import Field

from fastprune.settings.domains import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augment,
    Backend,
    Count,
    Deviations,
    Device,
    ImageDtype,
    Means,
    Pixels,
    Seed,
    Settings,
    Threads,
)

BatchField = Literal[
    "images", "labels", "rows", "teacher_logits", "contrast_rows", "second_images", "host_rows"
]


class ViewSettings(Settings):
    """How a view of a row is taken."""

    image_size: Pixels = Field(224, description="side of the square images, in pixels.")
    augment: Augment | None = Field(
        None,
        description='how views are taken: "rrc" (RandomResizedCrop and flip; default for training '
        'above 64 pixels), "pad_crop" (shift and flip; default for training up to 64 pixels), '
        '"center" (the central square, 0.875 of the shorter side above 64 pixels, all of it up to '
        'there; default for evaluation), or "none" (the whole image).',
    )
    mean: Means = Field(
        IMAGENET_MEAN, description="mean per channel of pixel values in [0, 1], for normalization."
    )
    std: Deviations = Field(
        IMAGENET_STD, description="standard deviation per channel of pixel values in [0, 1]."
    )
    num_views: Count | None = Field(
        None,
        description="K: epoch e shows the views of slot e mod K, so that K views of each row "
        "recur; by default the teacher cache's K, or new views in each epoch.",
    )


class OrderSettings(Settings):
    """In which order an epoch gives its rows."""

    order: Literal["random", "sequential", "pages"] | None = Field(
        None,
        description='"random" (default for training), "sequential" (default for evaluation), or '
        '"pages" (random within a sliding set of pages of the file, for storage that is read by '
        "page).",
    )
    open_pages: Count = Field(64, description='pages that the order "pages" draws from at a time.')
    tail: Literal["drop", "pad", "exact"] | None = Field(
        None,
        description='rows that fill no batch: "drop" them (default for training), "pad" the batch '
        'with repeated rows, or "exact" for a smaller last batch (default for evaluation).',
    )
    seed: Seed = Field(0, description="seed of the order and the views.")


class LoaderSettings(ViewSettings, OrderSettings):
    """Everything that a loader is told, but for the objects it is given."""

    batch_size: Count = Field(256, description="rows per batch and rank.")
    train: bool = Field(
        True, description="training or evaluation: chooses the defaults of augment, order and tail."
    )
    backend: Backend = Field(
        "auto",
        description='engine that decodes: "cpu", or "dali" for NVIDIA DALI on the device; "auto" '
        'is "cpu". Rows and boxes are the same, pixels differ by the filters\' arithmetic.',
    )
    device: Device = Field(
        "auto", description='where batches are delivered; "auto" is CUDA if it is available.'
    )
    dtype: ImageDtype = Field(
        "float32",
        description='of the images: "float32", "float16" or "bfloat16" (normalized), or "uint8" '
        "(pixels as they are). Torch's dtypes are accepted too.",
    )
    fields: Annotated[tuple[BatchField, ...], Field(min_length=1)] = Field(
        ("images", "labels"),
        description="tensors of a batch, in this order: images (B, 3, S, S); labels (B,); rows "
        "(B,), of the beton; teacher_logits (B, C) float32, from the teacher cache; contrast_rows "
        "(B, 1 + num_negatives), the row itself and rows of other classes; second_images, another "
        "view of each row; host_rows, the rows on the host.",
    )
    num_negatives: Count = Field(
        16_384, description='rows of other classes for each row in "contrast_rows".'
    )
    on_error: Literal["raise", "skip"] = Field(
        "raise",
        description='"raise" a LoadingError for a row that cannot be decoded, or "skip" it.',
    )
    verify_crc: bool | None = Field(
        None,
        description="compare a row's bytes with the manifest's CRC-32C: True at each read, False "
        "never; by default at the first, if the beton has a manifest.",
    )
    num_workers: Threads | None = Field(
        None, description="decoding threads; by default one per CPU that this rank may use."
    )
