"""`fastprune bench`: the measurements that a user runs on their own machine."""

from pathlib import Path

import click

_FILE = click.Path(path_type=Path)


@click.group()
def bench() -> None:
    """Measure the speed of this machine."""


@bench.command()
@click.argument("beton", type=_FILE)
@click.option("--subset", type=_FILE, help="Load these rows only.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64)
@click.option("--image-size", type=click.IntRange(min=1), default=224)
@click.option("--workers", type=click.IntRange(min=1), help="Decoding threads or processes.")
@click.option("--device", default="auto", help="Where our loaders deliver: auto, cpu, cuda.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="Counted epochs of each.")
def loader(
    beton: Path,
    subset: Path | None,
    batch_size: int,
    image_size: int,
    workers: int | None,
    device: str,
    rounds: int,
) -> None:
    """Images per second of every loader that works here, on your beton and subset.

    Beside ours stand stock FFCV and torchvision. They take turns; a first epoch is not counted.
    """
    from rich.console import Console
    from rich.table import Table

    from fastprune.bench import bench_loader
    from fastprune.cpus import usable_cpus

    rates = bench_loader(
        beton,
        subset,
        batch_size=batch_size,
        image_size=image_size,
        num_workers=workers or usable_cpus(),
        device=device,
        rounds=rounds,
    )
    table = Table("loader", "images/s", "range", "first batch")
    for rate in rates:
        table.add_row(
            rate.name,
            f"{rate.images_per_second:,.0f}",
            f"{rate.slowest:,.0f} - {rate.fastest:,.0f}",
            f"{rate.first_batch_seconds:.1f} s",
        )
    Console().print(table)
    best = max(rates, key=lambda rate: rate.images_per_second)
    click.echo(f"fastest: {best.name}, {best.images_per_second:,.0f} images/s")


COMMANDS: tuple[click.Command, ...] = (bench,)
