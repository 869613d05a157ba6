"""What steps of several runs cost, measured in turn: each run works for a moment, the others stand.

Whatever slows the machine down meets all runs alike, and no run is measured beside another. The
runs are ordinary trainings in processes of their own; a stopped process takes no time, and the few
steps that a stop cuts in two lie far above the median.
"""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _study import Command, read_result, start_training

_SLICE_SECONDS = 0.8  # some tens of steps: caches and branch predictors are warm for most of them
_POLL_SECONDS = 0.05


def steps_in_turn(folder: Path, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Train for a while, in turn, and give the seconds of steps and of start-up.

    Args:
        folder: for the runs, anew.
        runs: name -> settings of its recipe.

    Returns:
        For each run its start-up, taken alone, and the deciles of its steps; JSON values.
    """
    shutil.rmtree(folder, ignore_errors=True)
    commands: dict[str, Command] = {}
    for name, settings in runs.items():
        commands[name] = start_training(folder / name, settings)
        # Start-up is over, and the pipeline is full, when the first line of the log is written.
        while not commands[name].is_done and not _has_begun(folder / name):
            time.sleep(_POLL_SECONDS)
        commands[name].pause()
    while working := [command for command in commands.values() if not command.is_done]:
        for command in working:
            command.go_on()
            time.sleep(_SLICE_SECONDS)
            command.pause()
    measured = {}
    for name, command in commands.items():
        command.wait()
        result = read_result(folder / name)
        kept = ("steps", "startup_seconds", *(f"step_seconds_{part}" for part in ("p10", "p50")))
        measured[name] = {key: result[key] for key in (*kept, "step_seconds_p90")}
    return measured


def _has_begun(folder: Path) -> bool:
    log = folder / "metrics.jsonl"
    return log.exists() and log.stat().st_size > 0


def cost_seconds(
    run: Mapping[str, Any], in_turn: Mapping[str, Any], *, is_later: bool = False
) -> float:
    """Cost of a student: its steps at their median in turn, scoring and start-up.

    Args:
        run: of the study, with name, steps, needs_scores, and what went through the teacher.
        in_turn: `runs` as `steps_in_turn` gives them, and `score_seconds`.
        is_later: count a student that finds the scores and a whole cache.
    """
    measured = in_turn["runs"]
    plain, cached = measured[run["name"]], measured.get(f"{run['name']}: cached")
    share = 1.0
    if cached is not None:
        asked, saved = run["teacher_forwards"], run["teacher_forwards_saved"]
        share = 0.0 if is_later else asked / (asked + saved)
    step = share * plain["step_seconds_p50"]
    step += (1 - share) * cached["step_seconds_p50"] if cached is not None else 0.0
    scoring = in_turn["score_seconds"] if run["needs_scores"] and not is_later else 0.0
    return run["steps"] * step + scoring + plain["startup_seconds"]
