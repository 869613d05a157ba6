"""`fastprune bench`: the measurements that a user runs on their own machine."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from fastprune.cli.options import COUNT, PATH, SIZE, device_option, json_option


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
    beton: Path,
    subset: Path | None,
    batch_size: int,
    image_size: int,
    workers: int | None,
    device: str,
    rounds: int,
    as_json: bool,
) -> None:
    """Images per second of every loader that works here, on your beton and subset.

    Beside ours stand stock FFCV and torchvision. They take turns; a first epoch is not counted.
    """
    from rich.console import Console
    from rich.table import Table

    from fastprune.base.cpus import usable_cpus
    from fastprune.bench.loader import bench_loader

    measured = bench_loader(
        beton,
        subset,
        batch_size=batch_size,
        image_size=image_size,
        num_workers=workers or usable_cpus(),
        device=device,
        rounds=rounds,
    )
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
        click.echo("What to change, if it is wanted: fastprune doctor")
    if measured.rates:
        best = max(measured.rates, key=lambda rate: rate.images_per_second)
        click.echo(f"fastest: {best.name}, {best.images_per_second:,.0f} images/s")


@bench.command()
@click.argument("beton", type=PATH)
@click.option("--batch-size", type=COUNT, default=64)
@click.option("--image-size", type=COUNT, default=224)
@click.option("--workers", type=COUNT, help="Decoding threads of each loader, and of the service.")
@click.option("--memory", type=SIZE, default="1GiB", help="Of the service, for decoded views.")
@click.option("--pace", type=click.Choice(["auto", "together", "free"]), default="auto")
@click.option("--rounds", type=COUNT, default=3, help="Counted rounds of each.")
@click.option("--epochs", type=COUNT, default=1, help="Of each consumer in a round.")
@json_option
def service(
    beton: Path,
    batch_size: int,
    image_size: int,
    workers: int | None,
    memory: int,
    pace: str,
    rounds: int,
    epochs: int,
    as_json: bool,
) -> None:
    """What `fastprune serve` would save on this machine, with your beton.

    One consumer, three of all rows and three of nested subsets load without and with a service, in
    turn; a first round is not counted.
    """
    from rich.console import Console
    from rich.table import Table

    from fastprune.bench.service import bench_service

    measured = bench_service(
        beton,
        batch_size=batch_size,
        image_size=image_size,
        num_workers=workers,
        memory_bytes=memory,
        pace=pace,
        rounds=rounds,
        epochs=epochs,
    )
    if as_json:
        click.echo(json.dumps([asdict(rate) for rate in measured], indent=2))
        return
    table = Table("consumers", "own loaders", "service", "ratio", "decoded / wanted")
    for rate in measured:
        table.add_row(
            rate.case,
            f"{rate.local:,.0f} views/s",
            f"{rate.service:,.0f} views/s",
            f"{rate.speedup:.2f}",
            f"{rate.decoded_share:.2f}",
        )
    Console().print(table)


COMMANDS: tuple[click.Command, ...] = (bench,)
