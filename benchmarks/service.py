"""What does one decode for all save, against every trainer decoding for itself?

    python benchmarks/service.py --images folder-of-jpegs

Consumers are processes that take uint8 batches of random resized crops as fast as they come: alone,
three of the same rows, and three of nested subsets (30, 50 and 70%); with loaders of their own side
by side, and through `fastprune serve`. The peer is one torchvision DataLoader whose batches three
consumers get over shared memory, as TensorSocket does it. Three students distil at once with and
without the service. Settings take turns, and every one sees views that none saw before it. A rate
is of all consumers together, from the moment when all are ready to the end of the last.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _consumers import CASES, Consumers, Process, ServiceProcess, share_of_rows
from _harness import ratios, spread, write_result

from fastprune.base.cpus import usable_cpus
from fastprune.bench.peers import torchvision_loader
from fastprune.beton.beton import rows_of
from fastprune.beton.convert.writer import convert
from fastprune.beton.opening import open_beton
from fastprune.distillation.losses import distillation_loss
from fastprune.loading.loader import Loader
from fastprune.networks.catalog import build_network

SIZE, BATCH_SIZE = 224, 64
STUDENTS = ("resnet8", "resnet20", "MobileNetV2")
STUDENT_SIZE = 32


def consume_shared(queue: Any, seen: Any) -> None:
    """Take batches of a shared DataLoader, in a process of its own."""
    torch.set_num_threads(1)
    while True:
        num_views = 0
        while (batch := queue.get()) is not None:
            num_views += len(batch[0])
            del batch
        seen.put((num_views, time.monotonic()))


def share_torchvision(beton_path: str) -> None:
    """Give every batch of one DataLoader to three consumers, each time that it is asked for."""
    beton = open_beton(beton_path)
    # The batch lies in shared memory: a consumer gets a descriptor, and no copy is made.
    context = torch.multiprocessing.get_context("spawn")
    seen = context.Queue()
    queues = [context.Queue(maxsize=4) for _ in range(3)]
    for queue in queues:
        context.Process(target=consume_shared, args=(queue, seen), daemon=True).start()
    loader = torchvision_loader(
        beton,
        rows_of(beton, None),
        batch_size=BATCH_SIZE,
        image_size=SIZE,
        num_workers=usable_cpus(),
    )
    for _ in loader:  # starts its workers, and the consumers
        break
    for line in sys.stdin:
        began = time.monotonic()
        for _ in range(json.loads(line)["epochs"]):
            for batch in loader:
                for queue in queues:
                    queue.put(batch)
        for queue in queues:
            queue.put(None)
        results = [seen.get() for _ in queues]
        ended = max(end for _, end in results)
        num_views = sum(views for views, _ in results)
        print(json.dumps({"rate": num_views / (ended - began)}), flush=True)


def train_student(name: str, beton_path: str) -> None:
    """Distil a student for an epoch, each time that it is asked for."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    num_classes = open_beton(beton_path).num_classes
    teacher, student = (build_network(n, num_classes=num_classes) for n in ("resnet20", name))
    teacher.eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    for line in sys.stdin:
        settings = json.loads(line)
        beton = open_beton(beton_path, service=settings.pop("service"))
        loader = Loader(
            beton, batch_size=BATCH_SIZE, image_size=STUDENT_SIZE, augment="rrc", **settings
        )
        loader.set_rows(share_of_rows(loader.beton.num_rows, 0.5))
        loader.warm_up()
        print("{}", flush=True)
        sys.stdin.readline()
        began = time.monotonic()
        for images, _ in loader:
            with torch.no_grad():
                taught = teacher(images)
            loss = distillation_loss(student(images), taught, temperature=4.0).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(json.dumps({"began": began, "ended": time.monotonic()}), flush=True)


def seconds_of_students(students: list[Process], service: str, seed: int) -> float:
    """Wall clock until the last of the students has gone through its epoch."""
    for student in students:
        settings = {"service": service, "seed": seed, "num_workers": usable_cpus()}
        student.tell(settings)
    for student in students:
        student.answer()
    for student in students:
        student.tell({})
    found = [student.answer() for student in students]
    return float(max(f["ended"] for f in found) - min(f["began"] for f in found))


class Measurement:
    """Rates of every case, locally and by service, in turn."""

    def __init__(self, beton_path: Path, *, epochs: int, memory_bytes: int):
        self._beton_path = beton_path
        self._epochs = epochs
        self._num_rows = open_beton(beton_path).num_rows
        self._consumers = Consumers(3)
        workers = {"memory_bytes": memory_bytes, "num_workers": usable_cpus()}
        self._service = ServiceProcess(beton_path, **workers)
        script, path = str(Path(__file__).resolve()), str(beton_path)
        self._shared = Process(script, "--role", "shared", path)
        self._students = [Process(script, "--role", name, path) for name in STUDENTS]
        self._seed = 0
        self.rates: dict[str, dict[str, list[float]]] = {case: {} for case in CASES}
        self.decoded: dict[str, list[float]] = {case: [] for case in CASES}
        self.server_cpu: list[float] = []
        self.seconds: dict[str, list[float]] = {"local": [], "service": []}

    def consume(self, case: str) -> None:
        """One round of a case."""
        self._seed += 1
        shares = CASES[case]
        for name, service in {"local": None, "service": self._service}.items():
            settings = {"batch_size": BATCH_SIZE, "image_size": SIZE, "num_workers": usable_cpus()}
            settings |= {"service": service.address if service else "", "seed": self._seed}
            # Before loaders get ready, for which the first batch is decoded.
            before, cpu = (service.num_decoded, service.cpu_seconds) if service else (0, 0.0)
            self._consumers.prepare(
                self._beton_path, shares, epochs=self._epochs, settings=settings
            )
            self.rates[case].setdefault(name, []).append(self._consumers.run())
            if service:
                num_decoded = service.num_decoded - before
                num_wanted = self._epochs * len(share_of_rows(self._num_rows, max(shares)))
                self.decoded[case].append(num_decoded / num_wanted)
                self.server_cpu.append((service.cpu_seconds - cpu) / num_decoded)

    def share(self) -> None:
        """One round of the shared torchvision DataLoader."""
        self._shared.tell({"epochs": self._epochs})
        rate = self._shared.answer()["rate"]
        self.rates["three equal"].setdefault("shared torchvision", []).append(rate)

    def train(self) -> None:
        """One round of three students."""
        self._seed += 1
        for name, address in {"local": "", "service": self._service.address}.items():
            seconds = seconds_of_students(self._students, address, self._seed)
            self.seconds[name].append(seconds)

    def forget(self) -> None:
        """Drop what was measured so far: a first round warms up."""
        for found in (*self.rates.values(), *self.decoded.values()):
            found.clear()  # type: ignore[attr-defined]
        self.server_cpu.clear()
        for seconds in self.seconds.values():
            seconds.clear()

    def close(self) -> None:
        """End all processes."""
        for process in (self._consumers, self._shared, *self._students, self._service):
            process.close()  # type: ignore[attr-defined]

    def result(self) -> dict[str, Any]:
        """What was measured, to be written."""
        three = self.rates["three equal"]
        return {
            "views_per_second": {
                case: {name: spread(values) for name, values in found.items()}
                for case, found in self.rates.items()
            },
            "service_over_local": {
                case: ratios(found["service"], found["local"]) for case, found in self.rates.items()
            },
            "service_over_shared_torchvision": ratios(
                three["service"], three["shared torchvision"]
            ),
            "decoded_over_union": {case: spread(values) for case, values in self.decoded.items()},
            "server_cpu_seconds_per_decoded_view": spread(self.server_cpu),
            "students": {
                "names": STUDENTS,
                "image_size": STUDENT_SIZE,
                "seconds": {name: spread(values) for name, values in self.seconds.items()},
                "local_over_service": ratios(self.seconds["local"], self.seconds["service"]),
            },
        }


def converted(images: Path, folder: Path, copies: int) -> Path:
    """A beton that has each image a few times, so that an epoch is not over at once."""
    (folder / "images").mkdir()
    for copy in range(copies):
        (folder / "images" / str(copy)).symlink_to(images.resolve())
    convert(folder / "images", folder / "train.beton")
    return folder / "train.beton"


def measure(beton_path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All of it, in turn, until the rounds or the minutes are over."""
    measurement = Measurement(
        beton_path, epochs=arguments.epochs, memory_bytes=arguments.memory_mib << 20
    )
    try:
        started = time.monotonic()
        for number in range(1 + arguments.rounds):
            for case in CASES:
                measurement.consume(case)
            measurement.share()
            measurement.train()
            if number == 0:
                measurement.forget()
            else:
                print(json.dumps(measurement.result()), file=sys.stderr, flush=True)
            rounds_seconds = (time.monotonic() - started) / (number + 1)
            if number > 0 and time.monotonic() - started + rounds_seconds > arguments.seconds:
                break
        return measurement.result()
    finally:
        measurement.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder of JPEG files")
    parser.add_argument("--beton", type=Path, help="in place of images: a beton with a manifest")
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--seconds", type=float, default=3600, help="no round begins beyond them")
    parser.add_argument("--copies", type=int, default=4, help="how often the beton has each image")
    parser.add_argument("--epochs", type=int, default=1, help="of each consumer and round")
    parser.add_argument("--memory-mib", type=int, default=512, help="of each service")
    parser.add_argument("--no-result", action="store_true", help="print only")
    parser.add_argument("--role", nargs=2, help="what a process of this script does")
    arguments = parser.parse_args()
    if arguments.role:
        role, path = arguments.role
        share_torchvision(path) if role == "shared" else train_student(role, path)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        beton_path = arguments.beton or converted(arguments.images, folder, arguments.copies)
        num_rows = open_beton(beton_path).num_rows
        result = measure(beton_path, arguments)
    result |= {"rows": num_rows, "epochs": arguments.epochs, "image_size": SIZE}
    result["memory_mib"] = arguments.memory_mib
    print(json.dumps(result, indent=2))
    if not arguments.no_result:
        print(write_result("service", result))


if __name__ == "__main__":
    main()
