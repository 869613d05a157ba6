"""An unfinished scoring pass of known results; as a program, a rank that adds its share."""

import sys
import time
from pathlib import Path

import numpy as np

from fastprune.base.ranks import Ranks
from fastprune.difficulty.teacher import RECORD
from fastprune.difficulty.unfinished_pass import open_pass

# More than two blocks.
NUM_ROWS, WIDTH = 10_001, 5


class LoneRanks(Ranks):
    """Ranks that exchange nothing."""

    def from_first(self, value):
        return value


def opened(out_path, rank):
    return open_pass(
        out_path,
        num_rows=NUM_ROWS,
        width=WIDTH,
        identity={"teacher": "any"},
        resume=True,
        started=time.monotonic(),
        ranks=LoneRanks(rank, 99),
    )


def results_of(rows):
    """Features, some of them beyond float16's range, and records; different for every row."""
    rows = np.asarray(rows)
    features = np.sin(np.outer(rows, np.arange(1, WIDTH + 1))).astype(np.float16).astype(np.float32)
    features[rows % 1000 == 7] *= 2.0**20
    records = np.zeros(len(rows), RECORD)
    records["loss"], records["prediction"] = np.sqrt(rows), rows % 10
    return features, records


def fill_share(out_path, rank, ranks):
    """Put the missing rows of this rank in small batches, with many commits."""
    # Never as the first rank, which takes the pass for itself.
    with opened(out_path, rank + 1) as unfinished:
        print("writing", flush=True)
        mine = np.intersect1d(np.arange(NUM_ROWS)[rank::ranks], unfinished.missing())
        for batch in np.array_split(mine, 120):
            unfinished.put(batch, *results_of(batch))
            unfinished.commit()
            time.sleep(0.001)


if __name__ == "__main__":
    fill_share(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
