"""`fastprune cache`: the teacher's logits, kept."""

import json
import os
import time
from pathlib import Path
from typing import Any

import click

from fastprune.cli.options import (
    PATH,
    checked_teacher,
    json_option,
    report_faults,
    setting_options,
    show,
    teacher_options,
)
from fastprune.settings import FillSettings

# More is a slip of the keyboard.
_MAX_SLOTS = 1_000_000


class _Slots(click.ParamType[tuple[int, ...]]):
    """Numbers and ranges, such as 0-3,8."""

    name = "slots"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        """Write the ranges out."""
        slots: list[int] = []
        for part in value.split(","):
            first, _, last = part.partition("-")
            if not first.isdecimal() or not (last or first).isdecimal():
                self.fail(f"{value!r} is not a list of slots, such as 0-3,8.", param, ctx)
            if not int(first) <= int(last or first) < _MAX_SLOTS:
                self.fail(f"{part!r} is not a range of slots, such as 0-3.", param, ctx)
            slots.extend(range(int(first), int(last or first) + 1))
        return tuple(slots)


@click.group()
def cache() -> None:
    """Keep the teacher's logits on recurring views, so that they are computed once."""


@cache.command()
@click.argument("beton", type=PATH)
@click.argument("folder", type=PATH)
@teacher_options
@click.option("--subset", type=PATH, help="The rows to fill.  [default: all]")
@setting_options(FillSettings, types={"slots": _Slots()})
@json_option
def fill(
    beton: Path,
    folder: Path,
    teacher: str | None,
    teacher_factory: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Ask the teacher for the logits that FOLDER does not hold yet.

    A run that was killed is continued by the same command. For several devices or machines:
    torchrun ... -m fastprune cache fill ...
    """
    network = checked_teacher(beton, teacher, teacher_factory)
    from fastprune.difficulty.fill_cache import fill_cache

    start = time.perf_counter()
    filled = fill_cache(beton, network, folder, **settings)
    if os.environ.get("RANK", "0") == "0":
        summary = filled.summary() | {"seconds": time.perf_counter() - start}
        rows, views = summary["num_rows"], summary["num_views"]
        show(
            f"{sum(summary['filled']):,} of {rows * views:,} views ({views} of {rows:,} rows) have "
            f"logits after {summary['seconds']:.1f} s, "
            f"{summary['disk_bytes'] / 1e6:,.1f} MB -> {folder}",
            summary,
            as_json=as_json,
        )


@cache.command()
@click.argument("folder", type=PATH)
@json_option
def check(folder: Path, as_json: bool) -> None:
    """Compare the logits in FOLDER with their checksums."""
    from fastprune.rows.teacher_cache import TeacherCache

    start = time.monotonic()
    opened = TeacherCache.open(folder)
    faults = list(opened.check())
    seconds = time.monotonic() - start
    shown = {"path": str(folder), "faults": faults, "seconds": seconds}
    where = f" in {opened.disk_bytes / 1e6:,.1f} MB in {seconds:.1f} s"
    report_faults(faults, folder, as_json=shown if as_json else None, where=where)


@cache.command()
@click.argument("folder", type=PATH)
@json_option
def info(folder: Path, as_json: bool) -> None:
    """Show what the logits in FOLDER were made from, and how many there are."""
    from fastprune.rows.teacher_cache import TeacherCache

    summary = TeacherCache.open(folder).summary()
    if as_json:
        click.echo(json.dumps(summary, indent=2))
        return
    rows, views, filled = summary["num_rows"], summary["num_views"], sum(summary["filled"])
    lines = {
        "rows": f"{rows:,}",
        "views of each": f"{views:,}, of which {summary['whole_slots']:,} are whole",
        "logits": f"{filled:,} of {rows * views:,} ({filled / rows / views:.1%})",
        "stored as": f"{summary['num_classes']:,} x {summary['dtype']}",
        "on the disk": f"{summary['disk_bytes'] / 1e6:,.1f} MB",
    }
    for section, entries in summary["identity"].items():
        parts = entries.items() if isinstance(entries, dict) else [("", entries)]
        lines |= {f"{section} {name}".strip().replace("_", " "): value for name, value in parts}
    for name, value in lines.items():
        click.echo(f"{name:21} {value}")


COMMANDS: tuple[click.Command, ...] = (cache,)
