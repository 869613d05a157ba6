"""`fastprune doctor`: what works here, and what to change."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from fastprune.cli.options import PATH, json_option

_MARKS = {"good": "ok", "note": "note", "bad": "BAD"}


@click.command()
@click.argument("betons", nargs=-1, type=PATH)
@click.option(
    "--require",
    "required",
    multiple=True,
    type=click.Choice(["cpu", "dali", "ffcv", "cuda"]),
    help="Fail where this does not work; may be given several times.",
)
@json_option
def doctor(betons: tuple[Path, ...], required: tuple[str, ...], as_json: bool) -> None:
    """Say what is installed, what works here, and what to change.

    An image is decoded with every engine that is installed. BETONS, if named, are held against the
    memory that can cache them. The exit code is 1 where something keeps fastprune from working.
    """
    import logging

    from fastprune.base.environment import describe_versions
    from fastprune.doctor import diagnose

    # Which engine a loader chose is no news here.
    log = logging.getLogger("fastprune.loading")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        findings = diagnose(betons)
    finally:
        log.setLevel(level)
    works = {
        name: any(f.topic.startswith(f"engine {name},") and f.verdict == "good" for f in findings)
        for name in ("cpu", "dali", "ffcv")
    }
    works["cuda"] = any(f.topic == "torch and CUDA" and f.verdict == "good" for f in findings)
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


COMMANDS: tuple[click.Command, ...] = (doctor,)
