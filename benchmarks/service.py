"""What does one decode for all save, against every trainer decoding for itself?

    python benchmarks/service.py --images folder-of-jpegs

Consumers are processes that take batches of random resized crops as fast as they come, alone, three
of the same rows, and three of nested subsets (30, 50 and 70%); with loaders of their own side by
side, and through `fastprune serve`. The peer is one torchvision DataLoader whose batches three
consumers get over shared memory, as TensorSocket does it. Settings take turns; every one sees views
that none saw before it. A rate is of all consumers together, from the moment when all are ready
to the end of the last.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _harness import ratios, spread, write_result

from fastprune.beton.reader import open_beton
from fastprune.beton.writer import convert
from fastprune.cpus import usable_cpus

SHARES = {"one": (1.0,), "three equal": (1.0, 1.0, 1.0), "nested": (0.3, 0.5, 0.7)}

# Its arguments: beton, service, share of the rows, epochs, seed, workers, folder to meet in, number
# of consumers.
CONSUMER = """
import json, os, sys, time
from pathlib import Path
import numpy as np
import torch
from fastprune.loading.loader import Loader
beton, service, share, epochs, seed, workers, meeting, consumers = sys.argv[1:]
torch.set_num_threads(1)
loader = Loader(beton, service=service, seed=int(seed), num_workers=int(workers), batch_size=64,
                raw=True, device="cpu", tail="exact")
# Nested: the rows of a smaller share are among those of a larger one.
chance = np.random.default_rng(0).random(loader.beton.num_rows)
loader.set_rows(np.flatnonzero(chance < float(share)))
loader.warm_up()
Path(meeting, str(os.getpid())).touch()
while len(os.listdir(meeting)) < int(consumers):
    time.sleep(0.002)
began, views = time.monotonic(), 0
for _ in range(int(epochs)):
    for images, labels in loader:
        views += len(images)
print(json.dumps({"began": began, "ended": time.monotonic(), "views": views}))
"""

# Its arguments: beton, workers, epochs, consumers.
SHARED = """
import json, sys, time
import torch
import torch.multiprocessing as mp
from fastprune.beton.reader import open_beton
from fastprune.beton.rows import rows_of
from fastprune.peers import torchvision_loader

def consume(batches, seen):
    torch.set_num_threads(1)
    views = 0
    while (batch := batches.get()) is not None:
        views += len(batch[0])
        del batch
    seen.put((views, time.monotonic()))

if __name__ == "__main__":
    beton, (workers, epochs, consumers) = open_beton(sys.argv[1]), map(int, sys.argv[2:])
    context = mp.get_context("spawn")
    seen = context.Queue()
    queues = [context.Queue(maxsize=4) for _ in range(consumers)]
    processes = [context.Process(target=consume, args=(queue, seen)) for queue in queues]
    for process in processes:
        process.start()
    loader = torchvision_loader(beton, rows_of(beton, None), batch_size=64, image_size=224,
                                num_workers=workers)
    next(iter(loader))
    began = time.monotonic()
    for _ in range(epochs):
        for batch in loader:
            for queue in queues:
                queue.put(batch)
    for queue in queues:
        queue.put(None)
    results = [seen.get() for _ in queues]
    for process in processes:
        process.join()
    print(json.dumps({"began": began, "ended": max(end for _, end in results),
                      "views": sum(views for views, _ in results)}))
"""


def rate_of(lines: list[str]) -> float:
    """Views per second of all consumers together."""
    results = [json.loads(line) for line in lines]
    seconds = max(r["ended"] for r in results) - min(r["began"] for r in results)
    return sum(r["views"] for r in results) / seconds


def consume(beton: Path, service: str, shares: tuple[float, ...], epochs: int, seed: int) -> float:
    """Views per second that consumers of these shares get together."""
    with tempfile.TemporaryDirectory() as meeting:
        settings = (epochs, seed, usable_cpus(), meeting, len(shares))
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", CONSUMER, *map(str, (beton, service, share, *settings))],
                stdout=subprocess.PIPE,
                text=True,
            )
            for share in shares
        ]
        outputs = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return rate_of([output.splitlines()[-1] for output in outputs])


def consume_shared(beton: Path, folder: Path, epochs: int) -> float:
    """Views per second that three consumers of one torchvision DataLoader get together."""
    script = folder / "shared.py"
    script.write_text(SHARED)
    command = [sys.executable, str(script), str(beton), str(usable_cpus()), str(epochs), "3"]
    return rate_of(subprocess.check_output(command, text=True).splitlines()[-1:])


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Service:
    """A running `fastprune serve`."""

    def __init__(self, beton: Path, folder: Path, *, memory: str, pace: str):
        self.address = f"unix:{folder}/{pace}.sock"
        command = [sys.executable, "-m", "fastprune", "serve", str(beton), "--listen", self.address]
        command += ["--memory", memory, "--pace", pace]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not Path(self.address.removeprefix("unix:")).exists():
            assert self.process.poll() is None
            time.sleep(0.05)

    def num_decoded(self) -> int:
        """Views decoded so far."""
        command = [sys.executable, "-m", "fastprune", "serve", "--status", self.address, "--json"]
        return int(json.loads(subprocess.check_output(command))["views_decoded"])

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        assert self.process.wait() == 0


def measure(beton: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Rates of every case, locally and by service, in turn."""
    epochs = arguments.epochs
    services = {
        pace: Service(beton, folder, memory=arguments.memory, pace=pace)
        for pace in ("auto", "together")
    }
    rates: dict[str, dict[str, list[float]]] = {}
    union: dict[str, dict[str, list[float]]] = {}
    server_cpu: list[float] = []
    chance, seed = np.random.default_rng(0).random(open_beton(beton).num_rows), 0
    for number in range(-1, arguments.rounds):
        for case, shares in SHARES.items():
            found = {}
            seed += 1
            found["local"] = consume(beton, "", shares, epochs, seed)
            for pace, service in services.items():
                before, cpu = service.num_decoded(), cpu_seconds(service.process.pid)
                found[pace] = consume(beton, service.address, shares, epochs, seed)
                decoded = service.num_decoded() - before
                wanted = epochs * np.count_nonzero(chance < max(shares))
                if number >= 0:
                    union.setdefault(case, {}).setdefault(pace, []).append(decoded / wanted)
                    server_cpu.append((cpu_seconds(service.process.pid) - cpu) / decoded)
            if number >= 0:
                for name, rate in found.items():
                    rates.setdefault(case, {}).setdefault(name, []).append(rate)
        shared = consume_shared(beton, folder, epochs)
        if number >= 0:
            rates.setdefault("three equal", {}).setdefault("shared torchvision", []).append(shared)
    for service in services.values():
        service.stop()
    three = rates["three equal"]
    return {
        "views_per_second": {
            case: {name: spread(values) for name, values in found.items()}
            for case, found in rates.items()
        },
        "service_over_local": {
            case: {pace: ratios(found[pace], found["local"]) for pace in services}
            for case, found in rates.items()
        },
        "service_over_shared_torchvision": {
            pace: ratios(three[pace], three["shared torchvision"]) for pace in services
        },
        "decoded_over_union": {
            case: {pace: spread(values) for pace, values in found.items()}
            for case, found in union.items()
        },
        "server_cpu_seconds_per_decoded_view": spread(server_cpu),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4, help="of each consumer and round")
    parser.add_argument("--memory", default="512MiB", help="of the service")
    parser.add_argument("--no-result", action="store_true", help="print only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        (folder / "images" / "all").symlink_to(arguments.images.resolve())
        convert(folder / "images", folder / "train.beton")
        result = measure(folder / "train.beton", folder, arguments)
    result |= {"epochs": arguments.epochs, "memory": arguments.memory, "image_size": 224}
    print(json.dumps(result, indent=2))
    if not arguments.no_result:
        print(write_result("service", result))


if __name__ == "__main__":
    main()
