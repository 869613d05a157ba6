"""What a run writes while it goes: metrics.jsonl for programs, TensorBoard events for people."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Numbers over steps, written as they come.

    Every line of metrics.jsonl is a JSON object with `step`, `epoch`, `seconds` since the log was
    opened, and the metrics.

    Args:
        folder: an existing folder; a log that stands there is replaced.
    """

    def __init__(self, folder: Path) -> None:
        self._start = time.perf_counter()
        self._lines = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        # TensorBoard would draw the events of an earlier, unfinished run into the same curves.
        for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
            old.unlink()
        self._events = SummaryWriter(folder / "tensorboard")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lines.close()
        self._events.close()

    def write(self, *, step: int, epoch: int, **metrics: float) -> None:
        """Write one line and one event per metric.

        Args:
            step: optimiser steps done.
            epoch: passes over the data that are complete.
            metrics: name -> value; a slash in TensorBoard's sense groups them.
        """
        seconds = round(time.perf_counter() - self._start, 4)
        line = {"step": step, "epoch": epoch, "seconds": seconds, **metrics}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
