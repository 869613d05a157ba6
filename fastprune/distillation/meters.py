"""Meters of a run: seconds of steps, phases and parts; losses; progress."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprune.base.progress import track
from fastprune.base.ranks import Ranks
from fastprune.distillation.costs import StepSeconds, summarize_steps
from fastprune.distillation.progressive_resizing import GrowingLoader
from fastprune.loading.loader import Loader

PHASES = ("startup", "train", "validation", "checkpoint", "closing")
PARTS = ("wait", "teacher", "student", "optimizer")


class StepTimer:
    """Seconds of each step, from the end of the one before it, including the wait for its batch.

    Steps of one kind (`Batch.kind`) do the same work, so each kind has a list of its own. On CUDA a
    step ends when the device has done it; only `read` waits for that.
    """

    def __init__(self, device: torch.device) -> None:
        """Start without a step."""
        self._is_cuda = device.type == "cuda"
        self._seconds: dict[str, list[float]] = {}
        self._counts: dict[str, int] = {}
        self._last: float | torch.cuda.Event | None = None
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin the next step here."""
        self._last = self._now()

    def pause(self) -> None:
        """Leave out the time until `start`, such as a validation."""
        self._last = None

    def lap(self, kind: str) -> None:
        """End a step of this kind, and begin the next one."""
        last, now = self._last, self._now()
        self._counts[kind] = self._counts.get(kind, 0) + 1
        if isinstance(last, float) and isinstance(now, float):
            self._seconds.setdefault(kind, []).append(now - last)
        elif isinstance(last, torch.cuda.Event) and isinstance(now, torch.cuda.Event):
            self._events.append((kind, last, now))
        self._last = now

    def _now(self) -> float | torch.cuda.Event:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> None:
        """Read the seconds of finished steps from the device."""
        for kind, begin, end in self._events:
            end.synchronize()
            self._seconds.setdefault(kind, []).append(begin.elapsed_time(end) / 1000)
        self._events.clear()

    def summary(self) -> StepSeconds:
        """Summarize all steps that were read."""
        return summarize_steps(self._seconds, self._counts)

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds and counts of the run so far."""
        # A tensor: half a million floats would make a slow pickle.
        seconds = {kind: torch.tensor(values) for kind, values in self._seconds.items()}
        return {"seconds": seconds, "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._seconds = {kind: values.tolist() for kind, values in state["seconds"].items()}
        self._counts = dict(state["counts"])


class PhaseTimer:
    """Seconds of each phase and part of a run, and of its steps.

    One phase runs at any time, beginning with "startup"; on CUDA a phase ends when the device has
    done its work. Parts run within the phase "train". On CUDA they are timed by events in the
    device's stream, so that no step waits for the device; `read` adds up the finished ones.

    Attributes:
        seconds: of each of `PHASES` and `PARTS`.
        steps: within the phase "train".
    """

    def __init__(self, device: torch.device, *, began: float) -> None:
        """Start the first phase, which began at `began` by `time.perf_counter`."""
        self.seconds = dict.fromkeys((*PHASES, *PARTS), 0.0)
        self.steps = StepTimer(device)
        self._device = device
        self._phase, self._since = PHASES[0], began
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def total(self) -> float:
        """Seconds of all phases, as of the last switch."""
        return sum(self.seconds[name] for name in PHASES)

    def switch(self, phase: str) -> str:
        """End the running phase and begin another; returns the one that ended."""
        if self._device.type == "cuda":
            # A phase's kernels may still run, and their time belongs to it. Phases change a few
            # times an epoch, so waiting costs nothing.
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[self._phase] += now - self._since
        ended, self._phase, self._since = self._phase, phase, now
        if phase == "train":
            self.steps.start()
        else:
            self.steps.pause()
        return ended

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run a phase within another one, whose clock stops meanwhile."""
        outer = self.switch(name)
        try:
            yield
        finally:
            self.switch(outer)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of a step on the device."""
        if self._device.type != "cuda":
            started = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - started
            return
        # The host is ahead of the device, so its own clock would time the launches.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def forget_parts(self) -> None:
        """Reset the parts after the warm-up, whose compilation and autotuning do not count."""
        self._events.clear()
        self.seconds.update(dict.fromkeys(PARTS, 0.0))

    def waiting_share(self) -> float:
        """Return the share in [0, 1] of the time for training so far that was spent waiting."""
        # The running phase is not in `seconds` until it ends.
        running = time.perf_counter() - self._since if self._phase == "train" else 0.0
        return self.seconds["wait"] / max(self.seconds["train"] + running, 1e-9)

    def add_wait(self, seconds: float) -> None:
        """Count seconds in which the host waited for a batch."""
        self.seconds["wait"] += seconds

    def read(self) -> None:
        """Add up the parts so far; call it where the host has waited for the device anyway."""
        # The host has waited for all of these events already, so this returns at once.
        for name, begin, end in self._events:
            end.synchronize()
            self.seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        self.steps.read()

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds as of the last switch and the last `read`."""
        return {"seconds": dict(self.seconds), "steps": self.steps.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add the seconds of the run so far."""
        # Added, not set: this process's start-up has been paid on top.
        for name, seconds in state["seconds"].items():
            self.seconds[name] += seconds
        self.steps.load_state_dict(state["steps"])


class StepLosses(NamedTuple):
    """The losses of one step on this process.

    Attributes:
        step: optimizer steps done, this one included.
        epoch: passes complete before it.
        batch: its position in the epoch.
        losses: (B,) of its rows, detached, on the device.
        rows: (B,) of the beton, on the device.
    """

    step: int
    epoch: int
    batch: int
    losses: Tensor
    rows: Tensor


class LossMeter:
    """The losses since the last line of the log.

    They stay on the device until a line is due and then come to the host together, so that the host
    waits for the device once. A loss that is not finite is therefore noticed some steps later.

    Attributes:
        means: of the fetched steps since the last line, over all processes.
        latest: mean of the last fetched steps; None before the first.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.means: list[float] = []
        self.latest: float | None = None
        self._ranks = ranks
        self._pending: list[StepLosses] = []

    def add(self, step: StepLosses) -> None:
        """Keep the losses of a step."""
        self._pending.append(step)

    def fetch(self) -> StepLosses | None:
        """Bring the steps' mean losses to the host, as `means`; a collective.

        Returns:
            The first step whose mean is not finite, the same on every process; None where all are.
            After a bad one, nothing is added to `means`.
        """
        # All processes take the same steps, so all of them return here or none.
        if not self._pending:
            return None
        # One copy to the host for all steps; in float64, as are the sums over processes.
        means = torch.stack([step.losses.mean() for step in self._pending]).double().cpu()
        means = self._ranks.all_sum(means) / self._ranks.world
        # By the mean over processes, so that all of them notice the bad loss of one.
        bad = (~means.isfinite()).nonzero()
        if len(bad):
            return self._pending[int(bad[0])]
        self.means += means.tolist()
        self.latest = float(means.mean())
        self._pending.clear()
        return None

    def pop_mean(self) -> float:
        """Return the mean loss of the fetched steps, at least one, and forget them."""
        value = sum(self.means) / len(self.means)
        self.means.clear()
        return value


class ProgressMeter:
    """Yields the batches of each pass, and shows the progress of the run."""

    def __init__(self, timer: PhaseTimer, losses: LossMeter, ranks: Ranks, *, epochs: int) -> None:
        """Start before the first of `epochs` passes; the first of `ranks` shows the bar."""
        self._timer = timer
        self._losses = losses
        self._ranks = ranks
        self._epochs = epochs
        self._first_step_ended = 0.0
        self._steps = self._steps_left = 0

    def over(
        self, loader: Loader | GrowingLoader, *, epoch: int, first: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield the batches that are left of a pass, of which `first` were done before."""
        # Counted again in each epoch: epochs that skip rows are shorter.
        self._steps_left = len(loader) * (self._epochs - epoch) - first
        batches = self._timed(loader)
        if not self._ranks.is_first:
            return batches
        images_per_step = loader.batch_size * self._ranks.world
        return track(
            batches,
            description=f"epoch {epoch + 1}/{self._epochs}",
            total=len(loader) * images_per_step,
            done=first * images_per_step,
            unit="images",
            step=images_per_step,
            note=self._note,
            seconds_left=self._seconds_left,
        )

    def _timed(self, loader: Loader | GrowingLoader) -> Iterator[tuple[Tensor, ...]]:
        """Yield the batches; the time until each arrives counts as waiting."""
        # The step runs between two `next`, and does not count.
        asked = time.perf_counter()
        for batch in loader:
            self._timer.add_wait(time.perf_counter() - asked)
            yield batch
            if self._steps == 0:
                self._first_step_ended = time.monotonic()
            self._steps += 1
            self._steps_left -= 1
            asked = time.perf_counter()
        # The host waits for the end of the epoch, too.
        self._timer.add_wait(time.perf_counter() - asked)

    def _seconds_left(self) -> float | None:
        """Estimate the time to the run's end by the steps after the first, which compiles."""
        if self._steps < 2:
            return None
        seconds_per_step = (time.monotonic() - self._first_step_ended) / (self._steps - 1)
        return self._steps_left * seconds_per_step

    def _note(self) -> str:
        loss = "" if self._losses.latest is None else f"loss {self._losses.latest:.3g}, "
        return f"{loss}{self._timer.waiting_share():.0%} waiting"
