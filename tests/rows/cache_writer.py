"""A cache of known logits; as a program, a process that fills its share of one and says so."""

import sys
import time

import numpy as np

from fastprune import TeacherCache

NUM_CLASSES = 7
# More than two blocks, with gaps, so that rows and positions differ.
ROWS = np.arange(10_001) * 3


def logits_of(rows, slot):
    """What the teacher says: (n, 7) float32, different for every row and slot."""
    columns = np.arange(NUM_CLASSES) + 1.0
    values = np.sin(np.outer(np.asarray(rows) + 1, columns) * (slot + 1)) * 9
    return values.astype(np.float32)


def make_cache(path, *, num_classes=NUM_CLASSES, num_views=3, dtype="float16", identity=None):
    return TeacherCache.create(
        path,
        rows=ROWS,
        num_classes=num_classes,
        num_views=num_views,
        dtype=dtype,
        identity=identity,
    )


def fill_share(path, rank, ranks):
    """Put what is missing of this rank's rows in small batches, with many commits and seals."""
    with TeacherCache.open(path) as cache:
        print("writing", flush=True)
        for slot in range(cache.num_views):
            mine = np.random.default_rng(slot).permutation(ROWS)[rank::ranks]
            mine = mine[~cache.has(mine, slot)]
            for count, batch in enumerate(np.array_split(mine, 60)):
                cache.put(batch, slot, logits_of(batch, slot))
                cache.commit(seal=count % 10 == 0)
                time.sleep(0.001)
        cache.commit(seal=True)


if __name__ == "__main__":
    fill_share(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
