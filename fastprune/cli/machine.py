"""The machine: a demo on it, its speed, and its health."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fastprune.cli.options import COUNT, PATH, device_option, json_option, setting_options
from fastprune.settings import DemoSettings

_MARKS = {"good": "ok", "note": "note", "bad": "BAD"}


# The recipe's head lists what comes after the teacher: scores, a subset, a student.
_NEXT_STEPS = """
The same with your own images, one folder per class in FOLDER/train and FOLDER/val:

  fastprune convert FOLDER/train train.beton
  fastprune convert FOLDER/val val.beton
  fastprune train small_images_teacher    # what follows: fastprune recipes show small_images"""


@click.command()
@setting_options(DemoSettings)
def demo(**settings: Any) -> None:
    """Walk the whole way on small images: all rows, with and without a teacher cache, and halves.

    Writes betons, scores, subsets, runs, result.json, report.html and scores.html to the folder of
    --out, where an earlier demo is replaced.
    """
    from fastprune.demo.walk import run_demo

    click.echo(run_demo(**settings))
    written = ("result.json", "report.html", "scores.html")
    click.echo(f"-> {', '.join(str(settings['out'] / name) for name in written)}")
    click.echo(_NEXT_STEPS)


@click.group()
def bench() -> None:
    """Measure the speed of this machine."""


@bench.command()
@click.argument("beton", type=PATH)
@click.option("--subset", type=PATH, help="Load these rows only.")
@click.option("--batch-size", type=COUNT, default=64)
@click.option("--image-size", type=COUNT, default=224)
@click.option("--workers", type=COUNT, help="Decoding threads or processes.")
@device_option
@click.option("--rounds", type=COUNT, default=3, help="Counted epochs of each.")
@json_option
def loader(
    beton: Path, subset: Path | None, workers: int | None, as_json: bool, **options: Any
) -> None:
    """Images per second of every loader that works here, on your beton and subset.

    Ours, stock FFCV and torchvision take turns; a first epoch is not counted.
    """
    from rich.console import Console
    from rich.table import Table

    from fastprune.base.cpus import usable_cpus
    from fastprune.bench.loader import bench_loader

    measured = bench_loader(beton, subset, num_workers=workers or usable_cpus(), **options)
    if as_json:
        click.echo(json.dumps(asdict(measured), indent=2))
        return
    table = Table("loader", "images/s", "range", "first batch")
    for rate in measured.rates:
        table.add_row(
            rate.name,
            f"{rate.images_per_second:,.0f}",
            f"{rate.slowest:,.0f} - {rate.fastest:,.0f}",
            f"{rate.first_batch_seconds:.1f} s",
        )
    Console().print(table)
    for name, reason in measured.skipped.items():
        click.echo(f"{name} was not measured: {reason}")
    if measured.skipped:
        click.echo("To get it to work, see: fastprune doctor")
    if measured.rates:
        best = max(measured.rates, key=lambda rate: rate.images_per_second)
        click.echo(f"fastest: {best.name}, {best.images_per_second:,.0f} images/s")


@click.command()
@click.argument("betons", nargs=-1, type=PATH)
@click.option(
    "--require",
    "required",
    multiple=True,
    type=click.Choice(["cpu", "dali", "ffcv", "cuda"]),
    help="Fail if this does not work; may be given several times.",
)
@json_option
def doctor(betons: tuple[Path, ...], required: tuple[str, ...], as_json: bool) -> None:
    """Report what is installed, what works here, and what to change.

    An image is decoded with every engine that is installed. The size of BETONS is compared with
    the memory that can cache them. The exit code is 1 if something keeps fastprune from working.
    """
    from fastprune.base.environment import describe_versions
    from fastprune.doctor import diagnose

    findings = diagnose(betons)
    good = [finding.topic for finding in findings if finding.verdict == "good"]
    works = {
        name: any(topic.startswith(f"engine {name},") for topic in good)
        for name in ("cpu", "dali", "ffcv")
    }
    works["cuda"] = "torch and CUDA" in good
    missing = [name for name in required if not works[name]]
    healthy = not missing and all(finding.verdict != "bad" for finding in findings)
    if as_json:
        shown = {
            "healthy": healthy,
            "works": works,
            "missing": missing,
            "versions": describe_versions(),
            "findings": [asdict(finding) for finding in findings],
        }
        click.echo(json.dumps(shown, indent=2))
    else:
        for finding in findings:
            click.echo(f"{_MARKS[finding.verdict]:4}  {finding.topic}: {finding.found}")
            if finding.advice:
                click.echo(f"      -> {finding.advice}")
        for name in missing:
            click.echo(f"BAD   {name} is required and does not work here; see above")
        click.echo("this machine is fit" if healthy else "something must change, see BAD above")
    sys.exit(0 if healthy else 1)


COMMANDS: tuple[click.Command, ...] = (demo, bench, doctor)
