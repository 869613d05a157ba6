"""Where the seconds of a run went, from the conversion of the images to the last validation."""

from collections.abc import Mapping

from fastprune.report.runs import Run

CONVERSION, SCORING = "conversion", "scoring"
_WAITING, _REST_OF_TRAINING, _REST = "waiting for data", "training, other", "other"
_STEP_NAMES = {
    "teacher_seconds": "teacher",
    "student_seconds": "student",
    "optimizer_seconds": "optimizer",
}
_AROUND = {
    "startup_seconds": "start-up",
    "validation_seconds": "validation",
    "checkpoint_seconds": "checkpoints",
}

PARTS = (
    CONVERSION,
    SCORING,
    _AROUND["startup_seconds"],
    _WAITING,
    *_STEP_NAMES.values(),
    _REST_OF_TRAINING,
    _AROUND["validation_seconds"],
    _AROUND["checkpoint_seconds"],
    _REST,
)


def time_parts(run: Run, *, convert_seconds: float | None) -> Mapping[str, float]:
    """Seconds by use, in the order of `PARTS`.

    Args:
        run: a finished run.
        convert_seconds: what converting the images took; None to leave it out.

    Returns:
        Part -> seconds; parts that are not recorded are in "training, other" or "other", so that
        the sum is what the run cost. Where the host waited for data while the device was at work,
        the device's work is shown.
    """
    train, total = run.number("train_seconds") or 0.0, run.number("total_seconds") or 0.0
    steps = {name: run.number(key) or 0.0 for key, name in _STEP_NAMES.items()}
    around = {name: run.number(key) or 0.0 for key, name in _AROUND.items()}
    idle = max(0.0, train - sum(steps.values()))
    waiting = min(run.number("wait_seconds") or 0.0, idle)
    parts = {
        CONVERSION: convert_seconds or 0.0,
        SCORING: run.score_seconds or 0.0,
        _WAITING: waiting,
        _REST_OF_TRAINING: idle - waiting,
        _REST: max(0.0, total - train - sum(around.values())),
        **steps,
        **around,
    }
    return {name: parts[name] for name in PARTS if parts[name] > 0}
