"""How long does it take to choose from ImageNet's 1,281,167 scores, reading the table included?

    taskset --cpu-list 0 python benchmarks/selection.py

The classes have ImageNet's sizes: 1,000 of 732 to 1,300 images, in random row order.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from _harness import spread, take_turns, write_result

from fastprune.base.cpus import usable_cpus
from fastprune.base.provenance import Fingerprint
from fastprune.rows.score_table import ScoreTable
from fastprune.selection.subsets import make_subset
from fastprune.settings import StrategySettings
from fastprune.settings.domains import domain_of

METRICS = (
    "centroid",
    "centroid_median",
    "loss",
    "el2n",
    "grand_last",
    "margin",
    "entropy",
    "confidence",
    "logit_std",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", help="not used; every benchmark takes it")
    arguments = parser.parse_args()

    table = imagenet_table()
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "scores.parquet", Path(folder) / "subset.npy"
        table.save(path)
        table_bytes = path.stat().st_size
        tasks = {"write table": lambda: table.save(path), "read table": lambda: read(path)}
        for strategy in domain_of(StrategySettings.model_fields["strategy"]).choices:
            tasks[strategy] = select(path, out, strategy=strategy)
        tasks["medium, equal quota"] = select(path, out, quota="equal")
        tasks["medium, compat mdslr"] = select(path, out, compat="mdslr")
        tasks["medium, blend of two"] = select(path, out, metric="centroid:0.5,loss:0.5")
        seconds = take_turns(tasks, rounds=arguments.rounds)
    result = {
        "rows": table.num_rows,
        "classes": len(table.class_counts),
        "cores": usable_cpus(),
        "table_bytes": table_bytes,
        "seconds": {name: spread(values) for name, values in seconds.items()},
    }
    for name, measured in result["seconds"].items():
        print(f"{name:24} {measured['median']:.3f} s")
    print(f"table: {table_bytes / 1e6:.1f} MB on {result['cores']} core(s)")
    print("->", write_result("selection", result))


def imagenet_table():
    """Random scores with ImageNet's number of rows and range of class sizes."""
    generator = np.random.default_rng(0)
    counts = np.array([732] * 33 + [1211] + [1300] * 966)
    labels = generator.permutation(np.repeat(np.arange(len(counts)), counts))
    return ScoreTable(
        labels=labels,
        metrics={name: generator.gamma(2, size=len(labels)).astype(np.float32) for name in METRICS},
        predictions=np.where(generator.random(len(labels)) < 0.8, labels, 0),
        class_std=generator.random(len(counts)),
        class_counts=counts,
        fingerprint=Fingerprint(len(labels), "0" * 32, "0" * 32),
    )


def read(path):
    return ScoreTable.load(path)


def select(path, out, **options):
    """What `fastprune select` does, from file to file."""

    def run():
        make_subset(ScoreTable.load(path), keep_ratio=0.5, **options).save(out)

    return run


if __name__ == "__main__":
    main()
