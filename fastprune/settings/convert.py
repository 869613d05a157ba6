"""Settings of a conversion."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fastprune.settings.domains import File, Integer, Seed, Settings, Threads

MAX_SHARDS = 100_000
_MAX_JPEG_SIDE = 65_500  # libjpeg's limit


class ImageSettings(Settings):
    """How an image is stored; the same settings give the same bytes."""

    jpeg: Literal["auto", "fast", "original"] = Field(
        "auto",
        description='"auto" rewrites JPEGs of at least 16 KiB without loss, so that views of them '
        'decode faster on the CPU; "fast" rewrites all of them, "original" copies every byte.',
    )
    quality: Annotated[Integer, Field(ge=1, le=100)] = Field(
        95, description="JPEG quality of transcoded images."
    )
    max_side: Annotated[Integer, Field(ge=1, le=_MAX_JPEG_SIDE)] | None = Field(
        None, description="shrink images with a longer side, in pixels."
    )
    exif: Literal["ignore", "apply"] = Field(
        "ignore",
        description='EXIF orientation: "ignore" it as FFCV and torchvision do, or "apply" it to '
        "the pixels.",
    )
    verify: bool = Field(
        False, description="decode every image once, to find damage inside its data."
    )


class ConvertSettings(ImageSettings):
    """How images become a beton."""

    labels: File | None = Field(
        None, description='a file of "name class" lines, for a flat folder of images.'
    )
    unlabeled: bool = Field(
        False,
        description="leave classes out: every label is 0, and a folder may be any tree of images.",
    )
    workers: Threads | None = Field(
        None, description="threads; by default one per usable CPU, at most 16."
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop",
        description='"stop" at the first unreadable image, or "skip" it and list it in the '
        "manifest.",
    )
    classes_from: File | None = Field(
        None, description="number the classes as in this beton or manifest."
    )
    shuffle_seed: Seed | None = Field(
        None, description="put the rows in a random order of this seed; the manifest has the map."
    )
    resume: bool = Field(
        False, description="resume from the partial file of an interrupted run, if there is one."
    )
    keep_partial: bool = Field(
        False, description="leave the partial file for a later resume when the conversion fails."
    )
    shards: Annotated[Integer, Field(ge=1, le=MAX_SHARDS)] | None = Field(
        None, description="write a folder of this many betons, used as one."
    )
    shard: Annotated[Integer, Field(ge=0)] | None = Field(
        None, description="make this shard alone, counted from 0."
    )

    @model_validator(mode="after")
    def _check_fit(self) -> Self:
        """Refuse settings that contradict each other."""
        if self.shard is not None and self.shard >= (self.shards or 0):
            raise ValueError(f"shard must lie in [0, {self.shards or 0:,}), not {self.shard:,}")
        if self.unlabeled and self.classes_from is not None:
            raise ValueError(
                f"classes_from ({self.classes_from}) numbers classes, but unlabeled leaves them "
                "out. Remove one of them (--classes-from, --no-labels)"
            )
        return self
