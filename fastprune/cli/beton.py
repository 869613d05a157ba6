"""Subcommands around the beton."""

import json
import time
from pathlib import Path

import click

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("images", type=_FILE)
@click.argument("beton", type=_FILE)
@click.option("--workers", type=int, help="Processes.  [default: one per core, at most 16]")
@click.option(
    "--jpeg",
    type=click.Choice(["original"]),
    default="original",
    help="original: copy the bytes of every JPEG that can stay as it is.",
)
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    help="stop at the first unreadable image, or leave it out and list it in the manifest.",
)
@click.option("--quality", type=int, default=95, help="JPEG quality of transcoded images.")
@click.option("--max-side", type=int, help="Shrink images with a longer side, in pixels.")
@click.option(
    "--exif",
    type=click.Choice(["ignore", "apply"]),
    default="ignore",
    help="EXIF orientation: ignore it as FFCV and torchvision do, or turn the pixels.",
)
@click.option("--verify", is_flag=True, help="Decode every image once to find damage in its data.")
@click.option("--shuffle-rows", type=int, metavar="SEED", help="Put the rows in a random order.")
@click.option("--resume", is_flag=True, help="Go on with the partial file of an interrupted run.")
@click.option("--keep-partial", is_flag=True, help="Leave a partial file when the run fails.")
def convert(
    images: Path,
    beton: Path,
    workers: int | None,
    jpeg: str,
    on_error: str,
    quality: int,
    max_side: int | None,
    exif: str,
    verify: bool,
    shuffle_rows: int | None,
    resume: bool,
    keep_partial: bool,
) -> None:
    """Write the images of an ImageFolder tree into a beton."""
    from fastprune.beton.writer import convert as convert_images

    start = time.monotonic()
    manifest = convert_images(
        images,
        beton,
        workers=workers,
        jpeg=jpeg,
        on_error=on_error,
        quality=quality,
        max_side=max_side,
        exif=exif,
        verify=verify,
        shuffle_seed=shuffle_rows,
        resume=resume,
        keep_partial=keep_partial,
    )
    seconds = time.monotonic() - start
    counts = ", ".join(f"{count:,} {action}" for action, count in manifest.counts.items())
    click.echo(
        f"wrote {manifest.fingerprint.num_rows:,} rows ({counts}) in {seconds:.1f} s -> {beton}"
    )


@click.command()
@click.argument("beton", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(beton: Path, as_json: bool) -> None:
    """Show what is in a beton."""
    from fastprune.beton.summary import summarize

    summary = summarize(beton)
    if as_json:
        click.echo(json.dumps(summary, indent=2))
        return
    for name, value in summary.items():
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{key} {_number(part)}" for key, part in value.items())
        click.echo(f"{name.replace('_', ' '):22}{_number(shown)}")


def _number(value: object) -> str:
    """Numbers with thousands separators, anything else as it is."""
    return f"{value:,}" if isinstance(value, int | float) else str(value)


COMMANDS: tuple[click.Command, ...] = (convert, info)
