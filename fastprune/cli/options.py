"""Options made of the records of settings, and the few that only the command line has."""

import functools
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem
from pydantic import ConfigDict, TypeAdapter
from pydantic.fields import FieldInfo

from fastprune.settings.domains import Settings, Share, domain_of
from fastprune.settings.keywords import outside

_C = TypeVar("_C", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
# Flags that are not the field's name: a command has no other workers or classes to confuse with.
_FLAGS = {
    "checkpoint": "--teacher-checkpoint",
    "weights": "--teacher-weights",
    "num_classes": "--teacher-classes",
    "num_clusters": "--unsupervised",
    "compile_teacher": "--compile",
    "num_workers": "--workers",
    "keep_ratio": "--keep",
    "shuffle_seed": "--shuffle-rows",
    "unlabeled": "--no-labels",
}


class Setting(click.ParamType[Any]):
    """The type of a field of a record: its bounds, its choices, and their completion."""

    def __init__(self, field: FieldInfo) -> None:
        self._field, self._domain = field, domain_of(field)
        self.name = self._domain.noun

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Parse and check a value; a default is one already."""
        if not isinstance(value, str):
            return value
        is_list = self._domain.length is not None
        given: Any = value
        try:
            parsed = [self._parse(part) for part in (value.split(",") if is_list else [value])]
            given = tuple(parsed) if is_list else parsed[0]
            config = ConfigDict(allow_inf_nan=False)
            kind: Any = self._field.rebuild_annotation()
            return TypeAdapter(kind, config=config).validate_python(given)
        except ValueError:  # pydantic's errors are, too
            self.fail(outside("it", given, self._domain), param, ctx)

    def _parse(self, text: str) -> Any:
        return self._domain.kind(text) if self._domain.kind in (int, float) else text

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Show the choices, or the kind of value and its bounds."""
        del param, ctx
        if self._domain.choices:
            return f"[{'|'.join(self._domain.choices)}]"
        one = self._domain.noun.split()[-1].upper()
        if self._domain.length is not None:
            return ",".join([one] * (self._domain.length or 2))
        return one + self._domain.bounds

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        """Complete the choices."""
        del ctx, param
        return [CompletionItem(c) for c in self._domain.choices if c.startswith(incomplete)]


def setting_options(
    record: type[Settings],
    *,
    without: tuple[str, ...] = (),
    types: Mapping[str, Any] | None = None,
) -> Callable[[_C], _C]:
    """Add an option for each field of a record, with its type, bounds, default and help.

    Args:
        record: a field `image_size` becomes `--image-size`, unless it has a flag of its own.
        without: fields without an option.
        types: click's types of fields that are written in a way of their own.
    """
    given = types or {}
    options = [
        _option(name, field, given.get(name))
        for name, field in record.model_fields.items()
        if name not in without
    ]
    # Decorators run from the bottom up; the help shows the order of the fields.
    return lambda command: functools.reduce(lambda done, add: add(done), options[::-1], command)


def _option(name: str, field: FieldInfo, kind: Any) -> Callable[[_C], _C]:
    domain = domain_of(field)
    text = field.description or ""
    settings: dict[str, Any] = {"help": text[0].upper() + text[1:]}
    if domain.kind is bool:
        settings |= {"is_flag": True, "default": field.default}
    else:
        settings["type"] = kind or (PATH if domain.kind is Path else Setting(field))
        settings |= {"required": True} if field.is_required() else {"default": field.default}
    return click.option(_FLAGS.get(name, f"--{name.replace('_', '-')}"), name, **settings)


class Location(click.ParamType[str | Path]):
    """A local path, or a URL of object storage, which a `Path` would mangle."""

    name = "path"

    def convert(self, value: Any, param: Any, ctx: Any) -> str | Path:
        """Distinguish the two."""
        return value if "://" in str(value) else PATH.convert(value, param, ctx)


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
            self.fail(f"{value!r} is not a size such as 4GiB or 512MiB", param, ctx)


class RayCluster(click.ParamType[str | bool]):
    """The address of a Ray cluster; True if the option stands without one, which is "" to click."""

    name = "address"

    def convert(self, value: Any, param: Any, ctx: Any) -> str | bool:
        """Distinguish the two."""
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
        "or of one on this machine. Write it after the arguments.",
    )


SIZE = Size()
# FieldInfo makes a field of a bare type.
SHARE = Setting(FieldInfo.from_annotation(Share))
SHARES = Setting(FieldInfo.from_annotation(tuple[Share, ...]))

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
device_option = click.option(
    "--device", default="auto", help='Device of torch; "auto" is CUDA if it is available.'
)


def teacher_options(command: _C) -> _C:
    """Add the two ways to name a teacher."""
    command = click.option(
        "--teacher-factory",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="A function of yours that makes the network; called with num_classes.",
    )(command)
    return click.option(
        "--teacher",
        help="Network: one of torchvision, timm:NAME, or a small one such as resnet32x4; with its "
        "published weights, or the weights in --teacher-checkpoint.",
    )(command)


def checked_teacher(beton: Path, teacher: str | None, teacher_factory: str | None) -> str | None:
    """Return the teacher's name or factory, and refuse wrong arguments before torch is imported."""
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


def report_faults(
    faults: list[Any], path: Path, *, as_json: dict[str, Any] | None, where: str
) -> None:
    """Print what a check found, one fault a line, and exit with 1 if there is any."""
    if as_json is not None:
        click.echo(json.dumps(as_json, indent=2))
    else:
        for fault in faults:
            click.echo(str(fault))
        found = {0: "no faults", 1: "1 fault"}.get(len(faults), f"{len(faults):,} faults")
        click.echo(f"{found}{where}: {path}")
    sys.exit(1 if faults else 0)


def flags_of(command: click.Command) -> dict[str, str]:
    """Map Python names of a command's parameters, and of its subcommands', to their flags."""
    commands = command.commands.values() if isinstance(command, click.Group) else ()
    flags = {name: flag for child in commands for name, flag in flags_of(child).items()}
    for param in command.params:
        if isinstance(param, click.Option) and param.name:
            flags[param.name] = max(param.opts, key=len)
    return flags


def named_by_flag(message: str, flags: dict[str, str]) -> str:
    """Name the flag if an error message begins with the name of a Python argument.

    >>> named_by_flag("num_workers (0) must be >= 1.", {"num_workers": "--workers"})
    '--workers (0) must be >= 1.'
    """
    name = re.match(r"\w+", message)
    if name is None or not re.match(r" (\(|must|=)", message[name.end() :]):
        return message
    return flags.get(name[0], name[0]) + message[name.end() :]
