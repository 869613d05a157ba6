"""What do shards cost, and how fast do the kept rows come from object storage?

    python benchmarks/remote.py --images folder-of-jpegs

A bucket is a folder behind nginx on loopback, read by path-style requests as S3's. Measured in
turn: epochs over the single beton and over the same rows in shards; a random half of the rows by
`fastprune stage` and by plain ranged GETs, one a row, with as many threads and the same client,
both onto the disk, and into memory (/dev/shm for the mirror); a loader's first batch from the
bucket and from the local beton. Bytes and requests are the server's own counts. The server works on
the same CPUs, so that rates are lower bounds.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from _harness import ratios, spread, take_turns, write_result

from fastprune.beton.beton import Beton
from fastprune.beton.convert.writer import convert
from fastprune.beton.opening import open_beton
from fastprune.beton.remote.mirror import NUM_THREADS
from fastprune.beton.remote.stage import stage
from fastprune.beton.remote.store import Store
from fastprune.loading.loader import Loader

NUM_SHARDS = 8
NGINX = """
worker_processes 2; daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
user root;
events {{ worker_connections 256; }}
http {{
  log_format counts '$request_method $body_bytes_sent $uri';
  access_log {folder}/access.log counts;
  client_body_temp_path {folder}/tmp; proxy_temp_path {folder}/tmp; fastcgi_temp_path {folder}/tmp;
  uwsgi_temp_path {folder}/tmp; scgi_temp_path {folder}/tmp;
  sendfile on; keepalive_requests 1000000;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG files")
    parser.add_argument("--repeats", type=int, default=5, help="how often each image is a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="decoding threads")
    parser.add_argument("--scratch", type=Path, help="where to write; default: the system's")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        folder = Path(name)
        single, sharded = write_betons(arguments.images, folder, arguments.repeats)
        with nginx(folder, folder / "root") as server:
            result = measure(single, sharded, folder, server, arguments)
    path = write_result("remote", result)
    print(json.dumps({key: result[key] for key in result if key != "settings"}, indent=1))
    print(f"-> {path}")


def write_betons(images: Path, folder: Path, repeats: int) -> tuple[Path, Path]:
    """The same rows in one file and in shards, in the bucket."""
    files = sorted(path for path in images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    samples = [(file.read_bytes(), at % 100) for at, file in enumerate(files)] * repeats
    bucket = folder / "root" / "bucket"
    bucket.mkdir(parents=True)
    convert(samples, bucket / "train.beton", jpeg="original")
    convert(samples, bucket / "train", jpeg="original", shards=NUM_SHARDS)
    return bucket / "train.beton", bucket / "train"


class Server:
    """A running nginx and its log."""

    def __init__(self, log: Path):
        self._log = log
        self._seen = 0

    def counts(self) -> dict[str, int]:
        """Requests and bytes of bodies since the last call."""
        time.sleep(0.2)  # a line is written when the last byte is sent
        lines = self._log.read_text().splitlines()[self._seen :]
        self._seen += len(lines)
        sent = [int(line.split()[1]) for line in lines if line.startswith("GET")]
        return {"requests": len(lines), "bytes": sum(sent)}


@contextmanager
def nginx(folder: Path, root: Path) -> Iterator[Server]:
    """Serve a folder as buckets on a free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = folder / "nginx"
    (folder / "tmp").mkdir(parents=True)
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, root=root, port=port))
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    process = subprocess.Popen([program, "-c", str(folder / "nginx.conf"), "-p", str(folder)])
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        os.environ.setdefault("AWS_ACCESS_KEY_ID", "nobody")
        os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "nothing")
        yield Server(folder / "access.log")
    finally:
        process.terminate()
        process.wait()


def measure(
    single: Path, sharded: Path, folder: Path, server: Server, arguments: argparse.Namespace
) -> dict:
    beton = open_beton(sharded)
    half = np.flatnonzero(np.random.default_rng(0).random(beton.num_rows) < 0.5)
    settings = {
        "batch_size": 64,
        "dtype": torch.uint8,
        "tail": "exact",
        "num_workers": arguments.workers,
        "device": "cpu",
    }
    shards = epochs(single, sharded, settings, arguments.rounds)
    seconds, counts = staging(beton, half, folder, server, arguments.rounds)
    wanted = int(beton.sizes[half].sum())
    tables = sum(p.stat().st_size for p in sharded.iterdir() if p.suffix != ".beton")
    tables += NUM_SHARDS * (24 + 2 * 1041) + 48 * beton.num_rows
    first = first_batches(sharded, half, folder, settings, arguments.rounds)
    return {
        "question": "what shards cost, and how fast kept rows come from object storage",
        "settings": {
            **settings,
            "rows": beton.num_rows,
            "kept_rows": len(half),
            "shards": NUM_SHARDS,
            "threads": NUM_THREADS,
            "rounds": arguments.rounds,
        },
        "images_per_second": {
            name: spread([beton.num_rows / one for one in values])
            for name, values in shards.items()
        },
        "sharded_over_single": ratios(shards["single"], shards["sharded"]),
        "wanted_bytes": {"rows": wanted, "tables": tables},
        "megabytes_per_second": {
            name: spread([wanted / one / 1e6 for one in values]) for name, values in seconds.items()
        },
        "stage_over_plain_gets": {
            where: ratios(seconds[f"plain GETs, {where}"], seconds[f"stage, {where}"])
            for where in ("disk", "memory")
        },
        "at_the_server": counts,
        "bytes_over_wanted": counts["stage, disk"]["bytes"] / (wanted + tables),
        "first_batch_seconds": {name: spread(values) for name, values in first.items()},
    }


def epochs(single: Path, sharded: Path, settings: dict, rounds: int) -> dict[str, list[float]]:
    """Epochs over the same rows, by one file and by shards."""
    loaders = {"single": Loader(single, **settings), "sharded": Loader(sharded, **settings)}
    for loader in loaders.values():
        loader.warm_up()
    return take_turns(
        {name: lambda loader=loader: exhaust(loader) for name, loader in loaders.items()},
        rounds=rounds,
    )


def exhaust(loader: Loader) -> None:
    for _ in loader:
        pass


def staging(
    beton: Beton, rows: np.ndarray, folder: Path, server: Server, rounds: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, int]]]:
    """Seconds of staging and of plain requests, in turn, and what the server counted of the last.

    Staging begins with an empty folder each time, so its tables are in its time and bytes.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        runs = {
            "stage, disk": lambda: stage("s3://bucket/train/", rows, folder / "mirror"),
            "plain GETs, disk": lambda: plain_gets(beton, rows, folder / "rows"),
            "stage, memory": lambda: stage("s3://bucket/train/", rows, Path(memory, "mirror")),
            "plain GETs, memory": lambda: plain_gets(beton, rows, None),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        counts = {}
        for number in range(1 + rounds):
            for name, run in runs.items():
                os.sync()  # no one pays for another's writing
                server.counts()
                started = time.perf_counter()
                run()
                elapsed = time.perf_counter() - started
                counts[name] = server.counts()
                if number:
                    seconds[name].append(elapsed)
            shutil.rmtree(folder / "mirror")
            shutil.rmtree(Path(memory, "mirror"))
            (folder / "rows").unlink()
    return seconds, counts


def plain_gets(beton: Beton, rows: np.ndarray, path: Path | None) -> None:
    """One ranged GET a row by the client that `stage` uses, into memory or end to end in a file."""
    store = Store("s3://bucket/train")
    starts = np.array([file.start for file in beton.files])
    files = np.searchsorted([file.first_row for file in beton.files], rows, side="right") - 1

    ends = np.cumsum(beton.sizes[rows])
    target = None if path is None else os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)

    def get(at: int) -> None:
        row, file = rows[at], files[at]
        start, size = int(beton.offsets[row] - starts[file]), int(beton.sizes[row])
        content = store.read(beton.files[file].path.name, start, size)
        if target is not None:
            os.pwrite(target, content, int(ends[at]) - size)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(get, range(len(rows))))
    if target is not None:
        os.close(target)


def first_batches(
    sharded: Path, half: np.ndarray, folder: Path, settings: dict, rounds: int
) -> dict[str, list[float]]:
    """A loader from its making to its first batch, with nothing in its mirror yet."""
    numbers = iter(range(1000))

    def first(source: str | Path, cache: bool) -> None:
        mirror = folder / f"first-{next(numbers)}" if cache else None
        batches = iter(Loader(open_beton(source, cache=mirror), half, order="random", **settings))
        next(batches)
        batches.close()  # type: ignore[attr-defined]

    return take_turns(
        {
            "from the bucket": lambda: first("s3://bucket/train/", True),
            "from the local beton": lambda: first(sharded, False),
        },
        rounds=rounds,
    )


if __name__ == "__main__":
    main()
