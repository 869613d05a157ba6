"""What does a distillation step cost when the teacher's logits come from a cache?

    python benchmarks/teacher_cache.py --images imagenet     # two pairs of networks, on the CPU
    python benchmarks/teacher_cache.py --images imagenet --device cuda --batch-size 256 \
        --pairs resnet34:resnet18:224 --name cuda

Four kinds of steps take turns within one run, on loaders and students that are alike: with the
teacher (plain), with a cache that holds nothing yet (filling), with one that holds all (cached),
and without teacher and distillation (student alone: the limit below which no cache can come). From
their ratios follow the costs of whole trainings, beside the arithmetic of multiply-adds. A large
cache is then read in turn by `check` and by plain reads of its bytes. With `--run`, the logits of a
finished run's teacher and student show what rounding does to losses.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import ratios, spread, take_turns, write_result
from epoch import make_beton

from fastprune.base.ranks import Ranks
from fastprune.distillation.context import Batch, Context
from fastprune.distillation.losses import decoupled_distillation_loss, distillation_loss
from fastprune.distillation.meters import PhaseTimer
from fastprune.distillation.step import Stepper, make_pair
from fastprune.distillation.teacher import Teacher, make_teacher
from fastprune.loading.batch import choose_device
from fastprune.loading.loader import Loader
from fastprune.networks import build_network, load_weights, save_weights
from fastprune.rows.cache_filler import CacheFiller
from fastprune.rows.cache_format import DTYPES, decode, encode
from fastprune.rows.teacher_cache import TeacherCache
from fastprune.settings import make_recipe

KINDS = ("plain", "filling", "cached", "student")
PAIRS = ("resnet32x4:resnet8x4:32", "resnet34:resnet18:96")
EPOCHS, NUM_VIEWS = 100, 16
# Four slots of 131 MB: far more than a disk's own cache, and read in under a second by most.
CHECKED_ROWS, CHECKED_VIEWS = 65_536, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=Path, help="an ImageFolder, or a folder of JPEG files; default: drawn"
    )
    parser.add_argument("--run", type=Path, help="a finished run, whose logits are rounded")
    parser.add_argument("--name", default="", help="of the result: teacher-cache-NAME.json")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--pairs", nargs="+", default=PAIRS, metavar="PAIR", help="teacher:student:image size"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32", "uint8"))
    parser.add_argument("--classes", type=int, default=1000, help="logits, whatever the images are")
    parser.add_argument("--threads", type=int, default=1, help="of torch; decoding has its own")
    parser.add_argument("--steps", type=int, default=2, help="of each kind in a round")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pairs = {}
    with tempfile.TemporaryDirectory() as folder:
        beton = make_beton(arguments.images, Path(folder))
        for pair in arguments.pairs:
            pairs[pair] = measure_pair(arguments, pair, beton, Path(folder))
            for name, ratio in pairs[pair]["ratios"].items():
                print(
                    f"{pair} {name}: {ratio['median']:.4f} ({ratio['min']:.4f}-{ratio['max']:.4f})"
                )
        disk = measure_disk(Path(folder), rounds=arguments.rounds)
        print(f"check over plain reads: {disk['check over plain reads']['median']:.2f}")
    rounding = None if arguments.run is None else measure_rounding(arguments.run)
    result = {
        "question": "seconds of a distillation step with a teacher cache over one with the teacher",
        "settings": {
            key: value.name if isinstance(value, Path) else value
            for key, value in vars(arguments).items()
        },
        "pairs": pairs,
        "disk": disk,
        "rounding": rounding,
    }
    name = f"teacher-cache-{arguments.name}" if arguments.name else "teacher-cache"
    print(f"-> {write_result(name, result)}")


def measure_pair(
    arguments: argparse.Namespace, pair: str, beton: Path, folder: Path
) -> dict[str, Any]:
    """Let the four kinds of steps of two networks take turns."""
    teacher, student, image_size = pair.split(":")
    torch.manual_seed(0)
    weights = folder / f"{teacher}.safetensors"
    save_weights(build_network(teacher, num_classes=arguments.classes), weights)
    runs = {}
    for kind in KINDS:
        settings = {
            "data": {
                "train": beton,
                "val": beton,
                "image_size": int(image_size),
                "batch_size": arguments.batch_size,
                "num_views": 1,
            },
            "student": {"network": student},
            "teacher": {"network": teacher, "checkpoint": weights},
            "schedule": {"epochs": 1, "learning_rate": 0.001},
            "run": {"out": folder / pair / kind, "device": arguments.device},
        }
        if kind == "student":
            del settings["teacher"]
        elif kind != "plain":
            settings["teacher"] |= {
                "cache": folder / f"{pair}-{kind}",
                "cache_dtype": arguments.dtype,
            }
        # The first batch of a round is not timed: the rows are those of one epoch a round.
        rows = np.arange(arguments.batch_size * (arguments.steps + 1))
        runs[kind] = Run(kind, settings, rows, num_classes=arguments.classes)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    writing: list[float] = []
    reading: list[float] = []
    for number in range(arguments.rounds + 1):
        for kind, run in runs.items():
            run.prepare()
            elapsed = run.steps(arguments.steps)
            if number:  # the first round warms up
                seconds[kind].append(elapsed / arguments.steps)
        if number:
            writing.append(runs["filling"].teacher.fill_seconds / arguments.steps)
            reading.append(runs["cached"].lookup_seconds())
    cost = {kind: statistics.median(values) for kind, values in seconds.items()}
    return {
        "step_seconds": {kind: spread(values) for kind, values in seconds.items()},
        "ratios": {
            "cached over plain": ratios(seconds["cached"], seconds["plain"]),
            "student alone over plain": ratios(seconds["student"], seconds["plain"]),
            "cached over student alone": ratios(seconds["cached"], seconds["student"]),
            "filling over plain": ratios(seconds["filling"], seconds["plain"]),
            "writing (on its thread) over plain": ratios(writing, seconds["plain"]),
            "reading over cached": ratios(reading, seconds["cached"]),
        },
        "trainings_over_plain_on_all_rows": trainings(cost),
        "arithmetic_over_plain_on_all_rows": trainings(
            multiply_adds(teacher, student, int(image_size), arguments.classes)
        ),
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


def multiply_adds(teacher: str, student: str, image_size: int, classes: int) -> dict[str, float]:
    """Arithmetic per image of each kind of step: thrice the student's, and the teacher's."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for name in (teacher, student):
        network = build_network(name, num_classes=classes).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 3, image_size, image_size))
        counts.append(float(counter.get_total_flops()))
    alone, both = 3 * counts[1], counts[0] + 3 * counts[1]
    return {"plain": both, "filling": both, "cached": alone, "student": alone}


class Run:
    """One kind of step, with a student, a loader and a cache of its own.

    Attributes:
        teacher: what answers in a step.
    """

    teacher: Teacher

    def __init__(
        self, kind: str, settings: dict[str, Any], rows: np.ndarray, *, num_classes: int
    ) -> None:
        self._kind, self._rows, self._classes = kind, rows, num_classes
        self._recipe = make_recipe(settings)
        device = choose_device(self._recipe.run.device)
        self._timer = PhaseTimer(device, began=time.perf_counter())
        self._context = Context(self._recipe, Ranks(), device, self._timer)
        self._stepper: Stepper | None = None

    @property
    def _cache_path(self) -> Path:
        assert self._recipe.teacher is not None
        assert self._recipe.teacher.cache is not None
        return self._recipe.teacher.cache

    def prepare(self) -> None:
        """Bring the cache to where the kind of step begins; not timed."""
        if self._stepper is not None and self._kind != "filling":
            return
        if self._kind == "filling":
            shutil.rmtree(self._cache_path, ignore_errors=True)
        data, context = self._recipe.data, self._context
        self._loader = Loader(
            data.train,
            self._rows,
            image_size=data.image_size,
            batch_size=data.batch_size,
            fields=("images", "labels", "rows", "host_rows"),
            num_views=1,
            device=context.device,
        )
        torch.manual_seed(0)
        learner, objective = make_pair(context, num_classes=self._classes, keep_ratio=1.0)
        self.teacher = make_teacher(
            context,
            objective,
            self._loader,
            num_classes=self._classes,
            epochs=1,
            sizes=(data.image_size,),
        )
        self._stepper = Stepper(context, learner, objective, self.teacher)
        self._loader.warm_up()
        self.teacher.begin_epoch(0)
        self._stepper.warm_up(num_classes=self._classes, image_sizes=(data.image_size,))
        self._stepper.begin_epoch(0)
        if self._kind == "cached":
            for number, columns in enumerate(self._loader):
                batch = self.teacher.look_up(Batch(*columns))
                self._stepper.update(batch, step=number + 1, learning_rate=0.001)
            self.teacher.flush(is_epoch_done=True)
            self.teacher.begin_epoch(0)
            assert self.teacher.network is None, "the slot is whole"

    def steps(self, count: int) -> float:
        """Take steps; seconds from the first request for a batch to the last step's end."""
        stepper = self._stepper
        assert stepper is not None
        batches: Iterator[Batch] = (
            self.teacher.look_up(Batch(*columns)) for columns in self._loader
        )
        next(batches)  # opening an epoch is no part of a step
        self._synchronize()
        started = time.perf_counter()
        for number in range(count):
            stepper.update(next(batches), step=number + 1, learning_rate=0.001)
        self._synchronize()
        if self._kind == "filling":
            self.teacher.flush()  # what an epoch ends with counts
        elapsed = time.perf_counter() - started
        self._timer.read()
        return elapsed

    def lookup_seconds(self) -> float:
        """Seconds of looking a batch's logits up, as a step does."""
        cache = TeacherCache.open(self._cache_path)
        rng = np.random.default_rng()
        batches = [rng.choice(cache.rows, self._recipe.data.batch_size) for _ in range(50)]
        cache.lookup(cache.rows, 0)  # checksums are compared once
        started = time.perf_counter()
        for rows in batches:
            cache.lookup(rows, 0)
        return (time.perf_counter() - started) / len(batches)

    def _synchronize(self) -> None:
        if self._context.device.type == "cuda":
            torch.cuda.synchronize()


def measure_disk(folder: Path, *, rounds: int) -> dict[str, Any]:
    """Read a large cache in turn, none of it in memory: by `check`, and as plain bytes."""
    rng = np.random.default_rng(0)
    cache = TeacherCache.create(
        folder / "large",
        rows=np.arange(CHECKED_ROWS),
        num_classes=1000,
        num_views=CHECKED_VIEWS,
    )
    with CacheFiller(cache) as filler:
        for slot in range(CHECKED_VIEWS):
            for rows in np.split(cache.rows, 64):
                logits = rng.standard_normal((len(rows), 1000), np.float32)
                filler.put(rows, slot, lambda logits=logits: logits)
        filler.flush(seal=True)
    files = sorted(cache.path.glob("slot-*.npy"))

    def forget() -> None:
        for file in files:
            with file.open("rb") as opened, suppress(AttributeError):
                os.fdatasync(opened)
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def check() -> None:
        assert list(TeacherCache.open(cache.path).check()) == []

    def read() -> None:
        buffer = bytearray(2**20)
        for file in files:
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass

    # `forget` is a turn of its own, so that it is in nobody's seconds.
    turns = {"forget": forget, "plain": read, "forget again": forget, "check": check}
    cold = take_turns(turns, rounds=rounds)
    warm = take_turns({"plain": read, "check": check}, rounds=rounds)
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    return {
        "megabytes": megabytes,
        "check over plain reads": ratios(cold["check"], cold["plain"]),
        "check over plain reads, from memory": ratios(warm["check"], warm["plain"]),
        "check_megabytes_per_second": spread([megabytes / value for value in cold["check"]]),
        "plain_megabytes_per_second": spread([megabytes / value for value in cold["plain"]]),
    }


def measure_rounding(run: Path) -> dict[str, Any]:
    """Losses of a run's student under its teacher, from logits as each dtype keeps them."""
    recipe = make_recipe(json.loads((run / "recipe.json").read_text()))
    assert recipe.teacher is not None
    assert recipe.teacher.checkpoint is not None
    data = recipe.data
    loader = Loader(
        data.train, image_size=data.image_size, batch_size=data.batch_size, device="cpu"
    )
    parts: list[list[torch.Tensor]] = [[], [], []]
    networks = []
    for settings, weights in (
        (recipe.teacher, recipe.teacher.checkpoint),
        (recipe.student, run / "student.safetensors"),
    ):
        network = build_network(settings.network, num_classes=loader.num_classes)
        load_weights(network, weights)
        networks.append(network.eval())
    with torch.no_grad():
        for images, labels in loader:
            for part, values in zip(
                parts, (*(network(images) for network in networks), labels), strict=True
            ):
                part.append(values)
    teacher, student, labels = map(torch.cat, parts)
    losses = {
        f"{name}, T = {temperature}": partial(loss, temperature=temperature)
        for temperature in (1.0, 4.0)
        for name, loss in (
            ("kd", lambda logits, **kw: distillation_loss(student, logits, **kw)),
            (
                "dkd",
                lambda logits, **kw: decoupled_distillation_loss(student, logits, labels, **kw),
            ),
        )
    }
    exact = {name: loss(teacher) for name, loss in losses.items()}
    differences = {}
    for dtype in DTYPES:
        rounded = torch.from_numpy(decode(encode(teacher.numpy(), np.arange(len(teacher)), dtype)))
        differences[dtype] = {
            name: {
                "of the mean": abs(float((loss(rounded) - exact[name]).mean())),
                "largest of a row": float((loss(rounded) - exact[name]).abs().max()),
            }
            for name, loss in losses.items()
        }
    return {
        "logits": list(teacher.shape),
        "teacher": recipe.teacher.network,
        "student": recipe.student.network,
        "mean_loss": {name: float(values.mean()) for name, values in exact.items()},
        "difference_from_float32": differences,
    }


if __name__ == "__main__":
    main()
