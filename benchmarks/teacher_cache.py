"""What does a distillation step cost when the teacher's logits come from a cache?

    python benchmarks/teacher_cache.py                                  # 32 px, CPU, drawn pictures
    python benchmarks/teacher_cache.py --images imagenet --image-size 96 --batch-size 16 \
        --teacher resnet34 --student resnet18 --name 96
    python benchmarks/teacher_cache.py --device cuda --images imagenet --image-size 224 \
        --teacher resnet34 --student resnet18 --batch-size 256 --name 224

Four kinds of steps take turns within one run, on the same loader and the same student: with the
teacher (plain), with a cache that holds nothing yet (filling), with one that holds all (cached),
and without teacher and distillation (student alone: the limit below which no cache can come). From
their ratios follow the costs of whole trainings, beside the arithmetic of multiply-adds.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import ratios, spread, write_result
from epoch import make_beton

from fastprune.artifacts.teacher_cache import TeacherCache
from fastprune.distillation.meters import PhaseTimer
from fastprune.distillation.step import Batch, Context, Stepper, make_pair
from fastprune.distillation.teacher import Teacher, make_teacher
from fastprune.distributed import Ranks
from fastprune.loading.batch import choose_device
from fastprune.loading.loader import Loader
from fastprune.networks import build_network, save_weights
from fastprune.recipe import make_recipe

KINDS = ("plain", "filling", "cached", "student")
EPOCHS, NUM_VIEWS = 100, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=Path, help="an ImageFolder, or a folder of JPEG files; default: drawn"
    )
    parser.add_argument("--name", default="32", help="of the result: teacher-cache-NAME.json")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32", "uint8"))
    parser.add_argument("--classes", type=int, default=1000, help="logits, whatever the images are")
    parser.add_argument("--steps", type=int, default=8, help="of each kind in a round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    path = write_result(f"teacher-cache-{arguments.name}", result)
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio['median']:.3f} ({ratio['min']:.3f}-{ratio['max']:.3f})")
    print(f"-> {path}")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Let the four kinds of steps take turns, and measure the cache by itself."""
    beton = make_beton(arguments.images, folder)
    torch.manual_seed(0)
    network = build_network(arguments.teacher, num_classes=arguments.classes)
    save_weights(network, folder / "teacher.safetensors")
    runs = {kind: Run(kind, arguments, beton, folder) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    reading: list[float] = []
    for number in range(arguments.rounds + 1):
        for kind, run in runs.items():
            run.prepare()
            elapsed = run.steps(arguments.steps)
            if number:  # the first round warms up
                seconds[kind].append(elapsed / arguments.steps)
        if number:
            reading.append(runs["cached"].lookup_seconds())
    mean = {kind: statistics.median(values) for kind, values in seconds.items()}
    cache = runs["cached"].cache()
    return {
        "question": "seconds of a distillation step with a teacher cache over one with the teacher",
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "rows": len(cache.rows),
        "step_seconds": {kind: spread(values) for kind, values in seconds.items()},
        "ratios": {
            "cached over plain": ratios(seconds["cached"], seconds["plain"]),
            "student alone over plain": ratios(seconds["student"], seconds["plain"]),
            "cached over student alone": ratios(seconds["cached"], seconds["student"]),
            "filling over plain": ratios(seconds["filling"], seconds["plain"]),
            "reading over cached": ratios(reading, seconds["cached"]),
        },
        "trainings_over_plain_on_all_rows": trainings(mean),
        "arithmetic_over_plain_on_all_rows": trainings(arithmetic(arguments)),
        "check_megabytes_per_second": check_speed(cache),
        "bytes_per_view": cache.summary()["bytes_per_view"],
    }


def trainings(cost: dict[str, float]) -> dict[str, float]:
    """What trainings of EPOCHS epochs with NUM_VIEWS recurring views cost, from steps."""
    later, share = cost["cached"] / cost["plain"], NUM_VIEWS / EPOCHS
    first = share * cost["filling"] / cost["plain"] + (1 - share) * later
    return {
        "keep 1.0, plain": 1.0,
        "keep 1.0, first student": first,
        "keep 1.0, later students": later,
        "keep 0.5, plain": 0.5,
        "keep 0.5, first student": 0.5 * first,
        "keep 0.5, later students": 0.5 * later,
    }


def arithmetic(arguments: argparse.Namespace) -> dict[str, float]:
    """Multiply-adds per image of each kind of step: thrice the student's, and the teacher's."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = {}
    for name in (arguments.teacher, arguments.student):
        network = build_network(name, num_classes=arguments.classes).eval()
        images = torch.zeros(1, 3, arguments.image_size, arguments.image_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(images)
        counts[name] = counter.get_total_flops()
    student, teacher = 3 * counts[arguments.student], counts[arguments.teacher]
    both = float(student + teacher)
    return {"plain": both, "filling": both, "cached": float(student), "student": float(student)}


class Run:
    """One kind of step, with a student, a loader and a cache of its own."""

    def __init__(self, kind: str, arguments: argparse.Namespace, beton: Path, folder: Path) -> None:
        self._kind, self._folder = kind, folder / f"cache-{kind}"
        teacher: dict[str, Any] = {
            "network": arguments.teacher,
            "checkpoint": folder / "teacher.safetensors",
        }
        if kind in ("filling", "cached"):
            teacher |= {"cache": self._folder, "cache_dtype": arguments.dtype}
        self._recipe = make_recipe(
            {
                "data": {
                    "train": beton,
                    "val": beton,
                    "image_size": arguments.image_size,
                    "batch_size": arguments.batch_size,
                    "num_views": 1,
                },
                "student": {"network": arguments.student},
                "schedule": {"epochs": 1, "learning_rate": 0.001},
                "run": {"out": folder / kind, "device": arguments.device},
            }
            | ({} if kind == "student" else {"teacher": teacher})
        )
        device = choose_device(arguments.device)
        self._timer = PhaseTimer(device, began=time.perf_counter())
        self._context = Context(self._recipe, Ranks(), device, self._timer)
        self._beton, self._classes = beton, arguments.classes
        self._stepper: Stepper | None = None

    def prepare(self) -> None:
        """Bring the cache to where the kind of step begins; not timed."""
        is_first = self._stepper is None
        if self._kind == "filling" and self._folder.exists():
            shutil.rmtree(self._folder)
        if not is_first and self._kind != "filling":
            return
        data, context = self._recipe.data, self._context
        self._loader = Loader(
            self._beton,
            image_size=data.image_size,
            batch_size=data.batch_size,
            layout="xyi",
            num_views=1,
            device=context.device,
        )
        torch.manual_seed(0)
        learner, objective = make_pair(context, num_classes=self._classes, keep_ratio=1.0)
        self._teacher: Teacher = make_teacher(
            *(context, objective, self._loader),
            num_classes=self._classes,
            epochs=1,
            sizes=(data.image_size,),
        )
        self._stepper = Stepper(context, learner, objective, self._teacher)
        self._loader.warm_up()
        self._teacher.begin_epoch(0)
        self._stepper.warm_up(num_classes=self._classes, image_sizes=(data.image_size,))
        self._stepper.begin_epoch(0)
        if self._kind == "cached":
            self.steps(len(self._loader))
            self._teacher.flush(is_epoch_done=True)
            self._teacher.begin_epoch(0)

    def steps(self, count: int) -> float:
        """Take steps; seconds from the first request for a batch to the last step's end."""
        stepper = self._stepper
        assert stepper is not None
        batches = self._endless()
        next(batches)  # opening an epoch is no part of a step
        self._synchronize()
        started = time.perf_counter()
        for number, batch in zip(range(count), batches, strict=False):
            stepper.update(batch, step=number + 1, learning_rate=0.001)
        if self._kind == "filling":
            self._teacher.flush()
        self._synchronize()
        elapsed = time.perf_counter() - started
        self._timer.read()
        return elapsed

    def lookup_seconds(self) -> float:
        """Seconds of looking a batch's logits up, as the loader does."""
        cache, size = self.cache(), self._recipe.data.batch_size
        rng = np.random.default_rng()
        batches = [rng.choice(cache.rows, size) for _ in range(50)]
        cache.lookup(cache.rows, 0)  # checksums are compared once
        started = time.perf_counter()
        for rows in batches:
            cache.lookup(rows, 0)
        return (time.perf_counter() - started) / len(batches)

    def cache(self) -> TeacherCache:
        """The cache of this kind of step."""
        return TeacherCache.open(self._folder)

    def _endless(self) -> Iterator[Batch]:
        while True:
            for columns in self._loader:
                yield Batch(*columns)

    def _synchronize(self) -> None:
        if self._context.device.type == "cuda":
            torch.cuda.synchronize()


def check_speed(cache: TeacherCache) -> float:
    """Megabytes that are compared with their checksums in a second."""
    started = time.perf_counter()
    assert list(cache.check()) == []
    return cache.disk_bytes / 1e6 / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
