"""Subcommands around the teacher cache."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from fastprune.cli.options import (
    CACHE_DTYPES,
    COUNT,
    PATH,
    augment_option,
    checked_teacher,
    json_option,
    pass_options,
    show,
    teacher_options,
)

# More is a slip of the keyboard.
_MOST_SLOTS = 1_000_000


@click.group()
def cache() -> None:
    """Keep the teacher's logits on recurring views, so that it is asked once."""


@cache.command()
@click.argument("beton", type=PATH)
@click.argument("folder", type=PATH)
@teacher_options
@click.option(
    "--num-views", type=COUNT, help="How many views recur (data.num_views); for a new cache."
)
@click.option("--subset", type=PATH, help="The rows to fill.  [default: all]")
@click.option(
    "--slots", "slots_text", help="The views to fill, such as 0-3,8.  [default: all of them]"
)
@augment_option
@click.option(
    "--dtype",
    type=click.Choice(CACHE_DTYPES),
    help="Of a new cache.  [default: float16]",
)
@pass_options
@json_option
def fill(
    beton: Path,
    folder: Path,
    teacher: str | None,
    teacher_factory: str | None,
    teacher_classes: int | None,
    teacher_checkpoint: Path | None,
    teacher_weights: str | None,
    slots_text: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask the teacher for the logits that FOLDER does not hold yet.

    A run that was killed is continued by the same command. For several devices or machines:
    torchrun ... -m fastprune cache fill ...
    """
    slots = None if slots_text is None else _parse_slots(slots_text)
    network = checked_teacher(beton, teacher, teacher_factory)
    from fastprune.difficulty.cache import fill_cache

    start = time.perf_counter()
    filled = fill_cache(
        beton,
        network,
        folder,
        checkpoint=teacher_checkpoint,
        weights=teacher_weights,
        num_classes=teacher_classes,
        slots=slots,
        **options,
    )
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


def _parse_slots(text: str) -> list[int]:
    """Return the numbers of "0-3,8"."""
    slots: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise click.BadParameter(f"{text!r} is no list of slots, such as 0-3,8.")
        if not int(first) <= int(last or first) < _MOST_SLOTS:
            raise click.BadParameter(f"{part!r} is no range of slots, such as 0-3.")
        slots.extend(range(int(first), int(last or first) + 1))
    return slots


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
    if as_json:
        shown = {"path": str(folder), "faults": faults, "seconds": seconds}
        click.echo(json.dumps(shown, indent=2))
    else:
        for fault in faults:
            click.echo(fault)
        found = {0: "no faults", 1: "1 fault"}.get(len(faults), f"{len(faults):,} faults")
        size = opened.disk_bytes / 1e6
        click.echo(f"{found} in {size:,.1f} MB in {seconds:.1f} s: {folder}")
    sys.exit(1 if faults else 0)


@cache.command()
@click.argument("folder", type=PATH)
@json_option
def info(folder: Path, as_json: bool) -> None:
    """Show what the logits in FOLDER are of, and how many are there."""
    from fastprune.rows.teacher_cache import TeacherCache

    summary = TeacherCache.open(folder).summary()
    if as_json:
        click.echo(json.dumps(summary, indent=2))
        return
    rows, views = summary["num_rows"], summary["num_views"]
    filled = sum(summary["filled"])
    click.echo(f"{'rows':22}{rows:,}")
    click.echo(f"{'views of each':22}{views:,}, of which {summary['whole_slots']:,} are whole")
    click.echo(f"{'logits':22}{filled:,} of {rows * views:,} ({filled / rows / views:.1%})")
    click.echo(f"{'stored as':22}{summary['num_classes']:,} x {summary['dtype']}")
    click.echo(f"{'on the disk':22}{summary['disk_bytes'] / 1e6:,.1f} MB")
    for section, entries in summary["identity"].items():
        if not isinstance(entries, dict):
            click.echo(f"{section:22}{entries}")
            continue
        for name, value in entries.items():
            click.echo(f"{f'{section} {name}'.replace('_', ' '):21} {value}")


COMMANDS: tuple[click.Command, ...] = (cache,)
