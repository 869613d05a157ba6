"""Settings of the demo."""

from pathlib import Path

from pydantic import Field

from fastprune.settings.domains import Count, File, Pixels, Settings, Share


class DemoSettings(Settings):
    """Which images the demo shows, and how long it takes."""

    images: File | None = Field(
        None,
        description="ImageFolder to use, with or without train/ and val/ in it; by default "
        "generated pictures.",
    )
    out: File = Field(Path("demo"), description="folder to write; an earlier demo is replaced.")
    keep: Share = Field(0.5, description="share of the rows that the pruned runs keep.")
    epochs: Count = Field(12, description="passes of every student over its rows.")
    seeds: Count = Field(1, description="students per kind of run, each with another seed.")
    teacher: str = Field("resnet20", description="network of the teacher.")
    teacher_checkpoint: File | None = Field(
        None, description="weights of the teacher; by default it is trained first."
    )
    teacher_epochs: Count = Field(
        10, description="passes of the teacher over all rows, if it is trained."
    )
    student: str = Field("resnet8", description="network of the students.")
    per_class: Count | None = Field(None, description="most training images per class.")
    image_size: Pixels | None = Field(
        None, description="side of a view, in pixels; by default the images', at most 32."
    )
