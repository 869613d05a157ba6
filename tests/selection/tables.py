"""Score tables without a teacher."""

import numpy as np

from fastprune.base.provenance import Fingerprint
from fastprune.rows.score_table import ScoreTable

METRICS = ("centroid", "loss", "el2n", "logit_std")


def score_table(*, class_sizes=(50, 40, 80, 30), seed=0):
    """Random scores of shuffled rows."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(class_sizes)), class_sizes))
    counts = np.array(class_sizes, np.int64)
    return ScoreTable(
        labels=labels,
        metrics={name: generator.random(len(labels), dtype=np.float32) for name in METRICS},
        predictions=labels.copy(),
        class_std=np.where(counts > 0, generator.random(len(counts)), np.nan),
        class_counts=counts,
        fingerprint=Fingerprint(len(labels), "ab" * 16, "cd" * 16),
        teacher={"network": "resnet8"},
        view={"augment": "center"},
    )
