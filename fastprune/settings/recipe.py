"""The settings of a training run: a recipe's sections."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from fastprune.settings.domains import (
    Backend,
    CacheDtype,
    Count,
    Device,
    File,
    Integer,
    Positive,
    Precision,
    Seed,
    Settings,
    Share,
    Threads,
    Weight,
)
from fastprune.settings.loader import ViewSettings


def _rising(points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    """Refuse points whose first coordinates do not rise."""
    if any(right[0] <= left[0] for left, right in pairwise(points)):
        raise ValueError("the points must rise")
    return points


_Points = Annotated[tuple[tuple[Share, Weight], ...], Field(min_length=1), AfterValidator(_rising)]
_Epochs = Annotated[Integer, Field(ge=0)]


class DataSettings(ViewSettings):
    """`[data]`: the images that the student is trained and evaluated on."""

    train: File = Field(description="beton to train on.")
    val: File | None = Field(None, description="beton to evaluate on; required with labels.")
    labels: bool = Field(
        True,
        description="false: learn from the teacher alone, whether the images have labels or not; "
        "nothing is validated then.",
    )
    subset: File | None = Field(
        None, description="index file of the rows to train on; by default all rows."
    )
    first_image_size: Count | None = Field(
        None,
        description="side in the first epochs, from where it rises to image_size in steps of "
        "image_size_step, each size for an equal share of the epochs.",
    )
    image_size_step: Count = Field(32, description="pixels between two sizes.")
    val_image_size: Count | None = Field(
        None, description="side of a validation view, in pixels; by default image_size."
    )
    batch_size: Count = Field(256, description="images per step and process.")
    backend: Backend = Field(
        "auto", description='engine that decodes: "cpu" or "dali"; "auto" is "cpu".'
    )
    num_workers: Threads | None = Field(
        None, description="decoding threads of a process; by default one per usable CPU."
    )
    service: str | None = Field(
        None,
        description="address of a loading service to take views from, or several separated by "
        "commas; by default the environment variable FASTPRUNE_SERVICE.",
    )
    # The token itself must stand neither in a recipe nor in a run's folder.
    service_token_file: File | None = Field(
        None,
        description="file with the token that the service asks for; by default the environment "
        "variable FASTPRUNE_SERVICE_TOKEN.",
    )
    seed: Seed | None = Field(
        None,
        description="seed of order, views and skipped rows; by default run.seed. Runs that share "
        "it share every view, and vary less among each other.",
    )

    @model_validator(mode="after")
    def _check_growth(self) -> Self:
        """Refuse images that would shrink."""
        if self.first_image_size is not None and self.first_image_size > self.image_size:
            raise ValueError(
                f"data.first_image_size = {self.first_image_size} must not be above "
                f"data.image_size = {self.image_size}"
            )
        return self


class NetworkSettings(Settings):
    """`[student]`: a network and where its weights come from; without either, they are random."""

    network: str = Field(
        description="of torchvision, timm:NAME, a small one of the literature, or "
        "package.module:function."
    )
    checkpoint: File | None = Field(None, description="file of weights.")
    weights: str | None = Field(
        None,
        description='published weights by name: "IMAGENET1K_V1" or "DEFAULT" for torchvision\'s '
        'networks, "pretrained" for timm\'s.',
    )


class TeacherSettings(NetworkSettings):
    """`[teacher]`: the network that teaches, and where its logits are kept."""

    cache: Path | None = Field(
        None,
        description="folder of its logits on recurring views (data.num_views), which the run "
        "reads and fills; without it the network is asked in every step.",
    )
    cache_dtype: CacheDtype | None = Field(
        None, description='of a new cache: "float16" (default), "float32" or "uint8".'
    )
    num_classes: Count | None = Field(
        None,
        description="its logits, with data.labels = false; by default as its checkpoint or "
        "published weights have it, else none.",
    )


class LossSettings(Settings):
    """`[loss]`: the weights of the loss terms. Without a teacher only `label_smoothing` counts."""

    cross_entropy_weight: Weight = Field(
        0.1, description="weight of the cross-entropy against the labels."
    )
    distillation: Literal["kd", "dkd"] = Field(
        "kd",
        description="D, distance of the student's logits from the teacher's: \"kd\" is T² times "
        'the Kullback-Leibler divergence; "dkd" weights its part about the label and its part '
        "about the other classes separately.",
    )
    distillation_weight: Weight | _Points = Field(
        0.9,
        description="weight of D: a number, or points [[keep ratio, weight], ...] between which it "
        "is linear in the keep ratio, and beyond which it is constant.",
    )
    distillation_warmup_epochs: _Epochs = Field(
        0, description="w: in epoch e = 1, 2, ... up to w, the weight of D is e/w of itself."
    )
    temperature: Positive = Field(4.0, description="T, softens both distributions.")
    target_weight: Weight = Field(1.0, description='α of "dkd", of the part about the label.')
    others_weight: Weight = Field(8.0, description='β of "dkd", of the part about other classes.')
    feature_weight: Weight = Field(
        0.0,
        description="weight of one minus the cosine between the student's projected penultimate "
        "features and the teacher's.",
    )
    projectors: Count = Field(
        3, description="linear maps whose mean projects the student's features."
    )
    reshaping: Literal["none", "class_std", "zscore"] = Field(
        "none",
        description='change of the teacher\'s logits: "class_std" gives each row the mean standard '
        "deviation of its class over the whole dataset (needs a subset that carries it), "
        '"zscore" standardizes teacher and student.',
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the label's probability that is spread over all classes."
    )

    @field_validator("distillation_weight", mode="wrap")
    @classmethod
    def _check_weight(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        """Report one fault, where pydantic reports one for a number and others for points."""
        try:
            return check(value)
        except ValidationError:
            raise ValueError(
                f"loss.distillation_weight is {value!r}, but must be a number >= 0, or points "
                "[[keep ratio, weight], ...] with rising keep ratios in (0, 1]"
            ) from None

    def distillation_weight_at(self, keep_ratio: float) -> float:
        """Interpolate the weight of the distillation at a keep ratio in (0, 1]."""
        if isinstance(self.distillation_weight, tuple):
            keep_ratios, weights = zip(*self.distillation_weight, strict=True)
            return float(np.interp(keep_ratio, keep_ratios, weights))
        return self.distillation_weight


class PruningSettings(Settings):
    """`[pruning]`: rows that are skipped while the student learns, chosen again in each epoch."""

    rule: Literal["infobatch"] = Field(
        description='"infobatch" skips rows at random whose last loss was below the mean, and '
        "weights the kept ones up, so that they count for the skipped ones."
    )
    skip_probability: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="of a row with such a loss."
    )
    full_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.125, description="share of the epochs, at the end, that skip nothing."
    )


class ScheduleSettings(Settings):
    """`[schedule]`: how long and how fast the student learns."""

    epochs: Count = Field(
        description="passes over the rows that are trained on, so time falls with the keep ratio."
    )
    fixed_iterations: bool = Field(
        False,
        description="take the steps of that many passes over all rows of the beton instead, in "
        "whole passes over the subset; milestones and warm-up stretch with them.",
    )
    learning_rate: Positive = Field(
        0.1, description='the first learning rate of SGD, or for "one_cycle" the highest.'
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of SGD.")
    nesterov: bool = Field(False, description="whether the momentum is Nesterov's.")
    weight_decay: Weight = Field(1e-4, description="L2 penalty on all parameters.")
    policy: Literal["step", "cosine", "one_cycle"] = Field(
        "step",
        description='"step" multiplies the rate by gamma at each of milestones; "cosine" falls to '
        'zero; "one_cycle" rises over the first warmup_share of the steps and falls to zero.',
    )
    milestones: tuple[Count, ...] = Field(
        (), description='epochs at which "step" lowers the learning rate.'
    )
    gamma: Positive = Field(0.1, description="factor of each milestone.")
    warmup_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.25, description='share of the steps in which "one_cycle" rises.'
    )
    warmup_epochs: _Epochs = Field(
        0, description='epochs in which "step" and "cosine" first rise, from 4% of the rate.'
    )
    clip_norm: Positive | None = Field(
        None, description="the longest gradient, over all parameters; by default any."
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="share that a running average of the weights keeps at each step, such as "
        "0.999; the average is then evaluated and saved.",
    )

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        """Refuse a rise that the policy does not have, or that never ends."""
        if self.warmup_epochs and self.policy == "one_cycle":
            raise ValueError(
                "schedule.warmup_epochs is for step and cosine; one_cycle rises over warmup_share"
            )
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise ValueError(
                f"schedule.warmup_epochs = {self.warmup_epochs} must be below "
                f"schedule.epochs = {self.epochs}"
            )
        return self


class RunSettings(Settings):
    """`[run]`: where a run happens and where it is written."""

    out: File = Field(description="folder of the run; created if it is missing.")
    name: str | None = Field(None, description="name in reports; by default the folder's.")
    seed: Seed = Field(
        0, description="seed of the student's weights; of order and views too without data.seed."
    )
    device: Device = Field(
        "auto", description='"auto" is CUDA if it is available, one device per process.'
    )
    precision: Precision = Field(
        "auto",
        description='"fp32"; "bf16" autocasts both networks, on the CPU too; "auto" is bf16 on '
        "CUDA devices that support it.",
    )
    channels_last: bool = Field(
        True, description="memory format of networks, and of images in a step."
    )
    compile: bool = Field(False, description="run both networks through torch.compile.")
    sync_batchnorm: bool = Field(
        False, description="share batch statistics among all processes; on CUDA alone."
    )
    log_every: Count = Field(50, description="steps between two lines of metrics.jsonl.")
    validate_every: Count = Field(
        1, description="epochs between two validations; the last epoch is always validated."
    )
    checkpoint_every: Count | None = Field(
        None, description="steps between two checkpoints within an epoch; by default minutes alone."
    )
    checkpoint_minutes: Positive = Field(
        10.0,
        description="minutes between two checkpoints within an epoch; the end of each epoch has "
        "its own.",
    )
    keep_checkpoints: Count = Field(
        2, description="newest checkpoints that are kept until the run is finished."
    )

    @field_validator("out", mode="before")
    @classmethod
    def _check_out(cls, value: Any) -> Any:
        """Refuse an empty name, which would mean the working folder."""
        if value == "":
            raise ValueError("run.out is empty; name a folder")
        return value


class Recipe(Settings):
    """All settings of a training run; without a teacher, it trains on the labels alone."""

    data: DataSettings
    student: NetworkSettings
    schedule: ScheduleSettings
    run: RunSettings
    teacher: TeacherSettings | None = None
    loss: LossSettings = LossSettings.model_validate({})
    pruning: PruningSettings | None = None

    @model_validator(mode="after")
    def _check_fit(self) -> Self:
        """Refuse settings that contradict each other."""
        for name, network in (("teacher", self.teacher), ("student", self.student)):
            if network is not None and network.checkpoint and network.weights:
                raise ValueError(f"{name}.checkpoint and {name}.weights: leave one of them out")
        if self.teacher and not (self.teacher.checkpoint or self.teacher.weights):
            raise ValueError(
                "teacher.checkpoint is missing (or teacher.weights, for published ones): an "
                "untrained teacher teaches nothing"
            )
        if self.teacher is None and self.loss.reshaping != "none":
            raise ValueError("loss.reshaping needs a teacher whose logits it reshapes")
        if self.teacher is None and self.loss.feature_weight > 0:
            raise ValueError("loss.feature_weight needs a teacher whose features it looks at")
        if self.pruning is not None and self.schedule.fixed_iterations:
            raise ValueError(
                "schedule.fixed_iterations and [pruning] contradict each other: epochs that skip "
                "rows have fewer steps than were asked for. Leave one of them out"
            )
        if self.loss.reshaping == "class_std" and self.data.subset is None:
            raise ValueError("loss.reshaping = 'class_std' needs data.subset, which carries them")
        return self

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        """Refuse, by name, what needs labels where there are none."""
        if self.data.labels:
            if self.data.val is None:
                raise ValueError("data.val is missing")
            if self.teacher is not None and self.teacher.num_classes is not None:
                raise ValueError(
                    "teacher.num_classes is for data.labels = false; else the teacher has the "
                    "classes of data.train"
                )
            return self
        if self.teacher is None:
            raise ValueError(
                "data.labels = false leaves the teacher alone to learn from, but [teacher] is "
                "missing"
            )
        loss = self.loss
        needs = {
            f"data.val = {self.data.val} is validated by top-1, which": self.data.val is not None,
            f"loss.cross_entropy_weight = {loss.cross_entropy_weight}": loss.cross_entropy_weight,
            f"loss.label_smoothing = {loss.label_smoothing}": loss.label_smoothing,
            "loss.reshaping = 'class_std'": loss.reshaping == "class_std",
            "loss.distillation = 'dkd'": loss.distillation == "dkd",
        }
        for name, is_asked in needs.items():
            if is_asked:
                cure = "leave it out" if "weight" not in name else "set it to 0"
                raise ValueError(f"{name} needs labels, but data.labels = false: {cure}")
        if loss.distillation_weight == 0 and loss.feature_weight == 0:
            raise ValueError(
                "loss.distillation_weight and loss.feature_weight are both 0, and without labels "
                "there is nothing else to learn from"
            )
        return self

    @model_validator(mode="after")
    def _check_cache(self) -> Self:
        """Refuse a teacher cache that could not hold what the run needs."""
        if self.teacher is None or self.teacher.cache is None:
            return self
        if self.data.num_views is None:
            raise ValueError(
                "teacher.cache keeps the logits of views that recur, but data.num_views is "
                "missing: set how many views of each row do, such as 16"
            )
        if self.loss.feature_weight > 0:
            raise ValueError(
                "loss.feature_weight compares the teacher's features, which teacher.cache does not "
                "hold. Leave one of them out"
            )
        return self
