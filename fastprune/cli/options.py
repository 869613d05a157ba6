"""Options that several subcommands share, so that one thing has one name and one domain."""

import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)


class Location(click.ParamType[str | Path]):
    """A local path, or a URL of object storage, which a `Path` would mangle."""

    name = "path"

    def convert(self, value: Any, param: Any, ctx: Any) -> str | Path:
        """Tell the two apart."""
        return value if "://" in str(value) else PATH.convert(value, param, ctx)


COUNT = click.IntRange(min=1)


class RayCluster(click.ParamType[str | bool]):
    """The address of a Ray cluster; the option without a value, given as "", means one at hand."""

    name = "address"

    def convert(self, value: Any, param: Any, ctx: Any) -> str | bool:
        """Tell the two apart."""
        del param, ctx
        return value or True


def ray_option(what: str) -> Any:
    """Return the option --ray [ADDRESS] of a command that runs on a cluster."""
    return click.option(
        "--ray",
        type=RayCluster(),
        is_flag=False,
        flag_value="",
        metavar="[ADDRESS]",
        help=f"{what} by tasks of the Ray cluster at ADDRESS; without one, of that in RAY_ADDRESS, "
        "or of one on this machine. Write it behind the arguments.",
    )


# The values are repeated here, because `--help` and completion must not import what they are of
# (a test holds them against the library's own).
BACKENDS = ("auto", "cpu", "dali")
METRICS = (
    "centroid",
    "centroid_median",
    "loss",
    "el2n",
    "grand_last",
    "margin",
    "entropy",
    "confidence",
    "prototype",
)
STRATEGIES = ("medium", "window", "easy", "hard", "random", "moderate", "ccs")
QUOTAS = ("proportional", "equal")
EXPORT_FORMATS = (
    "mdslr",
    "deepcore",
    "rows",
    "dropped",
    "names",
    "indices",
    "symlinks",
    "webdataset",
    "huggingface",
)
PRECISIONS = ("auto", "fp32", "bf16")
CACHE_DTYPES = ("float16", "float32", "uint8")
AUGMENTS = ("rrc", "pad_crop", "center", "none")


class Share(click.ParamType[float]):
    """A share in (0, 1]; 50 is refused, with what was probably meant."""

    name = "share"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Parse and check a number."""
        try:
            share = float(value)
        except ValueError:
            share = float("nan")
        if 0 < share <= 1:
            return share
        meant = f" {share:g}% is {share / 100:g}." if 1 < share <= 100 else ""
        return self.fail(f"{value} is not a share in (0, 1].{meant}", param, ctx)


class Size(click.ParamType[int]):
    """A number of bytes, as in 4GiB, 512MiB or 4e9."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Parse a number and its unit."""
        if isinstance(value, int):
            return value
        units = {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6}
        units |= {"gb": 10**9, "b": 1, "": 1}
        number = value.rstrip("BbGgIiKkMm")
        try:
            return int(float(number) * units[value[len(number) :].lower()])
        except (KeyError, ValueError, OverflowError):
            self.fail(f"{value!r} is no size such as 4GiB or 512MiB", param, ctx)


SIZE = Size()


class NumberList(click.ParamType[tuple[float, ...]]):
    """Numbers with commas between, so many as there are names, or any where there are none."""

    name = "numbers"

    def __init__(self, example: str, *, count: int | None = None, item: Any = click.FLOAT) -> None:
        self._example, self._count, self._item = example, count, item

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        """Parse the numbers."""
        if isinstance(value, tuple):  # a default that is converted already
            return value
        try:
            numbers = tuple(map(float, value.split(",")))
        except ValueError:
            numbers = ()
        if not numbers or len(numbers) != (self._count or len(numbers)):
            self.fail(f"{value!r} is not a list such as {self._example}.", param, ctx)
        return tuple(self._item.convert(number, param, ctx) for number in numbers)


class Metric(click.ParamType[str]):
    """A metric or a blend of them; only the metrics are completed."""

    name = "metric"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Take any name: score tables of other tools have metrics of their own."""
        del param, ctx
        return str(value)

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[Any]:
        """Complete the metrics of our own tables."""
        from click.shell_completion import CompletionItem

        del ctx, param
        return [CompletionItem(name) for name in METRICS if name.startswith(incomplete)]


class Views(click.ParamType[int | str]):
    """center, train, or a number of training views."""

    name = "views"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        """Parse a number, or check the word."""
        if isinstance(value, int):
            return value
        if value in ("center", "train"):
            return str(value)
        if value.isdecimal() and int(value) > 0:
            return int(value)
        return self.fail(f"{value!r} is not center, train or a number of views.", param, ctx)


class Precision(click.Choice[str]):
    """fp32 or bf16; the long names of earlier versions are understood."""

    def __init__(self) -> None:
        super().__init__(PRECISIONS)

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Shorten a long name and check the choice."""
        short = {"float32": "fp32", "bfloat16": "bf16"}.get(value, value)
        return super().convert(short, param, ctx)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
workers_option = click.option(
    "--workers",
    "num_workers",
    type=COUNT,
    help="Decoding threads.  [default: one per usable CPU]",
)
device_option = click.option(
    "--device", default="auto", help="Device of torch; auto takes CUDA if it is there."
)
backend_option = click.option(
    "--backend", type=click.Choice(BACKENDS), default="auto", help="Engine that decodes."
)

augment_option = click.option(
    "--augment",
    type=click.Choice(AUGMENTS),
    help="How training views are taken.  [default: the loader's at this size]",
)
_CHANNELS = NumberList("red,green,blue, such as 0.485,0.456,0.406", count=3)
_TEACHER_OPTIONS = (
    click.option(
        "--teacher",
        help="Network: one of torchvision, timm:NAME, or a small one such as resnet32x4; with its "
        "published weights, or those of --teacher-checkpoint.",
    ),
    click.option(
        "--teacher-checkpoint",
        type=PATH,
        help="Weights: safetensors or a PyTorch checkpoint; a student of fastprune names its "
        "network.",
    ),
    click.option(
        "--teacher-weights",
        help="Published weights, such as IMAGENET1K_V2.  [default: the best ones]",
    ),
    click.option(
        "--teacher-factory",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="A function of yours that makes the network; called with num_classes.",
    ),
    click.option(
        "--teacher-classes",
        type=COUNT,
        help="Logits of the teacher.  [default: the beton's classes; with --unsupervised its own]",
    ),
    click.option(
        "--image-size",
        type=COUNT,
        help="Side of the images in pixels.  [default: the teacher's; 224, less for small images]",
    ),
    click.option(
        "--mean",
        metavar="R,G,B",
        type=_CHANNELS,
        help="Mean of pixel values in [0, 1].  [default: the teacher's, ImageNet's]",
    ),
    click.option(
        "--std",
        metavar="R,G,B",
        type=_CHANNELS,
        help="Standard deviation of pixel values.  [default: the teacher's, ImageNet's]",
    ),
)
_PASS_OPTIONS = (
    click.option("--seed", default=0, help="Seed of the augmented views."),
    click.option("--batch-size", type=COUNT, default=256, help="Images per step and rank."),
    device_option,
    click.option(
        "--precision",
        type=Precision(),
        default="auto",
        help="Arithmetic of the teacher; auto is bf16 on CUDA devices that have it.",
    ),
    click.option("--compile", "compile_teacher", is_flag=True, help="Use torch.compile."),
    backend_option,
    workers_option,
)


def teacher_options(command: Any) -> Any:
    """Add the options that name a teacher and the images it is shown."""
    return functools.reduce(
        lambda wrapped, option: option(wrapped), _TEACHER_OPTIONS[::-1], command
    )


def pass_options(command: Any) -> Any:
    """Add the options of how a pass of the teacher is run."""
    return functools.reduce(lambda wrapped, option: option(wrapped), _PASS_OPTIONS[::-1], command)


def checked_teacher(beton: Path, teacher: str | None, teacher_factory: str | None) -> str | None:
    """Return the teacher's name or factory, if it is one, without importing torch.

    What is wrong with the arguments is said before torch is imported, which takes seconds.
    """
    from fastprune.beton.opening import open_beton
    from fastprune.networks.names import require_known_network

    if teacher and teacher_factory:
        raise click.UsageError("give --teacher or --teacher-factory, not both.")
    if teacher:
        require_known_network(teacher)
    open_beton(beton)
    if teacher_factory:
        # As `python -m` does: a module in the working folder can be named.
        sys.path.insert(0, str(Path.cwd()))
    return teacher or teacher_factory


def show(line: str, fields: dict[str, Any], *, as_json: bool) -> None:
    """Print a command's summary: one line, or its numbers as JSON."""
    click.echo(json.dumps(fields, indent=2, default=str) if as_json else line)


def flags_of(command: click.Command) -> dict[str, str]:
    """Map Python names of a command's parameters, and of its subcommands', to their flags."""
    commands = command.commands.values() if isinstance(command, click.Group) else ()
    flags = {name: flag for child in commands for name, flag in flags_of(child).items()}
    for param in command.params:
        if isinstance(param, click.Option) and param.name:
            flags[param.name] = max(param.opts, key=len)
    return flags


def named_by_flag(message: str, flags: dict[str, str]) -> str:
    """Name the flag where an error message begins with the name of a Python argument.

    >>> named_by_flag("num_workers (0) must be >= 1.", {"num_workers": "--workers"})
    '--workers (0) must be >= 1.'
    """
    name = re.match(r"\w+", message)
    if name is None or not re.match(r" (\(|must|=)", message[name.end() :]):
        return message
    return flags.get(name[0], name[0]) + message[name.end() :]
