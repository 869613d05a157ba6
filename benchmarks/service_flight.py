"""What does a loading service cost over the network, beside its Unix socket?

    python benchmarks/service_flight.py --images folder-of-jpegs

A consumer takes uint8 batches of random resized crops as fast as they come: decoded by itself; and
from one service over its Unix socket, over Arrow Flight on loopback, and over Flight with TLS and a
token. Each transport takes every view twice: first the service decodes it ("decoding"), then it has
it ("delivering"), so that the second rate and its CPU time are of the transport alone. Then one of
two services is killed in the middle of an epoch, and a lone one: the longest wait for a batch after
it is the time of fail-over. All settings take turns.
"""

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from _consumers import Consumers, ServiceProcess
from _harness import ratios, spread, write_result
from service import BATCH_SIZE, SIZE, converted

from fastprune.base.cpus import usable_cpus
from fastprune.beton.opening import open_beton
from fastprune.loading.loader import Loader

VIEW_BYTES = 3 * SIZE**2
LINKS = {"25 GbE": 25e9, "100 GbE": 100e9}  # bits per second


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def make_certificate(folder: Path) -> list[str]:
    """A certificate of its own authority and a token; returns the options that name them."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext"]
    command += ["subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (folder / "token").write_text(token := secrets.token_hex(32))
    os.environ["FASTPRUNE_SERVICE_TOKEN"] = token
    os.environ["FASTPRUNE_SERVICE_CA"] = str(folder / "cert.pem")
    options = {"--tls-cert": "cert.pem", "--tls-key": "key.pem", "--token-file": "token"}
    return [part for name, file in options.items() for part in (name, str(folder / file))]


class Measurement:
    """Rates and CPU time by transport, in turn."""

    def __init__(self, beton_path: Path, options: list[str], arguments: argparse.Namespace):
        self._beton_path = beton_path
        self._epochs = arguments.epochs
        self._num_views = arguments.epochs * open_beton(beton_path).num_rows
        addresses = {
            "flight": f"grpc://127.0.0.1:{free_port()}",
            "flight, TLS": f"grpc+tls://127.0.0.1:{free_port()}",
        }
        self._start: dict[str, Any] = {
            "memory_bytes": arguments.memory_mib << 20,
            "num_workers": usable_cpus(),
        }
        self._options = options
        listen = [part for address in addresses.values() for part in ("--listen", address)]
        self._service = ServiceProcess(beton_path, options=[*listen, *options], **self._start)
        self._addresses = {"unix": self._service.address, **addresses}
        self._consumers = Consumers(1)
        self._seed = 0
        self.local: list[float] = []
        self.rates: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.cpu: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.failover: dict[str, list[float]] = defaultdict(list)

    def turn(self) -> None:
        """One round: everybody once, each on views that none saw before."""
        self._seed += 1
        self.local.append(self._run("", self._seed))
        for name, address in self._addresses.items():
            self._seed += 1
            for what in ("decoding", "delivering"):
                decoded, cpu = self._service.num_decoded, self._service.cpu_seconds
                rate = self._run(address, self._seed)
                if what == "delivering":
                    assert self._service.num_decoded == decoded, "the memory is too small"
                    server = (self._service.cpu_seconds - cpu) / self._num_views
                    self.cpu["server"][name].append(server)
                    client = self._consumers.cpu_seconds / self._num_views
                    self.cpu["client"][name].append(client)
                self.rates[what][name].append(rate)

    def _run(self, address: str, seed: int) -> float:
        settings = {"batch_size": BATCH_SIZE, "image_size": SIZE, "num_workers": usable_cpus()}
        settings |= {"service": address, "seed": seed}
        self._consumers.prepare(self._beton_path, (1.0,), epochs=self._epochs, settings=settings)
        return self._consumers.run()

    def kill(self, *, num_services: int) -> None:
        """Kill one of several services, and note the longest wait for a batch after it."""
        self._seed += 1
        ports = [free_port() for _ in range(num_services)]
        services = [
            ServiceProcess(
                self._beton_path,
                options=["--listen", f"grpc+tls://127.0.0.1:{port}", *self._options],
                **self._start,
            )
            for port in ports
        ]
        addresses = ",".join(f"grpc+tls://127.0.0.1:{port}" for port in ports)
        loader = Loader(
            open_beton(self._beton_path, service=addresses),
            dtype=torch.uint8,
            device="cpu",
            seed=self._seed,
            batch_size=BATCH_SIZE,
            image_size=SIZE,
        )
        loader.warm_up()
        longest = last = 0.0
        for number, _ in enumerate(loader):
            now = time.monotonic()
            if number > 6:
                longest = max(longest, now - last)
            if number == 6:
                services[0].kill()
            last = time.monotonic()
        where = "to the other service" if num_services > 1 else "to decoding here"
        self.failover[where].append(longest)
        for service in services:
            service.close()

    def forget(self) -> None:
        """Drop what was measured so far: a first round warms up."""
        for found in (self.rates, self.cpu, self.failover):
            found.clear()
        self.local.clear()

    def close(self) -> None:
        """End all processes."""
        self._consumers.close()
        self._service.close()

    def result(self) -> dict[str, Any]:
        """What was measured, to be written."""
        return {
            "views_per_second": {
                "decoding": {
                    "local": spread(self.local),
                    **{name: spread(values) for name, values in self.rates["decoding"].items()},
                },
                "delivering": {
                    name: spread(values) for name, values in self.rates["delivering"].items()
                },
            },
            "service_over_local": {
                name: ratios(values, self.local) for name, values in self.rates["decoding"].items()
            },
            "delivering_over_unix": {
                name: ratios(values, self.rates["delivering"]["unix"])
                for name, values in self.rates["delivering"].items()
            },
            "cpu_seconds_per_delivered_view": {
                side: {name: spread(values) for name, values in found.items()}
                for side, found in self.cpu.items()
            },
            "seconds_of_failover": {
                where: spread(values) for where, values in self.failover.items()
            },
            "views_per_second_of_a_link_by_arithmetic": {
                name: bits / 8 / VIEW_BYTES for name, bits in LINKS.items()
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=3, help="of each kind")
    parser.add_argument("--copies", type=int, default=2, help="how often the beton has each image")
    parser.add_argument("--epochs", type=int, default=2, help="of the consumer in a round")
    parser.add_argument("--memory-mib", type=int, default=1024, help="of each service")
    parser.add_argument("--no-result", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        beton_path = converted(arguments.images, folder, arguments.copies)
        measurement = Measurement(beton_path, make_certificate(folder), arguments)
        try:
            for number in range(1 + arguments.rounds):
                measurement.turn()
                if number == 0:
                    measurement.forget()
            for _ in range(arguments.kills):
                measurement.kill(num_services=2)
                measurement.kill(num_services=1)
            result = measurement.result()
        finally:
            measurement.close()
        result |= {"rows": open_beton(beton_path).num_rows, "epochs": arguments.epochs}
    result |= {"image_size": SIZE, "memory_mib": arguments.memory_mib}
    print(json.dumps(result, indent=2))
    if not arguments.no_result:
        print(write_result("service-flight", result), file=sys.stderr)


if __name__ == "__main__":
    main()
