"""The `fastprune` command: each subcommand parses, calls one public function, prints one line.

One file holds the subcommands of one station. They import what they call when they are called, so
that `fastprune --help` answers at once.
"""

import errno
import logging
import os
import signal
import sys
import warnings
from typing import Any

import click

from fastprune import __version__
from fastprune.base.errors import FastpruneError, InvalidValueError
from fastprune.cli import (
    beton,
    cache,
    machine,
    report,
    scores,
    service,
    subsets,
    training,
)
from fastprune.cli.options import flags_of, named_by_flag

_COMMAND = "fastprune.command"
_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}


class _InOrder(click.Group):
    """A group that lists its commands in the order of the pipeline and prints errors plainly."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order in which they were added."""
        del ctx
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the command, and keep it for error messages."""
        found = super().resolve_command(ctx, args)
        ctx.meta[_COMMAND] = found[1]
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; a fault of the user's data or disk is one message and exit code 1."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            # click would end with 1; schedulers tell a signal from a failure by 128 + its number.
            number = getattr(stop, "number", signal.SIGINT)
            click.echo(f"{signal.Signals(number).name} ended the command.", err=True)
            sys.exit(128 + number)
        except (FastpruneError, OSError) as error:
            # click itself ends the command quietly when the reader is done (`| head`).
            is_closed_pipe = isinstance(error, OSError) and error.errno == errno.EPIPE
            if ctx.params["debug"] or is_closed_pipe:
                raise
            message = str(error)
            if isinstance(error, InvalidValueError):
                message = named_by_flag(message, flags_of(ctx.meta[_COMMAND]))
            click.echo(f"{type(error).__name__}: {message}", err=True)
            sys.exit(1)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print one plain line, without the line of code that warns."""
    click.echo(f"warning: {message}", err=True)


def _open_closed_streams() -> None:
    """Replace closed standard streams (`2>&-`, some daemons) by the null device."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # open() returns the lowest free number. Otherwise the next file would get it, and
            # what a library prints would end up in a beton.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


@click.group(cls=_InOrder, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="fastprune")
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
def main(debug: bool) -> None:
    """Distill vision models on exact, reproducible parts of an image dataset.

    \b
    images --convert--> train.beton --score--> scores --select--> subset --train--> student
    """  # noqa: D301 - click reads \b as "keep these lines"
    _open_closed_streams()
    # Other libraries stay quiet: numba and matplotlib log thousands of lines at DEBUG.
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    logging.getLogger("fastprune").setLevel(logging.DEBUG if debug else logging.INFO)
    if not debug:
        warnings.showwarning = _show_warning


for _command in (
    *beton.COMMANDS,
    *scores.COMMANDS,
    *subsets.COMMANDS,
    *training.COMMANDS,
    *cache.COMMANDS,
    *service.COMMANDS,
    *report.COMMANDS,
    *machine.COMMANDS,
):
    main.add_command(_command)
