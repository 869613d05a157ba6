"""Fair measurements: candidates take turns in one run, ratios are formed pair by pair.

Machines are noisy: quote the ratios, not the seconds. Every result is a JSON file with the machine,
the versions and the commit in it.
"""

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastprune.base.environment import describe_machine, describe_versions
from fastprune.base.files import write_text

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent


def take_turns(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int = 5, warmup_rounds: int = 1
) -> dict[str, list[float]]:
    """Time every candidate once per round, A B C A B C ...

    Args:
        candidates: name -> what is timed, start to end.
        rounds: counted rounds.
        warmup_rounds: rounds before them that are not counted.

    Returns:
        Name -> seconds of each counted round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warmup_rounds + rounds):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            elapsed = time.perf_counter() - started
            if number >= warmup_rounds:
                seconds[name].append(elapsed)
    return seconds


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and count of a measurement."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, Any]:
    """The spread of numerator over denominator, formed round by round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def write_result(name: str, result: Mapping[str, Any]) -> Path:
    """Write benchmarks/results/<name>.json with what the numbers were measured with.

    Returns:
        The file.
    """
    path = RESULTS / f"{name}.json"
    content = {
        **result,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")
    return path


def commit() -> str:
    """The commit of the working tree, marked where files other than results differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        changes = [*git, "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"]
        is_dirty = bool(head) and subprocess.run(changes, check=False).returncode != 0
    except FileNotFoundError:  # a measurement must not be lost for want of git
        return "unknown"
    return f"{head}-dirty" if is_dirty else head or "unknown"
