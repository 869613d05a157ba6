"""The log of a run: metrics.jsonl for programs, TensorBoard events for people."""

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

    Every line of metrics.jsonl is a JSON object with `step`, `epoch`, `seconds` since the run
    started or resumed, and the metrics. A full disk ends the log, not the run.

    Attributes:
        num_bytes: of metrics.jsonl so far.
    """

    def __init__(self, folder: Path, *, num_bytes: int = 0, step: int = 0) -> None:
        """Open the log, cut back to where a run resumes.

        Args:
            folder: an existing folder.
            num_bytes: of metrics.jsonl to keep.
            step: the last one whose events to keep.
        """
        with importing("tensorboard", extra="train", purpose="a training run"):
            from torch.utils.tensorboard import SummaryWriter

        self._start = time.perf_counter()
        path = folder / "metrics.jsonl"
        path.touch()
        # A file that lost its end in a power failure must not be extended with zeros.
        self.num_bytes = min(num_bytes, path.stat().st_size)
        # In place and not appended: lines after the checkpoint are written again.
        self._lines = path.open("r+b")
        self._lines.truncate(self.num_bytes)
        self._lines.seek(self.num_bytes)
        if step == 0:
            # TensorBoard would draw the events of an earlier run into the same curves.
            for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
                old.unlink()
        self._is_full = False
        self._earlier_hook = threading.excepthook
        threading.excepthook = self._on_thread_error
        # A SummaryWriter, unless the disk is full.
        self._events: Any = None
        # TensorBoard drops what an interrupted run wrote at or after this step.
        purge_step = step + 1 if step else None
        try:
            # Writes its first event at once, which a full disk refuses.
            self._events = SummaryWriter(folder / "tensorboard", purge_step=purge_step)
        except OSError as error:
            self._warn_once(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._lines.close()
            if self._events is not None:
                self._events.close()
        except OSError as full:
            self._warn_once(full)
        threading.excepthook = self._earlier_hook

    def write(self, *, step: int, epoch: int, **metrics: float) -> None:
        """Write one line, and one event per metric.

        Args:
            step: optimizer steps done.
            epoch: complete passes over the data.
            metrics: name -> value.
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
            self._warn_once(error)

    def _on_thread_error(self, fault: threading.ExceptHookArgs) -> None:
        """Silence the traceback of TensorBoard's thread, whose error reappears in `write`."""
        is_writer = type(fault.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(fault.exc_value, OSError)):
            self._earlier_hook(fault)

    def _warn_once(self, error: OSError) -> None:
        """Warn once that the log ends here."""
        if not self._is_full:
            logger.warning("the log of the run ends here: %s. Training continues.", error)
        self._is_full = True
