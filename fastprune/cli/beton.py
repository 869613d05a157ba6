"""Subcommands around the beton."""

import click

COMMANDS: tuple[click.Command, ...] = ()
