"""The settings of a recipe: validated and frozen; unknown keys are refused."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

# Networks compute in float32: a larger number becomes infinite there, or cannot be passed at all.
_MOST = float(np.finfo(np.float32).max)

Share = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=_MOST)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Positive = Annotated[float, Field(gt=0, le=_MOST)]
Channels = tuple[float, float, float]
Deviations = tuple[Positive, Positive, Positive]


def _rising(points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    """Points whose first coordinates rise."""
    if any(right[0] <= left[0] for left, right in pairwise(points)):
        raise ValueError("the points must rise")
    return points


def _nameable(path: Path, info: ValidationInfo) -> Path:
    """Refuse what no file system can open: it would be noticed deep inside of a run."""
    if "\0" in str(path):
        raise ValueError(f"the path {info.field_name} holds a null character")
    return path


_File = Annotated[Path, AfterValidator(_nameable)]
_Points = Annotated[tuple[tuple[Share, Weight], ...], Field(min_length=1), AfterValidator(_rising)]


class _Section(BaseModel):
    """Settings that cannot change and hold no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSettings(_Section):
    """Images that the student is trained and evaluated on.

    Attributes:
        train: beton to train on.
        val: beton to evaluate on; None only where there are no labels.
        labels: False to learn from the teacher alone, from images with or without labels: their
            labels are not looked at, there is no validation, and with features alone the student
            has no classifier.
        subset: index file of the rows to train on; None for all rows.
        image_size: side of a training view in pixels; with `first_image_size` that of the last
            epochs.
        first_image_size: side in the first epochs, from where it rises to `image_size` in steps of
            `image_size_step`, each size for an equal part of the epochs; None for one size.
        image_size_step: pixels between two sizes.
        val_image_size: side of a validation view in pixels; None for `image_size`.
        augment: how a training view is taken; None for the loader's default at this size.
        num_views: K, after which the training views of a row come again: epoch e shows the views
            of epoch e mod K; None for new ones in each epoch.
        batch_size: images per step and process.
        backend: the loader's engine; "auto" is "cpu", or DALI where it is faster on the GPU.
        mean: per channel, of pixel values in [0, 1]; for normalization.
        std: as mean.
        num_workers: decoding threads; None for as many as the process may use.
        service: address of a loading service to take views from, or several with commas between
            them; None for that of the environment variable FASTPRUNE_SERVICE, if there is one.
        service_token_file: a file with the token that the service asks for; None for that of
            FASTPRUNE_SERVICE_TOKEN. The token itself is nowhere in a recipe, nor in a run's folder.
        seed: of the order, the views and what is skipped; None for `run.seed`. Runs that share it
            share every view, and vary less among each other than runs do.
    """

    train: _File
    val: _File | None = None
    labels: bool = True
    subset: _File | None = None
    image_size: Count = 224
    first_image_size: Count | None = None
    image_size_step: Count = 32
    val_image_size: Count | None = None
    augment: Literal["rrc", "pad_crop", "center", "none"] | None = None
    num_views: Count | None = None
    batch_size: Count = 256
    backend: Literal["auto", "cpu", "dali", "ffcv"] = "auto"
    mean: Channels = (0.485, 0.456, 0.406)
    std: Deviations = (0.229, 0.224, 0.225)
    num_workers: Count | None = None
    service: str | None = None
    service_token_file: _File | None = None
    seed: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _check_growth(self) -> Self:
        """Refuse images that would shrink."""
        if self.first_image_size is not None and self.first_image_size > self.image_size:
            raise ValueError(
                f"data.first_image_size = {self.first_image_size} must not be above "
                f"data.image_size = {self.image_size}"
            )
        return self


class NetworkSettings(_Section):
    """A network and where its weights come from.

    Attributes:
        network: a name that `fastprune.networks` knows.
        checkpoint: file of weights to load.
        weights: published weights instead, by name: such as "IMAGENET1K_V1" or "DEFAULT" for
            torchvision's networks, "pretrained" for timm's. Without either, weights are random.
    """

    network: str
    checkpoint: _File | None = None
    weights: str | None = None


class TeacherSettings(NetworkSettings):
    """The network that teaches, and where its logits are kept.

    Attributes:
        cache: folder of its logits on recurring views (`data.num_views`), which the run reads and
            fills; None asks the network in every step.
        cache_dtype: of a new cache; None for float16.
        num_classes: its logits, where `data.labels` is false; None for what the checkpoint or the
            published weights say, or no classifier if nothing does.
    """

    cache: Path | None = None
    cache_dtype: Literal["float16", "float32", "uint8"] | None = None
    num_classes: Count | None = None


class LossSettings(_Section):
    """The weights of the loss terms. Without a teacher only `label_smoothing` counts.

    Attributes:
        cross_entropy_weight: of the cross-entropy against the labels.
        distillation: how far the student's logits are from the teacher's. "kd" is T² times the
            Kullback-Leibler divergence; "dkd" weights its part about the label and its part about
            the other classes apart.
        distillation_weight: of that distance; a number, or points [keep ratio, weight] between
            which the weight is linear in the keep ratio, and beyond which it is constant.
        distillation_warmup_epochs: w; the weight is e/w of itself in epoch e = 1, 2, ... up to w.
        temperature: T, softens both distributions.
        target_weight: α of "dkd", of the part about the label.
        others_weight: β of "dkd", of the part about the other classes.
        feature_weight: of one minus the cosine between the student's projected penultimate
            features and the teacher's; 0 leaves features alone.
        projectors: linear maps whose mean projects the student's features.
        reshaping: change of the teacher's logits. "class_std" gives each row the mean
            standard deviation of its class over the whole dataset (needs a subset that carries
            it), "zscore" standardizes teacher and student, "none" leaves them.
        label_smoothing: share of the label's probability spread over all classes.
    """

    cross_entropy_weight: Weight = 0.1
    distillation: Literal["kd", "dkd"] = "kd"
    distillation_weight: Weight | _Points = 0.9
    distillation_warmup_epochs: Annotated[int, Field(ge=0)] = 0
    temperature: Positive = 4.0
    target_weight: Weight = 1.0
    others_weight: Weight = 8.0
    feature_weight: Weight = 0.0
    projectors: Count = 3
    reshaping: Literal["none", "class_std", "zscore"] = "none"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

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
        """The weight of the distillation for a keep ratio in (0, 1]."""
        if isinstance(self.distillation_weight, tuple):
            keep_ratios, weights = zip(*self.distillation_weight, strict=True)
            return float(np.interp(keep_ratio, keep_ratios, weights))
        return self.distillation_weight


class PruningSettings(_Section):
    """Rows that are skipped while the student learns, chosen anew in each epoch.

    Attributes:
        rule: "infobatch" skips rows at random whose last loss was below the mean, and weights the
            kept ones up, so that they count for the skipped ones.
        skip_probability: of a row with such a loss.
        full_share: share of the epochs, at the end, that skip nothing.
    """

    rule: Literal["infobatch"]
    skip_probability: Annotated[float, Field(gt=0, lt=1)] = 0.5
    full_share: Annotated[float, Field(ge=0, le=1)] = 0.125


class ScheduleSettings(_Section):
    """How long and how fast the student learns.

    Attributes:
        epochs: passes over the rows that are trained on; with `fixed_iterations` over all rows.
        fixed_iterations: whether to take as many steps as `epochs` passes over all rows of the
            beton would, so more passes over a subset: a whole number, the nearest. Milestones and
            warm-up stretch with them. Not with `pruning`, whose epochs differ in their steps.
        learning_rate: the first, or for "one_cycle" the highest.
        momentum: of SGD, Nesterov's where it is above zero and `nesterov` is set.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: L2 penalty on all parameters.
        policy: "step" multiplies by `gamma` at each of `milestones`; "cosine" falls to zero;
            "one_cycle" rises over the first `warmup_share` of the steps and falls to zero.
        milestones: epochs at which "step" lowers the learning rate.
        gamma: factor of each milestone.
        warmup_share: share of the steps in which "one_cycle" rises.
        warmup_epochs: epochs in which "step" and "cosine" first rise.
        clip_norm: the longest gradient, over all parameters; None for no limit.
        ema_decay: share that the running average of the weights keeps at each step; the average
            is then what is evaluated and saved. None for no average.
    """

    epochs: Count
    learning_rate: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Weight = 1e-4
    policy: Literal["step", "cosine", "one_cycle"] = "step"
    milestones: tuple[Count, ...] = ()
    gamma: Positive = 0.1
    warmup_share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    clip_norm: Positive | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    fixed_iterations: bool = False

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


class RunSettings(_Section):
    """Where a run happens and where it is written.

    Attributes:
        out: folder of the run; made where it is missing.
        name: what the run is called in reports; None for the folder's name.
        seed: of the student's weights; of the order and the views too where `data.seed` is None.
        device: "auto" takes CUDA where it is there, one device per process.
        precision: "bf16" autocasts both networks; "auto" does so on CUDA devices that have it.
        channels_last: memory format of networks, and of images in a step.
        compile: run both networks through torch.compile.
        sync_batchnorm: share batch statistics among processes; on CUDA alone.
        log_every: steps between two lines of metrics.jsonl.
        validate_every: epochs between two validations; the last epoch is always validated.
        checkpoint_every: steps between two checkpoints within an epoch; None for minutes alone.
        checkpoint_minutes: minutes between two checkpoints within an epoch; each epoch's end has
            one besides.
        keep_checkpoints: the newest ones that are kept until the run is finished.
    """

    out: _File
    name: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: bool = True
    compile: bool = False
    sync_batchnorm: bool = False
    log_every: Count = 50
    validate_every: Count = 1
    checkpoint_every: Count | None = None
    checkpoint_minutes: Positive = 10.0
    keep_checkpoints: Count = 2

    @field_validator("out", mode="before")
    @classmethod
    def _check_out(cls, value: Any) -> Any:
        """Refuse an empty name, which would mean the working folder."""
        if value == "":
            raise ValueError("run.out is empty; name a folder")
        return value


class Recipe(_Section):
    """All settings of a training run.

    Attributes:
        data: images and how they are loaded.
        student: the network that learns.
        schedule: how long and how fast.
        run: device, precision, folder and checkpoints.
        teacher: the network that teaches; None trains plainly on the labels.
        loss: the weights of the loss terms.
        pruning: which rows an epoch skips; None trains on all rows of the subset in each.
    """

    data: DataSettings
    student: NetworkSettings
    schedule: ScheduleSettings
    run: RunSettings
    teacher: TeacherSettings | None = None
    loss: LossSettings = LossSettings()
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
                "missing: say how many of each row do, such as 16"
            )
        if self.loss.feature_weight > 0:
            raise ValueError(
                "loss.feature_weight compares the teacher's features, which teacher.cache does not "
                "hold. Leave one of them out"
            )
        return self
