"""`fastprune serve`: one process decodes for every trainer of the machine, or of others."""

import json
from pathlib import Path

import click

from fastprune.cli.options import SIZE

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("betons", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--listen",
    metavar="ADDRESS",
    multiple=True,
    help="Where trainers find it: unix:PATH or grpc+tls://HOST:PORT; several share one memory.",
)
@click.option("--memory", type=SIZE, default="1GiB", help="Most memory for decoded views.")
@click.option("--workers", type=click.IntRange(min=1), help="Decoding threads; one per CPU.")
@click.option(
    "--sizes",
    type=click.IntRange(min=1),
    default=1,
    help="Image sizes at a time; they share the memory equally.",
)
@click.option("--tls-cert", type=_FILE, help="The certificate of grpc+tls addresses, PEM.")
@click.option("--tls-key", type=_FILE, help="Its key, PEM.")
@click.option("--client-ca", type=_FILE, help="Ask for client certificates of this CA, PEM.")
@click.option(
    "--token-file",
    type=_FILE,
    help="Ask for one of its tokens, one a line; with --status, send the first.",
)
@click.option(
    "--insecure", is_flag=True, help="Serve other machines without asking for token or certificate."
)
@click.option("--metrics", metavar="HOST:PORT", help="Serve /metrics (Prometheus) and /healthz.")
@click.option("--status", metavar="ADDRESS", help="Print what a running service does, and exit.")
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON.")
def serve(
    betons: tuple[Path, ...],
    listen: tuple[str, ...],
    memory: int,
    workers: int | None,
    sizes: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    client_ca: Path | None,
    token_file: Path | None,
    insecure: bool,
    metrics: str | None,
    status: str | None,
    as_json: bool,
) -> None:
    """Decode the views of BETONS once for every trainer on this machine, or on others.

    Trainers name the address: open_beton(service="unix:PATH"), data.service in a recipe, or the
    environment variable FASTPRUNE_SERVICE. SIGTERM ends it; trainers then decode by themselves.
    """
    if status is not None:
        from fastprune.service.connection import ask_status
        from fastprune.service.credentials import read_tokens

        token = None if token_file is None else read_tokens(token_file)[0]
        found = ask_status(status, token=token)
        if as_json:
            click.echo(json.dumps(found, indent=2))
        else:
            _print_status(found)
        return
    if not betons or not listen:
        raise click.UsageError("name the betons and where to --listen, or ask for a --status")

    import asyncio

    from fastprune.base.cpus import usable_cpus
    from fastprune.beton.opening import open_beton
    from fastprune.service.credentials import ServerCredentials
    from fastprune.service.server import Server

    credentials = ServerCredentials.read(
        tls_cert, tls_key, client_ca, token_file, insecure=insecure
    )
    server = Server(
        [open_beton(path.absolute()) for path in betons],
        *listen,
        memory_bytes=memory,
        num_workers=workers or usable_cpus(),
        num_sizes=sizes,
        metrics=metrics,
        credentials=credentials,
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
