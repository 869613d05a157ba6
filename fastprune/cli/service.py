"""`fastprune serve`: one process decodes for every trainer of the machine."""

import json
from pathlib import Path

import click

from fastprune.cli.options import SIZE


@click.command()
@click.argument("betons", nargs=-1, type=click.Path(path_type=Path))
@click.option("--listen", metavar="ADDRESS", help="Where trainers find it: unix:PATH.")
@click.option("--memory", type=SIZE, default="1GiB", help="Most memory for decoded views.")
@click.option("--workers", type=click.IntRange(min=1), help="Decoding threads; one per CPU.")
@click.option(
    "--pace",
    type=click.Choice(["auto", "together", "free"]),
    default="auto",
    help="Who waits when trainers drift apart: leaders when decoders are busy, leaders, nobody.",
)
@click.option("--metrics", metavar="HOST:PORT", help="Serve /metrics (Prometheus) and /healthz.")
@click.option("--status", metavar="ADDRESS", help="Print what a running service does, and exit.")
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON.")
def serve(
    betons: tuple[Path, ...],
    listen: str | None,
    memory: int,
    workers: int | None,
    pace: str,
    metrics: str | None,
    status: str | None,
    as_json: bool,
) -> None:
    """Decode the views of BETONS once for every trainer on this machine.

    Trainers name the address: Loader(service="unix:PATH"), data.service in a recipe, or the
    environment variable FASTPRUNE_SERVICE. SIGTERM ends it; trainers then decode by themselves.
    """
    if status is not None:
        from fastprune.service.server import ask_status

        found = ask_status(status)
        if as_json:
            click.echo(json.dumps(found, indent=2))
        else:
            _print_status(found)
        return
    if not betons or listen is None:
        raise click.UsageError("name the betons and where to --listen, or ask for a --status")

    import asyncio

    from fastprune.beton.reader import open_beton
    from fastprune.cpus import usable_cpus
    from fastprune.service.server import Server

    server = Server(
        [open_beton(path.absolute()) for path in betons],
        listen,
        memory_bytes=memory,
        num_workers=workers or usable_cpus(),
        pace=pace,
        metrics=metrics,
    )
    asyncio.run(server.run())
    found = server.status()
    click.echo(f"decoded {found['views_decoded']:,} views, served {found['views_served']:,}")


def _print_status(found: dict[str, object]) -> None:
    """Print a table of clients."""
    from rich.console import Console
    from rich.table import Table

    table = Table("client", "size", "epochs", "position", "views/s", "shared", "state")
    clients = found["clients"]
    assert isinstance(clients, list)
    for client in clients:
        table.add_row(
            client["name"],
            str(client["image_size"]),
            str(client["epochs"]),
            f"{client['position']:.1%}",
            f"{client['views_per_second']:,.0f}",
            f"{client['shared_share']:.0%}",
            client["state"],
        )
    Console().print(table)
    click.echo(
        f"decoded {found['views_decoded']:,} views, served {found['views_served']:,}; window "
        f"{found['window_bytes']:,} of {found['memory_bytes']:,} bytes"
    )


COMMANDS: tuple[click.Command, ...] = (serve,)
