"""Betons: written, checked, copied, fetched."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fastprune.cli.options import (
    COUNT,
    PATH,
    Location,
    json_option,
    ray_option,
    report_faults,
    setting_options,
    show,
)
from fastprune.settings import ConvertSettings


@click.command()
@click.argument("images", type=Location())
@click.argument("beton", type=Location())
@setting_options(ConvertSettings)
@ray_option("Make the shards")
@json_option
def convert(
    images: str | Path,
    beton: str | Path,
    ray: str | bool | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write images into a beton, without loss if they are JPEGs.

    IMAGES is a folder with one subfolder per class; a folder of WebDataset tars or of Parquet
    files, or a pattern of them; or, with --labels or --no-labels, a folder of images; or a URL of
    any of them, such as s3://bucket/tars/.
    BETON is a file; with --shards a folder, or a URL such as s3://bucket/train/.
    """
    from fastprune.beton.convert.writer import convert as convert_images
    from fastprune.beton.shards import SET_NAME
    from fastprune.beton.summary import jpeg_layouts

    if settings["shard"] is not None and settings["shards"] is None:
        raise click.UsageError("--shard names one of several: add --shards.")
    if ray is not None and settings["shards"] is None:
        raise click.UsageError("--ray makes a shard with each task: add --shards.")
    start = time.monotonic()
    manifest = convert_images(images, beton, ray=ray, **settings)
    seconds = time.monotonic() - start
    counts = ", ".join(f"{count:,} {action}" for action, count in manifest.counts.items())
    num_rows = manifest.fingerprint.num_rows
    show(
        f"wrote {num_rows:,} rows ({counts}) in {seconds:.1f} s -> {beton}",
        {"rows": num_rows, **manifest.counts, "seconds": seconds, "out": beton},
        as_json=as_json,
    )
    if settings["shards"] is not None and manifest.path.name != SET_NAME:
        click.echo(f"other shards of {beton} are missing; the last run writes {SET_NAME}", err=True)
    # The lines of a manifest that was uploaded are not here any more.
    if settings["jpeg"] != "original" and not as_json and manifest.path.exists():
        click.echo(jpeg_layouts(manifest))


@click.command()
@click.argument("beton", type=PATH)
@click.option("--deep", is_flag=True, help="Decode every image and compare every CRC-32C.")
@click.option("--subset", type=PATH, help="Check this subset against the beton too.")
@click.option("--write-manifest", is_flag=True, help="Make a manifest for a beton without one.")
@json_option
def check(
    beton: Path, deep: bool, subset: Path | None, write_manifest: bool, as_json: bool
) -> None:
    """Check that every byte of a beton is where it should be."""
    from fastprune.beton.check import check_beton, write_missing_manifest
    from fastprune.beton.opening import rows_present

    if write_manifest and not deep:
        raise click.UsageError("--write-manifest vouches for every image: add --deep.")
    start = time.monotonic()
    faults = check_beton(beton, deep=deep, subset=subset)
    if write_manifest and all(fault.kind == "manifest" for fault in faults):
        manifest = write_missing_manifest(beton)
        click.echo(f"wrote {manifest.path}", err=True)
        faults = []
    where = ""
    if deep and not as_json and (mirrored := rows_present(beton)) is not None:
        where = f" in the {int(mirrored.sum()):,} rows that this mirror holds"
    where += f" in {time.monotonic() - start:.1f} s"
    shown = {"path": str(beton), "deep": deep, "faults": [asdict(fault) for fault in faults]}
    report_faults(faults, beton, as_json=shown if as_json else None, where=where)


@click.command()
@click.argument("beton", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="The beton to write.")
@click.option("--subset", type=PATH, help="The rows to keep.  [default: all]")
@click.option("--row-field", is_flag=True, help='Store the original rows as a field "row".')
@json_option
def compact(beton: Path, out: Path, subset: Path | None, row_field: bool, as_json: bool) -> None:
    """Copy a subset's rows into a beton of their own, without decoding."""
    from fastprune.beton.compact import compact as compact_beton

    start = time.monotonic()
    manifest = compact_beton(beton, out, subset=subset, row_field=row_field)
    _show_rows("copied", manifest.fingerprint.num_rows, start, out, as_json=as_json)


@click.command("dali-index")
@click.argument("beton", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="The index to write.")
@click.option("--subset", type=PATH, help="The rows to read.  [default: all]")
@json_option
def dali_index(beton: Path, out: Path, subset: Path | None, as_json: bool) -> None:
    """Write the index that lets DALI's own reader read a subset of a beton."""
    from fastprune.beton.dali_index import write_dali_index

    start = time.monotonic()
    num_rows = write_dali_index(beton, out, subset=subset)
    _show_rows("indexed", num_rows, start, out, as_json=as_json)


def _show_rows(verb: str, num_rows: int, start: float, out: Path, *, as_json: bool) -> None:
    seconds = time.monotonic() - start
    show(
        f"{verb} {num_rows:,} rows in {seconds:.1f} s -> {out}",
        {"rows": num_rows, "seconds": seconds, "out": out},
        as_json=as_json,
    )


@click.command()
@click.argument("url")
@click.argument("subset")
@click.argument("folder", type=PATH)
@click.option("--threads", type=COUNT, default=16, help="Requests at a time.")
@click.option(
    "--retry-seconds",
    type=click.FloatRange(min=0),
    default=60.0,
    help="How long a request is repeated that fails or returns wrong bytes.",
)
@ray_option("Fetch the rows on every node")
@json_option
def stage(
    url: str,
    subset: str,
    folder: Path,
    threads: int,
    retry_seconds: float,
    ray: str | bool | None,
    as_json: bool,
) -> None:
    """Fetch a subset's rows of a beton in object storage into a mirror on a local disk.

    URL names a beton (s3://bucket/train.beton) or a folder of shards (s3://bucket/train/); SUBSET
    is a subset's file, or the word "all". `open_beton(URL, cache=FOLDER)` and
    `open_beton(FOLDER)` read the mirror.
    """
    from fastprune.beton.remote.stage import stage as stage_rows

    rows = None if subset == "all" else subset
    staged = stage_rows(url, rows, folder, threads=threads, retry_seconds=retry_seconds, ray=ray)
    nodes = "" if ray is None else f" of {staged.num_nodes:,} nodes"
    show(
        f"{staged.num_rows:,} rows are in {folder}{nodes}: {staged.num_fetched_rows:,} were "
        "missing; "
        f"{staged.fetched_bytes:,} bytes in {staged.num_requests:,} requests took "
        f"{staged.seconds:.1f} s",
        {**asdict(staged), "out": folder},
        as_json=as_json,
    )


@click.command()
@click.argument("file", type=PATH)
@json_option
def info(file: Path, as_json: bool) -> None:
    """Show what is in a beton, a score table (.parquet) or a subset (.npy)."""
    from fastprune.beton.summary import summarize

    summary = summarize(file)
    if as_json:
        click.echo(json.dumps(summary, indent=2))
        return
    for name, value in summary.items():
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{key} {_number(part)}" for key, part in value.items())
        click.echo(f"{name.replace('_', ' '):22}{_number(shown)}")


def _number(value: object) -> str:
    # True is an int to Python.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:,}" if is_number else str(value)


COMMANDS: tuple[click.Command, ...] = (convert, check, compact, dali_index, stage, info)
