"""Is the loader of this checkout as fast as that of another one?

    python benchmarks/revisions.py --images folder-of-jpegs --against ../other-checkout

A process for each checkout runs epochs over the same beton, one after the other in turn. The first
batch is timed from the start of a process of its own, with everything compiled before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from _harness import ROOT, ratios, spread, take_turns, write_result

from fastprune.base.cpus import usable_cpus
from fastprune.beton.convert.writer import convert

# Runs an epoch for each line on its standard input, and answers with a line.
EPOCHS = """
import sys
from fastprune import Loader
loader = Loader(sys.argv[1], batch_size=64, num_workers=int(sys.argv[2]), device="cpu", raw=True)
print("ready", flush=True)
for _ in sys.stdin:
    for batch in loader:
        pass
    print("done", flush=True)
"""
FIRST_BATCH = """
import sys
from fastprune import Loader
loader = Loader(sys.argv[1], batch_size=64, num_workers=int(sys.argv[2]), device="cpu", raw=True)
next(iter(loader))
import os; os._exit(0)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG files")
    parser.add_argument("--against", type=Path, required=True, help="another checkout")
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, usable_cpus()}))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    other = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=arguments.against,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    result = {
        "question": "seconds of an epoch and of a first batch, this checkout's over another's",
        "settings": {"against": other, "rounds": arguments.rounds, "workers": arguments.workers},
        "epoch_ratio": {},
        "first_batch_seconds": {},
        "first_batch_ratio": {},
    }
    checkouts = {"this": ROOT, "other": arguments.against.resolve()}
    with tempfile.TemporaryDirectory() as folder:
        beton = Path(folder) / "train.beton"
        source = Path(folder) / "images" / "all"
        source.parent.mkdir()
        source.symlink_to(arguments.images.resolve())
        convert(source.parent, beton, jpeg="original")
        for workers in arguments.workers:
            name = f"{workers} threads"
            seconds = epochs(checkouts, beton, workers, arguments.rounds)
            result["epoch_ratio"][name] = ratios(seconds["this"], seconds["other"])
            seconds = take_turns(
                {who: partial(first_batch, root, beton, workers) for who, root in checkouts.items()}
                | {"numpy and torch": imports},
                rounds=arguments.rounds,
            )
            result["first_batch_seconds"][name] = {who: spread(seconds[who]) for who in seconds}
            result["first_batch_ratio"][name] = ratios(seconds["this"], seconds["other"])
    path = write_result("revisions", result)
    print(json.dumps(result, indent=1))
    print(f"-> {path}")


def epochs(
    checkouts: dict[str, Path], beton: Path, workers: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of epochs, by checkout."""
    processes = {
        who: subprocess.Popen(
            [sys.executable, "-c", EPOCHS, str(beton), str(workers)],
            env=os.environ | {"PYTHONPATH": str(root)},
            cwd=beton.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for who, root in checkouts.items()
    }

    def one(process: subprocess.Popen) -> None:
        print(file=process.stdin, flush=True)
        if process.stdout.readline() != "done\n":
            raise SystemExit(f"an epoch failed; the process ended with {process.wait()}")

    for process in processes.values():
        process.stdout.readline()
    try:
        return take_turns(
            {who: partial(one, process) for who, process in processes.items()}, rounds=rounds
        )
    finally:
        for process in processes.values():
            process.stdin.close()
            process.wait()


def first_batch(root: Path, beton: Path, workers: int) -> None:
    subprocess.run(
        [sys.executable, "-c", FIRST_BATCH, str(beton), str(workers)],
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=beton.parent,
        check=True,
    )


def imports() -> None:
    """What every loader of tensors pays."""
    subprocess.run([sys.executable, "-c", "import numpy, torch"], check=True)


if __name__ == "__main__":
    main()
