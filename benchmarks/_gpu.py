"""The stages of gpu.py, each a process: `python _gpu.py STAGE --work FOLDER --device cuda`.

A stage writes FOLDER/STAGE.json after everything that it measures.
"""

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import ROOT, ratios, spread, take_turns
from torch import Tensor, nn

from fastprune.base.cpus import usable_cpus
from fastprune.base.environment import describe_machine, describe_versions
from fastprune.beton.convert.writer import convert
from fastprune.beton.opening import open_beton
from fastprune.distillation.losses import distillation_loss
from fastprune.loading.loader import Loader
from fastprune.networks import build_network
from fastprune.rows.score_table import ScoreTable
from fastprune.rows.teacher_cache import TeacherCache
from fastprune.selection.subsets import make_subset

_CLASSES = 1000
_THREADS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Stage:
    """What a stage runs with.

    Attributes:
        work: folder with the betons; its JSON goes there.
        device: "cuda" or "cpu"; on the CPU everything is small.
        seconds: after which it should end by itself.
        name: of the stage.
    """

    work: Path
    device: str
    seconds: float
    name: str

    @property
    def small(self) -> bool:
        """Whether this is a rehearsal."""
        return self.device == "cpu"

    @property
    def thread_counts(self) -> list[int]:
        """Numbers of decoding threads that this machine has CPUs for."""
        return [count for count in _THREADS if count <= max(2, usable_cpus())]

    def write(self, measured: dict[str, Any]) -> None:
        """Keep what was measured so far."""
        facts = {"machine": describe_machine(), "versions": describe_versions()}
        path = self.work / f"{self.name}.json"
        path.with_suffix(".partial").write_text(json.dumps(facts | measured, indent=1) + "\n")
        path.with_suffix(".partial").replace(path)

    def loader(self, jpeg: str = "fast", **settings: Any) -> Loader:
        """A loader over the repeated ImageNet files."""
        size = 64 if self.small else 224
        chosen = {"image_size": size, "augment": "rrc", "backend": "cpu", "device": self.device}
        return Loader(self.work / f"{jpeg}.beton", **chosen | settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("betons", *STAGES))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--source", type=Path, help="of betons")
    parser.add_argument("--rows", type=int, help="of betons")
    arguments = parser.parse_args()
    if arguments.stage == "betons":
        repeat_images(arguments.source, arguments.rows, arguments.work)
    else:
        stage = Stage(arguments.work, arguments.device, arguments.seconds, arguments.stage)
        STAGES[arguments.stage](stage)


def repeat_images(source: Path, num_rows: int, work: Path) -> None:
    """Write the images as often as it takes for an epoch of many batches, in both layouts."""
    beton = open_beton(source)
    jpegs = [beton.image_bytes(row).tobytes() for row in range(beton.num_rows)]
    images = [(jpegs[i % len(jpegs)], i % _CLASSES) for i in range(num_rows)]
    for layout in ("original", "fast"):
        convert(images, work / f"{layout}.beton", jpeg=layout)


def run_tests(stage: Stage) -> None:
    """Run tests/gpu; without a GPU they are collected and skipped."""
    report = stage.work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", "-q"]
    done = subprocess.run([*command, "-rs", str(ROOT / "tests" / "gpu")], cwd=ROOT, check=False)
    suite = next(ET.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        {"name": case.get("name"), "text": fault.get("message")}
        for case in suite.iter("testcase")
        for fault in (*case.iter("failure"), *case.iter("error"))
    ]
    stage.write({**counts, "failed": failed, "seconds": float(suite.get("time"))})
    sys.exit(done.returncode)


def measure_steps(stage: Stage) -> None:
    """Steps per second with synthetic input, and with ours on 2 ... 16 threads, plain and cached.

    All take turns. `behind_synthetic` is the share of a step's time that synthetic input would
    save: what the loader costs, waiting and copies included.
    """
    pairs = {"resnet34 -> resnet18": 256, "resnet50 -> mobilenet_v2": 256}
    pairs |= {f"{name} ": 1024 for name in pairs}  # the same with a larger batch
    if stage.small:
        pairs = {"resnet14 -> resnet8": 8}
    measured: dict[str, Any] = {"pairs": {}, "profiles": {}}
    num_steps = 3 if stage.small else 30
    for name, batch_size in pairs.items():
        teacher, student = name.split(" -> ")
        step = make_step(teacher, student.strip(), stage.device)
        inputs = make_inputs(stage, batch_size)
        timed = {source: [] for source in inputs}
        for _ in range(3):
            for source, (batches, uses_cache) in inputs.items():
                timed[source].append(time_steps(step, batches, uses_cache, num_steps, stage.device))
        synthetic = statistics.median(one["seconds"] for one in timed["synthetic"])
        key = f"{name.strip()}, batch {batch_size}"
        measured["pairs"][key] = {
            source: {
                "steps_per_second": spread([num_steps / one["seconds"] for one in turns]),
                "images_per_second": spread(
                    [num_steps * batch_size / one["seconds"] for one in turns]
                ),
                "behind_synthetic": 1 - synthetic / statistics.median(t["seconds"] for t in turns),
                "host_waits_share": statistics.median(t["waited"] / t["seconds"] for t in turns),
                "step_p50": statistics.median(t["p50"] for t in turns),
                "step_p99": statistics.median(t["p99"] for t in turns),
            }
            for source, turns in timed.items()
        }
        stage.write(measured)
        best = list(inputs)[-2]
        measured["profiles"][key] = profile(step, inputs[best][0], stage.device)
        stage.write(measured)


def make_inputs(stage: Stage, batch_size: int) -> dict[str, tuple[Iterator[Any], bool]]:
    """Endless batches of (images, labels, the teacher's logits or None) by name."""
    first = stage.loader(batch_size=batch_size, fields=("images", "labels", "rows"), num_workers=2)
    images, labels, _ = next(iter(first))
    inputs = {"synthetic": (itertools.repeat((images, labels, None)), False)}
    for count in stage.thread_counts:
        loader = stage.loader(batch_size=batch_size, num_workers=count)
        inputs[f"ours, {count} threads"] = (endless(loader), False)
    cache = TeacherCache.open_or_create(
        stage.work / "cache",
        rows=np.arange(first.beton.num_rows),
        num_classes=_CLASSES,
        num_views=1,
        identity={},
    )
    rows = np.arange(first.beton.num_rows)
    for part in np.array_split(rows, -(-len(rows) // 4096)):
        logits = np.random.default_rng(0).normal(0, 2, (len(part), _CLASSES))
        cache.put(part, 0, logits.astype(np.float16))
    loader = stage.loader(batch_size=batch_size, num_workers=stage.thread_counts[-1])
    inputs[f"ours cached, {stage.thread_counts[-1]} threads"] = (
        endless_cached(loader, cache, stage.device),
        True,
    )
    return inputs


def endless(loader: Loader) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        for images, labels in loader:
            yield images, labels, None


def endless_cached(loader: Loader, cache: TeacherCache, device: str) -> Iterator[Any]:
    """Epoch after epoch, with the teacher's logits read from the cache."""
    while True:
        order = list(loader.batch_sampler)
        for (images, labels), rows in zip(loader, order, strict=True):
            logits = torch.from_numpy(cache.logits(np.array(rows), 0))
            if device == "cuda":
                logits = logits.pin_memory()
            yield images, labels, logits.to(device, non_blocking=True)


def make_step(teacher: str, student: str, device: str) -> Callable[..., None]:
    """One optimizer step of the student; the teacher runs unless its logits are given."""

    def build(name: str) -> nn.Module:
        network = build_network(name, num_classes=_CLASSES)
        return network.to(device).to(memory_format=torch.channels_last)

    teaching, learning = build(teacher).eval(), build(student)
    optimizer = torch.optim.SGD(learning.parameters(), lr=0.01, momentum=0.9)

    def step(images: Tensor, labels: Tensor, targets: Tensor | None) -> None:
        with torch.autocast(device, torch.bfloat16):
            if targets is None:
                with torch.no_grad():
                    targets = logits_of(teaching, images)
            logits = logits_of(learning, images)
        loss = 0.9 * distillation_loss(logits, targets, temperature=4.0).mean()
        loss = loss + 0.1 * nn.functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """The logits alone."""
    out = network(images)
    return out[-1] if isinstance(out, tuple) else out


def time_steps(
    step: Callable[..., None], batches: Iterator[Any], cached: bool, count: int, device: str
) -> dict[str, float]:
    """Time steps by the wall clock, and each by events of the device where there are such."""
    on_gpu = device == "cuda"
    for _ in range(3):  # what was decoded ahead must not count
        step(*next(batches))
    if on_gpu:
        torch.cuda.synchronize()
    marks, waited = [], 0.0
    started = time.perf_counter()

    def mark() -> None:
        if on_gpu:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    mark()
    for _ in range(count):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        assert cached == (batch[2] is not None)
        step(*batch)
        mark()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    each = [a.elapsed_time(b) / 1000 if on_gpu else b - a for a, b in itertools.pairwise(marks)]
    p50, p99 = np.percentile(each, [50, 99])
    return {"seconds": seconds, "waited": waited, "p50": float(p50), "p99": float(p99)}


def profile(step: Callable[..., None], batches: Iterator[Any], device: str) -> dict[str, float]:
    """Shares of a few steps in copies, in kernels, and without a kernel, by torch's profiler."""
    if device != "cuda":
        return {}
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        started = time.perf_counter()
        for _ in range(5):
            step(*next(batches))
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    cuda = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    on_device = [e for e in profiler.events() if e.device_type == cuda]
    copies = [e for e in on_device if e.name.startswith(("Memcpy", "Memset"))]
    kernels = [e for e in on_device if not e.name.startswith(("Memcpy", "Memset"))]
    busy = covered([(e.time_range.start, e.time_range.end) for e in kernels]) / 1e6
    return {
        "copies_share": sum(e.time_range.elapsed_us() for e in copies) / 1e6 / seconds,
        "kernels_share": busy / seconds,
        "no_kernel_share": 1 - busy / seconds,
        "kernels_per_step": len(kernels) / 5,
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    length, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        length += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return length


def measure_epochs(stage: Stage) -> None:
    """Wall clock of an epoch on the half over one on all rows, plain and from the teacher cache."""
    teacher, student, batch_size = ("resnet34", "resnet18", 256)
    if stage.small:
        teacher, student, batch_size = ("resnet14", "resnet8", 8)
    step = make_step(teacher, student, stage.device)
    rows = np.arange(open_beton(stage.work / "fast.beton").num_rows)
    half = np.sort(np.random.default_rng(0).permutation(rows)[: len(rows) // 2])
    targets = torch.zeros(batch_size, _CLASSES, device=stage.device)

    def epoch(loader: Loader, cached: bool) -> None:
        for images, labels in loader:
            step(images, labels, targets if cached else None)
        if stage.device == "cuda":
            torch.cuda.synchronize()

    epochs = {}
    for name, kept in {"full": rows, "half": half}.items():
        loader = stage.loader(batch_size=batch_size, subset=kept)
        loader.warm_up()
        epochs[name] = partial(epoch, loader, False)
        epochs[f"{name}, cached"] = partial(epoch, loader, True)
    seconds = take_turns(epochs, rounds=1 if stage.small else 3)
    stage.write(
        {
            "cached_means": "targets that are on the device already: the cache's limit",
            "rows": {"full": len(rows), "half": len(half)},
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "half_over_full": ratios(seconds["half"], seconds["full"]),
            "half_over_full_cached": ratios(seconds["half, cached"], seconds["full, cached"]),
            "cached_over_plain": ratios(seconds["full, cached"], seconds["full"]),
        }
    )


def measure_decoding(stage: Stage) -> None:
    """Views per second of the CPU engine over threads, and of DALI where it is carried."""
    measured: dict[str, Any] = {"views_per_second": {}}
    counts = sorted({1, *stage.thread_counts, usable_cpus()})
    for jpeg, count in itertools.product(("fast", "original"), counts):
        settings = {
            "batch_size": 8 if stage.small else 256,
            "dtype": torch.uint8,
            "num_workers": count,
        }
        loaders = {"cpu": stage.loader(jpeg, **settings | {"device": "cpu"})}
        try:
            loaders["dali"] = stage.loader(jpeg, **settings, backend="dali")
        except ImportError as error:
            measured["dali"] = str(error)
        epochs = {name: partial(exhaust, loader) for name, loader in loaders.items()}
        num_rows = len(next(iter(loaders.values()))) * settings["batch_size"]
        timed = take_turns(epochs, rounds=1 if stage.small else 2, warmup_rounds=1)
        for name, values in timed.items():
            key = f"{name}, {jpeg}, {count} threads"
            measured["views_per_second"][key] = spread([num_rows / value for value in values])
        stage.write(measured)


def exhaust(loader: Loader) -> None:
    """Run an epoch."""
    for _ in loader:
        pass
    if torch.cuda.is_available():
        torch.cuda.synchronize()


#: Cell -> keep ratio, strategy, metric, whether logits are reshaped, epochs (of 60).
_CELLS: dict[str, tuple[float | None, str, str | None, bool, int]] = {
    "full@60": (None, "", None, False, 60),
    "full@30": (None, "", None, False, 30),
    "random50@60": (0.5, "random", None, False, 60),
    "random50+reshape@60": (0.5, "random", None, True, 60),
    "medium50-loss@60": (0.5, "medium", "loss", False, 60),
    "medium50-loss+reshape@60": (0.5, "medium", "loss", True, 60),
    "medium50-centroid+reshape@60": (0.5, "medium", "centroid", True, 60),
    "hard50-loss@60": (0.5, "hard", "loss", False, 60),
    "infobatch@41": (None, "", None, False, 41),
}


def run_study(stage: Stage) -> None:
    """Distill students on CIFAR-10 at 32 pixels, eight side by side, as far as time leaves."""
    if not (stage.work / "train.beton").exists():
        stage.write({"left_out": "the pack holds no CIFAR-10"})
        return
    ends = time.monotonic() + stage.seconds
    teacher, student = ("resnet14", "resnet8") if stage.small else ("resnet32x4", "resnet8x4")
    scale = 60 if stage.small else 1
    weights = stage.work / "teacher" / "student.safetensors"
    measured: dict[str, Any] = {
        "teacher": train(stage, "teacher", {"student.network": teacher}, epochs=60 // scale),
        "runs": [],
    }
    stage.write(measured)
    scoring = ["score", str(stage.work / "train.beton"), "-o", str(stage.work / "scores.parquet")]
    scoring += ["--teacher", teacher, "--teacher-checkpoint", str(weights)]
    fastprune([*scoring, "--image-size", "32", "--device", stage.device], stage.work / "score.log")
    scores = ScoreTable.load(stage.work / "scores.parquet")

    def run_cell(cell: str, seed: int) -> None:
        keep_ratio, strategy, metric, reshaping, epochs = _CELLS[cell]
        if time.monotonic() > ends:
            return
        settings: dict[str, Any] = {
            "student.network": student,
            "teacher.network": teacher,
            "teacher.checkpoint": weights,
            "loss.reshaping": "class_std" if reshaping else "none",
            "run.seed": seed,
        }
        if cell.startswith("infobatch"):
            settings["pruning.rule"] = "infobatch"
        if keep_ratio is not None:
            settings["data.subset"] = stage.work / f"{cell}-{seed}.npy"
            make_subset(
                scores, keep_ratio=keep_ratio, strategy=strategy, metric=metric, seed=seed
            ).save(settings["data.subset"])
        result = train(stage, f"{cell}-{seed}", settings, epochs=max(1, epochs // scale))
        measured["runs"].append({"cell": cell, "seed": seed, **result})
        stage.write(measured)

    side_by_side = 2 if stage.small else 8
    for seed in range(1 if stage.small else 3):
        # By chance within a seed, so that no cell has the machine to itself.
        cells = random.Random(seed).sample(list(_CELLS), 2 if stage.small else len(_CELLS))
        with ThreadPoolExecutor(side_by_side) as pool:
            list(pool.map(partial(run_cell, seed=seed), cells))


def train(stage: Stage, name: str, settings: dict[str, Any], *, epochs: int) -> dict[str, Any]:
    """Train in a process of its own."""
    milestones = [max(1, round(epochs * share)) for share in (0.63, 0.75, 0.88)]
    chosen = {
        "data.train": stage.work / "train.beton",
        "data.val": stage.work / "test.beton",
        "data.batch_size": 20 if stage.small else 128,
        "schedule.epochs": epochs,
        "schedule.policy": "step" if epochs > 3 else "one_cycle",
        **({"schedule.milestones": milestones} if epochs > 3 else {}),
        "run.device": stage.device,
        "run.validate_every": epochs,
        "run.out": stage.work / name,
        **settings,
    }
    words = ["train", str(ROOT / "benchmarks" / "wallclock.toml")]
    for key, value in chosen.items():
        words += ["--set", f"{key}={value}"]
    fastprune(words, stage.work / f"{name}.log")
    result = json.loads((stage.work / name / "result.json").read_text())
    keys = ("steps", "train_seconds", "top1_last", "data_wait_share")
    return {key: result.get(key) for key in keys}


def fastprune(words: list[str], log: Path) -> None:
    """Run a command with its output in a log."""
    with log.open("w") as file:
        command = [sys.executable, "-m", "fastprune", *words]
        done = subprocess.run(command, stdout=file, stderr=file, check=False)
    if done.returncode:
        tail = log.read_text(errors="replace").splitlines()[-8:]
        sys.exit("\n".join([f"fastprune {words[0]} failed:", *tail]))


STAGES = {
    "tests": run_tests,
    "steps": measure_steps,
    "epoch": measure_epochs,
    "decode": measure_decoding,
    "study": run_study,
}

if __name__ == "__main__":
    main()
