"""Settings of a network's pass over the images: for scores, a teacher cache, or an accuracy."""

from typing import Annotated

from pydantic import Field

from fastprune.settings.domains import (
    Augment,
    Backend,
    CacheDtype,
    Count,
    Deviations,
    Device,
    File,
    Integer,
    Means,
    Pixels,
    Precision,
    Seed,
    Settings,
    Threads,
)

# Names of what a pass measures for each row. Without labels: the distance to the center of the
# row's cluster, and metrics of the logits alone.
CLUSTER_METRIC = "prototype"
LABEL_FREE_METRICS = ("entropy", "confidence", "logit_std")
FEATURE_METRICS = ("centroid", "centroid_median")
LOGIT_METRICS = ("loss", "el2n", "grand_last", "margin", *LABEL_FREE_METRICS)
# Kept in score tables, but it does not measure how hard a row is.
NOT_DIFFICULTIES = ("logit_std",)


class PassSettings(Settings):
    """Which weights a teacher has, what it is shown, and how it is run."""

    checkpoint: File | None = Field(
        None,
        description="the teacher's weights: safetensors or a PyTorch checkpoint; a student of "
        "fastprune names its network.",
    )
    weights: str | None = Field(
        None,
        description="the teacher's published weights, such as IMAGENET1K_V2; by default the best "
        "ones, unless there is a checkpoint.",
    )
    num_classes: Count | None = Field(
        None,
        description="C, logits of the teacher; by default the beton's number of classes, and the "
        "teacher's own if labels are not used.",
    )
    image_size: Pixels | None = Field(
        None,
        description="side of the images, in pixels; by default the teacher's, else the median "
        "shorter side up to 64 pixels, and 224 for larger images.",
    )
    mean: Means | None = Field(
        None,
        description="mean per channel of pixel values in [0, 1]; by default the teacher's, else "
        "ImageNet's.",
    )
    std: Deviations | None = Field(
        None,
        description="standard deviation per channel of pixel values; by default the teacher's, "
        "else ImageNet's.",
    )
    augment: Augment | None = Field(
        None,
        description="how training views are taken, as in the training to come; by default the "
        "loader's at this size.",
    )
    num_views: Count | None = Field(
        None,
        description="K, how many views of each row recur in the training (data.num_views); by "
        "default as the cache has it.",
    )
    seed: Seed = Field(0, description="seed of the training views.")
    batch_size: Count = Field(256, description="images per step and rank.")
    device: Device = Field(
        "auto", description='the teacher\'s device; "auto" is CUDA if it is available.'
    )
    precision: Precision = Field(
        "auto",
        description='the teacher\'s arithmetic: "fp32", "bf16" (autocast), or "auto" for bf16 on '
        "CUDA devices that support it.",
    )
    compile_teacher: bool = Field(False, description="run the teacher through torch.compile.")
    backend: Backend = Field(
        "auto", description='engine that decodes: "cpu" or "dali"; "auto" is "cpu".'
    )
    num_workers: Threads | None = Field(
        None, description="decoding threads; by default one per usable CPU."
    )


class ScoreSettings(PassSettings):
    """How every row is scored."""

    num_clusters: Count | None = Field(
        None,
        description="K, to score without labels: rows are grouped into K clusters of the teacher's "
        "features, and their difficulty is the cosine distance to the center of their cluster.",
    )
    feature_layer: str | None = Field(
        None,
        description="layer whose output is the feature vector; by default the input of the "
        "classifier.",
    )
    views: Annotated[Integer, Field(ge=0, lt=2**31)] = Field(
        0,
        description="training views that are averaged, view i being slot i of the training to "
        "come; 0 for the center crop.",
    )
    cache: File | None = Field(
        None, description="teacher cache that keeps the logits of these views for the training."
    )
    cache_dtype: CacheDtype | None = Field(
        None, description='of a new cache: "float16" (default), "float32" or "uint8".'
    )
    resume: bool = Field(
        True, description="resume an unfinished pass of the same teacher and views."
    )
    keep_features: bool = Field(
        False, description="leave the features beside the table (.features.npy)."
    )


class FillSettings(PassSettings):
    """How a teacher cache is filled."""

    dtype: CacheDtype | None = Field(
        None, description='of a new cache: "float16" (default), "float32" or "uint8".'
    )
    slots: tuple[Annotated[Integer, Field(ge=0)], ...] | None = Field(
        None, description="views to fill, each in [0, num_views); by default all."
    )


class EvaluateSettings(Settings):
    """How a trained network is evaluated."""

    network: str | None = Field(
        None, description="name of the network; by default as the checkpoint names it."
    )
    image_size: Pixels | None = Field(
        None,
        description="side of the center crop, in pixels; by default as the checkpoint names it.",
    )
    batch_size: Count = Field(256, description="images per step.")
    device: Device = Field(
        "auto", description='device of torch; "auto" is CUDA if it is available.'
    )
    precision: Precision = Field(
        "auto",
        description='arithmetic: "fp32", "bf16", or "auto", as in the validations of the '
        "checkpoint's own training, fp32 if they are not recorded.",
    )
