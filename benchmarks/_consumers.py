"""Processes of the service's benchmarks: a service, and consumers that take batches from it.

Consumers take batches as fast as they come. They live on between measurements, so that only loading
is measured. Run as a script, this file is a consumer.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import FastpruneError
from fastprune.service.connection import ask_status

#: Shares of the rows that consumers take at the same time; rows of a smaller one are in a larger.
CASES: dict[str, tuple[float, ...]] = {
    "one": (1.0,),
    "three equal": (1.0, 1.0, 1.0),
    "nested 30/50/70%": (0.3, 0.5, 0.7),
}


class Process:
    """A process that is given work on its standard input, and answers in lines of JSON."""

    def __init__(self, *arguments: str):
        """Start Python with these arguments."""
        command = [sys.executable, *arguments]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def tell(self, work: Mapping[str, Any]) -> None:
        """Hand over work."""
        assert self._process.stdin is not None
        print(json.dumps(work), file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer.

        Raises:
            FastpruneError: the process died.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise FastpruneError("a consumer died; its own message is above.")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class ServiceProcess:
    """A running `fastprune serve`, with a socket in a folder of its own."""

    def __init__(
        self,
        beton_path: str | Path,
        *,
        memory_bytes: int,
        num_workers: int,
        options: Sequence[str] = (),
    ):
        """Start it, and wait until it listens.

        Args:
            beton_path: what it serves.
            memory_bytes: of its slab.
            num_workers: its decoding threads.
            options: further ones of `fastprune serve`, such as addresses beside the socket.

        Raises:
            FastpruneError: it does not start.
        """
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "service.sock"
        self.address = f"unix:{path}"
        # The socket comes last: once it is there, every other address can be reached.
        command = [sys.executable, "-m", "fastprune", "serve", str(beton_path), *options]
        command += [
            "--listen",
            self.address,
            "--memory",
            str(memory_bytes),
        ]
        command += ["--workers", str(num_workers)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not path.exists():
            if self._process.poll() is not None:
                self._folder.cleanup()
                raise FastpruneError("the service did not start; its own message is above.")
            time.sleep(0.01)

    @property
    def num_decoded(self) -> int:
        """Views decoded so far."""
        return int(ask_status(self.address)["views_decoded"])

    @property
    def cpu_seconds(self) -> float:
        """CPU time that it has used."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()


def consume() -> None:
    """Take batches as standard input asks."""
    import torch

    from fastprune.beton.opening import open_beton
    from fastprune.loading.loader import Loader

    # As in a trainer of several on one machine, whose threads would get in each other's way.
    torch.set_num_threads(1)
    for line in sys.stdin:
        work = json.loads(line)
        settings = work["settings"]
        beton = open_beton(work["beton"], service=settings.pop("service"))
        loader = Loader(beton, dtype=torch.uint8, device="cpu", tail="exact", **settings)
        loader.set_rows(share_of_rows(loader.beton.num_rows, work["share"]))
        loader.warm_up()
        _say({})
        sys.stdin.readline()
        began, cpu, num_views = time.monotonic(), time.process_time(), 0
        for _ in range(work["epochs"]):
            for images, _ in loader:
                num_views += len(images)
        answer = {"began": began, "ended": time.monotonic(), "views": num_views}
        _say(answer | {"cpu_seconds": time.process_time() - cpu})


def _say(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def share_of_rows(num_rows: int, share: float) -> NDArray[np.int64]:
    """Rows (K,) of a share of all; those of a smaller share are among those of a larger."""
    return np.flatnonzero(np.random.default_rng(0).random(num_rows) < share)


class Consumers:
    """Several consumers, of which as many take part as there are shares of the rows.

    Attributes:
        cpu_seconds: CPU time that all together used in the last run.
    """

    def __init__(self, number: int):
        """Start them."""
        self.cpu_seconds = 0.0
        self._all = [Process(str(Path(__file__).resolve())) for _ in range(number)]
        self._together: list[Process] = []

    def prepare(
        self,
        beton_path: str | Path,
        shares: Sequence[float],
        *,
        epochs: int,
        settings: Mapping[str, Any],
    ) -> None:
        """Have loaders made, and wait until all are ready.

        Args:
            beton_path: the beton.
            shares: of the rows, one for each consumer that takes part.
            epochs: that each consumer goes through.
            settings: arguments of `Loader`.
        """
        self._together = self._all[: len(shares)]
        for consumer, share in zip(self._together, shares, strict=True):
            work = {"beton": str(beton_path), "share": share, "epochs": epochs}
            consumer.tell(work | {"settings": dict(settings)})
        for consumer in self._together:
            consumer.answer()

    def run(self) -> float:
        """Views per second of all together, from the first's beginning to the last's end."""
        for consumer in self._together:
            consumer.tell({})
        found = [consumer.answer() for consumer in self._together]
        self.cpu_seconds = sum(f["cpu_seconds"] for f in found)
        seconds = max(f["ended"] for f in found) - min(f["began"] for f in found)
        return float(sum(f["views"] for f in found) / seconds)

    def close(self) -> None:
        """End them."""
        for consumer in self._all:
            consumer.close()


if __name__ == "__main__":
    consume()
