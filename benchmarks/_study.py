"""What every run of a study starts from: betons, a teacher, its scores, and the subsets.

All of it is made in a work folder, once, and its seconds are kept in prepared.json, so that a study
that was killed goes on with what is there.
"""

import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastprune.base.files import write_text
from fastprune.beton.convert.writer import convert
from fastprune.rows.score_table import ScoreTable
from fastprune.selection.subsets import make_subset

RECIPE = Path(__file__).parent / "wallclock.toml"
_THREADS = 1  # of each process: several run side by side
_LOG_LINES = 12
_TEACHER_SEED = 0
_PR_SET_PDEATHSIG = 1


class Preparation:
    """The work folder of a study.

    Attributes:
        folder: where everything is.
        image_size: side of training and test views in pixels.
        facts: seconds of every step, rows, and what the teacher reached; JSON values.
    """

    def __init__(self, folder: Path, *, image_size: int = 32) -> None:
        self.folder = folder
        self.image_size = image_size
        self._record = folder / "prepared.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.facts: dict[str, Any] = (
            json.loads(self._record.read_text()) if self._record.exists() else {}
        )

    @property
    def train(self) -> Path:
        """The beton that is trained on."""
        return self.folder / "train.beton"

    @property
    def val(self) -> Path:
        """The beton that students are evaluated on."""
        return self.folder / "val.beton"

    @property
    def teacher(self) -> Path:
        """The teacher's weights."""
        return self.folder / "teacher" / "student.safetensors"

    @property
    def scores(self) -> Path:
        """The score table."""
        return self.folder / "scores.parquet"

    def step(self, name: str, run: Callable[[], Mapping[str, Any]], **inputs: str) -> None:
        """Run a step, unless an earlier process came to its end, and keep what it tells.

        Args:
            name: of the step.
            run: does it.
            inputs: what it is made from; a step that was made from something else ends the script.
        """
        if name in self.facts:
            refuse_other(
                {key: self.facts[name].get(key) for key in inputs}, inputs, made=self._record
            )
            return
        print(f"{name} ...", flush=True)
        started = time.perf_counter()
        told = run()
        self.facts[name] = {"seconds": time.perf_counter() - started, **inputs, **told}
        write_text(self._record, json.dumps(self.facts, indent=2) + "\n")

    def convert(self, images: Path, per_class: int | None, val_per_class: int | None) -> None:
        """Make both betons of `images/train` and `images/test`, or of some images per class."""

        def run() -> dict[str, Any]:
            rows: dict[str, Any] = {}
            for split, beton, count in (
                ("train", self.train, per_class),
                ("test", self.val, val_per_class),
            ):
                folder = images / split
                if count is not None:
                    folder = link_some(folder, self.folder / "images" / split, count)
                manifest = convert(folder, beton)
                rows[f"{beton.stem}_rows"] = manifest.fingerprint.num_rows
                rows[f"{beton.stem}_fingerprint"] = str(manifest.fingerprint)
                rows["classes"] = len(manifest.class_names or ())
            return rows

        self.step("convert", run, images=folder_digest(images))

    def train_teacher(self, network: str, epochs: int, device: str) -> None:
        """Train the teacher on all rows and their labels."""

        def run() -> dict[str, Any]:
            result, _ = train_process(
                self.folder / "teacher",
                {
                    **self.betons(),
                    "student.network": network,
                    "schedule.epochs": epochs,
                    "run.seed": _TEACHER_SEED,
                    "run.validate_every": epochs,
                    "run.device": device,
                },
            )
            return {
                "epochs": epochs,
                "weights": file_digest(self.teacher),
                "top1_last": result["top1_last"],
                "train_seconds": result["train_seconds"],
            }

        self.step("teacher", run, network=network)

    def take_teacher(self, network: str, checkpoint: Path) -> None:
        """Use weights that are there already."""
        self.step(
            "teacher",
            lambda: {"given": checkpoint.name},
            network=network,
            weights=file_digest(checkpoint),
        )
        self.teacher.parent.mkdir(exist_ok=True)
        self.teacher.unlink(missing_ok=True)
        self.teacher.symlink_to(checkpoint.resolve())

    def score(self, network: str, device: str) -> None:
        """Score all rows by one pass of the teacher, in a process of its own.

        What a machine compiles once for all passes is compiled before, by a pass over the smaller
        beton: the step "compile". `pass_seconds` is what the pass took, `seconds` has the start of
        the process too.
        """
        self.step("compile", lambda: self._score(network, device, self.val, "compile"))
        self.step("score", lambda: self._score(network, device, self.train, "scores"))

    def score_again(self, network: str, device: str) -> float:
        """Score all rows once more, to know the seconds of a pass."""
        seconds: float = self._score(network, device, self.train, "again")["pass_seconds"]
        return seconds

    def _score(self, network: str, device: str, beton: Path, name: str) -> dict[str, Any]:
        out = self.folder / f"{name}.parquet"
        words = ["score", str(beton), "-o", str(out), "--restart"]
        words += ["--teacher", network, "--teacher-checkpoint", str(self.teacher)]
        # As the students' images: what is scored, and what class std are of, is what is taught.
        words += ["--views", "train", "--precision", "fp32"]
        words += ["--image-size", str(self.image_size), "--device", device]
        run_fastprune(words, out.with_suffix(".log"))
        table = ScoreTable.load(out)
        top1 = float((table.predictions == table.labels).mean())
        return {"pass_seconds": table.seconds, "teacher_top1": top1}

    def select(self, name: str, **choice: Any) -> tuple[Path, float]:
        """Make a subset; give its path and the seconds that it took."""
        path = self.folder / "subsets" / f"{name}.npy"
        path.parent.mkdir(exist_ok=True)
        started = time.perf_counter()
        make_subset(ScoreTable.load(self.scores), **choice).save(path)
        return path, time.perf_counter() - started

    def betons(self) -> dict[str, Any]:
        """Settings of a recipe that name the data."""
        return {
            "data.train": self.train,
            "data.val": self.val,
            "data.image_size": self.image_size,
        }


def refuse_other(theirs: Mapping[str, Any], ours: Mapping[str, Any], *, made: Path) -> None:
    """End the script where what was measured, and what would be now, do not belong in a table."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            sys.exit(
                f"{made} is of other {name}: {theirs.get(name)}, and now {value}. Repeat the "
                "command as it was, give another --name, or --restart to measure anew."
            )


def file_digest(path: Path) -> str:
    """BLAKE2b-64 of a file's bytes."""
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def folder_digest(folder: Path) -> str:
    """BLAKE2b-64 of the names and sizes of all files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    lines = sorted(f"{path.relative_to(folder)} {path.stat().st_size}\n" for path in files)
    return hashlib.blake2b("".join(lines).encode(), digest_size=8).hexdigest()


def link_some(source: Path, target: Path, per_class: int) -> Path:
    """An ImageFolder of links to so many images of every class, the same ones each time."""
    generator = np.random.default_rng(0)
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        (target / folder.name).mkdir(parents=True, exist_ok=True)
        files = sorted(folder.iterdir())
        for index in generator.permutation(len(files))[:per_class]:
            link = target / folder.name / files[index].name
            link.unlink(missing_ok=True)
            link.symlink_to(files[index].resolve())
    return target


def train_process(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Train in a process of its own; what an interrupted one left in the folder is removed.

    Returns:
        result.json, and the seconds from the start of the process to its end.
    """
    seconds = start_training(folder, settings).wait()
    return read_result(folder), seconds


def read_result(folder: Path) -> dict[str, Any]:
    """Read what a run left."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def start_training(folder: Path, settings: Mapping[str, Any]) -> "Command":
    """Start a training; what an interrupted one left in the folder is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    words = ["train", str(RECIPE)]
    for key, value in {**settings, "run.out": folder}.items():
        text = json.dumps(value) if isinstance(value, int | float | bool) else str(value)
        words += ["--set", f"{key}={text}"]
    return Command(words, folder.with_name(f"{folder.name}.log"))


def run_fastprune(words: list[str], log: Path) -> float:
    """Run a command with its output in a log; give the seconds from start to end."""
    return Command(words, log).wait()


def _end_with_parent() -> None:
    """Ask Linux to end this process with the script: no run goes on when the study is killed."""
    # SIGKILL: a process that is paused would not hear anything else.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Command:
    """A fastprune command at work in a process of its own, with its output in a log."""

    def __init__(self, words: list[str], log: Path) -> None:
        """Start it."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._name, self._log = words[0], log
        self._started, self._seconds = time.perf_counter(), 0.0
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fastprune", *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": str(_THREADS)},
                preexec_fn=_end_with_parent,
            )

    @property
    def is_done(self) -> bool:
        """Whether it ended, well or not."""
        if self._process.poll() is None:
            return False
        self._seconds = self._seconds or time.perf_counter() - self._started
        return True

    def wait(self) -> float:
        """Give the seconds from its start to its end; a command that failed ends the script."""
        self._process.wait()
        assert self.is_done
        if self._process.returncode != 0:
            tail = "\n".join(self._log.read_text(encoding="utf-8").splitlines()[-_LOG_LINES:])
            code = self._process.returncode
            sys.exit(f"fastprune {self._name} failed with exit code {code}:\n{tail}")
        return self._seconds

    def pause(self) -> None:
        """Stop it where it is; nothing happens where it ended."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it continue."""
        self._process.send_signal(signal.SIGCONT)
