"""Where the time of a run goes: phases that follow each other, and the parts of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("startup", "train", "validation", "checkpoint", "closing")
PARTS = ("wait", "teacher", "student", "optimizer")


class Clocks:
    """Seconds of each phase and part of a run.

    One phase runs at any time, beginning with "startup"; on CUDA a phase ends when the device has
    done its work. Parts run within the phase "train". Those of the device are told by events in its
    stream, so that no step waits for it; `read` adds up those that are over.

    Attributes:
        seconds: of each of `PHASES` and `PARTS`.
    """

    def __init__(self, device: torch.device, *, began: float) -> None:
        """Start the first phase.

        Args:
            device: where the parts run.
            began: when the first phase did, by `time.perf_counter`.
        """
        self.seconds = dict.fromkeys((*PHASES, *PARTS), 0.0)
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
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[self._phase] += now - self._since
        ended, self._phase, self._since = self._phase, phase, now
        return ended

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run a phase in the midst of another one, which stands still meanwhile."""
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
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def forget_parts(self) -> None:
        """Start the parts anew, behind a rehearsal."""
        self._events.clear()
        self.seconds.update(dict.fromkeys(PARTS, 0.0))

    def waiting_share(self) -> float:
        """Share in [0, 1] of the time for training, up to now, that was spent waiting."""
        running = time.perf_counter() - self._since if self._phase == "train" else 0.0
        return self.seconds["wait"] / max(self.seconds["train"] + running, 1e-9)

    def add_wait(self, seconds: float) -> None:
        """Count seconds in which the host waited for a batch."""
        self.seconds["wait"] += seconds

    def read(self) -> None:
        """Add up the parts so far; call it where the host has waited for the device anyway."""
        for name, begin, end in self._events:
            end.synchronize()
            self.seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()

    def state_dict(self) -> dict[str, float]:
        """The seconds as of the last switch and the last `read`."""
        return dict(self.seconds)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Add the seconds of the run so far to those of this process."""
        for name, seconds in state.items():
            self.seconds[name] += seconds
