"""What a run writes while it goes: metrics.jsonl for programs, TensorBoard events for people."""

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any, Self

from fastprune.base.errors import importing

logger = logging.getLogger(__name__)


class RunLog:
    """Numbers over steps, written as they come.

    Every line of metrics.jsonl is a JSON object with `step`, `epoch`, `seconds` since the run was
    begun or gone on with, and the metrics. A disk that is full ends the log, not the run.

    Attributes:
        num_bytes: of metrics.jsonl so far.
    """

    def __init__(self, folder: Path, *, num_bytes: int = 0, step: int = 0) -> None:
        """Open the log, cut back to where a run goes on.

        Args:
            folder: an existing folder.
            num_bytes: of metrics.jsonl that stay; 0 begins it anew.
            step: the last one whose events stay.
        """
        with importing("tensorboard", extra="train", purpose="a training run"):
            from torch.utils.tensorboard import SummaryWriter

        self._start = time.perf_counter()
        path = folder / "metrics.jsonl"
        path.touch()
        # A file that lost its end with the power must not be filled up with zeros.
        self.num_bytes = min(num_bytes, path.stat().st_size)
        # In place and not appended: what lies behind the checkpoint is written again.
        self._lines = path.open("r+b")
        self._lines.truncate(self.num_bytes)
        self._lines.seek(self.num_bytes)
        if step == 0:
            # TensorBoard would draw the events of an earlier run into the same curves.
            for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
                old.unlink()
        self._is_full = False
        self._earlier_hook = threading.excepthook
        threading.excepthook = self._hear_of_thread
        self._events: Any = None  # a SummaryWriter, where the disk took one
        # It leaves out what an interrupted run wrote at or behind this step.
        purge_step = step + 1 if step else None
        try:
            # Its first event goes to the disk at once.
            self._events = SummaryWriter(folder / "tensorboard", purge_step=purge_step)
        except OSError as error:
            self._tell(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._lines.close()
            if self._events is not None:
                self._events.close()
        except OSError as full:
            self._tell(full)
        threading.excepthook = self._earlier_hook

    def write(self, *, step: int, epoch: int, **metrics: float) -> None:
        """Write one line and one event per metric.

        Args:
            step: optimizer steps done.
            epoch: passes over the data that are complete.
            metrics: name -> value; a slash in TensorBoard's sense groups them.
        """
        seconds = round(time.perf_counter() - self._start, 4)
        line = json.dumps({"step": step, "epoch": epoch, "seconds": seconds, **metrics}) + "\n"
        if self._is_full or self._events is None:
            return
        try:
            self._lines.write(line.encode())
            # A kill loses no line, and `tail -f` sees it.
            self._lines.flush()
            self.num_bytes += len(line)
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)
        except OSError as error:
            self._tell(error)

    def _hear_of_thread(self, fault: threading.ExceptHookArgs) -> None:
        """Let no traceback be printed of TensorBoard's thread, whose fault comes up in `write`."""
        is_writer = type(fault.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(fault.exc_value, OSError)):
            self._earlier_hook(fault)

    def _tell(self, error: OSError) -> None:
        """Warn once that the log ends here."""
        if not self._is_full:
            logger.warning("the log of the run ends here: %s. Training goes on.", error)
        self._is_full = True
