"""Subcommands around the teacher cache."""

import json
import sys
import time
from pathlib import Path

import click

_FOLDER = click.Path(path_type=Path)


@click.group()
def cache() -> None:
    """Keep the teacher's logits on recurring views, so that it is asked once."""


@cache.command()
@click.argument("folder", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(folder: Path, as_json: bool) -> None:
    """Compare the logits in FOLDER with their checksums."""
    from fastprune.artifacts.teacher_cache import TeacherCache

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
@click.argument("folder", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(folder: Path, as_json: bool) -> None:
    """Show what the logits in FOLDER are of, and how many are there."""
    from fastprune.artifacts.teacher_cache import TeacherCache

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
        for name, value in entries.items():
            click.echo(f"{f'{section} {name}'.replace('_', ' '):22}{value}")


COMMANDS: tuple[click.Command, ...] = (cache,)
