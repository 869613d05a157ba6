"""How many views must recur before accuracy suffers?

    python benchmarks/recurring_views.py --images cifar10       # has folders train/ and test/

One teacher is trained once. Then a student is distilled for every K and every seed, seed by seed,
each with a teacher cache of its own; K = 0 stands for a new view in each epoch, without a cache.
The JSON is written after every run; the script continues where it was stopped.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from _harness import RESULTS, ROOT, commit, write_result
from _study import Preparation, refuse_other, train_process
from wallclock import mean_and_sd

KEPT_OF_RESULT = (
    "top1_last",
    "top1_best",
    "train_seconds",
    "teacher_seconds",
    "teacher_forwards",
    "teacher_forwards_saved",
    "cache_bytes",
    "cache_fill_seconds",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="has folders train and test")
    parser.add_argument(
        "--name", default="cifar10", help="of the result: recurring-views-NAME.json"
    )
    parser.add_argument("--views", default="2,4,8,16,0", help="values of K; 0 for new ones always")
    parser.add_argument("--per-class", type=int, default=600, help="training images; 0 for all")
    parser.add_argument("--val-per-class", type=int, default=0, help="test images; 0 for all")
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher", default="resnet20")
    parser.add_argument("--teacher-epochs", type=int, default=16)
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    name = f"recurring-views-{arguments.name}"
    prepared = Preparation(ROOT / "build" / name, image_size=arguments.image_size)
    prepared.convert(arguments.images, arguments.per_class or None, arguments.val_per_class or None)
    prepared.train_teacher(arguments.teacher, arguments.teacher_epochs, arguments.device)
    left_out = ("images", "name", "views", "seeds")
    settings = {key: value for key, value in vars(arguments).items() if key not in left_out}
    runs: list[dict[str, Any]] = []
    path = RESULTS / f"{name}.json"
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        refuse_other(earlier, {"settings": settings}, made=path)
        runs = earlier["runs"]
    for seed in range(arguments.seeds):
        for num_views in map(int, arguments.views.split(",")):
            if any(run["num_views"] == num_views and run["seed"] == seed for run in runs):
                continue
            print(f"K = {num_views}, seed {seed} ...", flush=True)
            runs.append(train(arguments, prepared, num_views, seed))
            result = {
                "question": "top-1 of students whose views recur, by the number of views",
                "settings": settings,
                "prepared": prepared.facts,
                "runs": runs,
                "summary": summarize(runs),
            }
            write_result(name, result)
    print(f"{len(runs)} runs -> {path}")


def train(
    arguments: argparse.Namespace, prepared: Preparation, num_views: int, seed: int
) -> dict[str, Any]:
    """Distill one student."""
    folder = prepared.folder / "runs" / f"{num_views}-{seed}"
    cache = prepared.folder / f"cache-{num_views}-{seed}"
    settings = {
        **prepared.betons(),
        "student.network": arguments.student,
        "teacher.network": arguments.teacher,
        "teacher.checkpoint": prepared.teacher,
        "schedule.epochs": arguments.epochs,
        "run.seed": seed,
        "run.device": arguments.device,
        "run.validate_every": arguments.epochs,
    }
    if num_views:
        settings |= {"data.num_views": num_views, "teacher.cache": cache}
    # What a killed study left would spare this run its teacher.
    shutil.rmtree(cache, ignore_errors=True)
    result, _ = train_process(folder, settings)
    shutil.rmtree(cache, ignore_errors=True)
    kept = {key: result[key] for key in KEPT_OF_RESULT}
    return {"num_views": num_views, "seed": seed, "commit": commit(), **kept}


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy by K, and its difference from new views always, seed by seed."""
    always_new = {run["seed"]: run for run in runs if run["num_views"] == 0}
    summary = {}
    for num_views in dict.fromkeys(run["num_views"] for run in runs):
        ours = [run for run in runs if run["num_views"] == num_views]
        pairs = [(run, always_new[run["seed"]]) for run in ours if run["seed"] in always_new]
        summary[str(num_views)] = {
            "top1_last": mean_and_sd(run["top1_last"] for run in ours),
            "top1_last_over_new": mean_and_sd(
                run["top1_last"] - new["top1_last"] for run, new in pairs
            ),
            "train_seconds_over_new": mean_and_sd(
                run["train_seconds"] / new["train_seconds"] for run, new in pairs
            ),
        }
    return summary


if __name__ == "__main__":
    main()
