"""A store of known values; as a program, a process that fills its share of one."""

import sys
import time

import numpy as np

from fastprune.rows.store import RowStore

# More than two blocks.
NUM_ROWS = 10_001
FIELDS = {
    "vectors": np.dtype((np.float16, (5,))),
    "records": np.dtype([("loss", "<f8"), ("prediction", "<i8")]),
}


def open_store(folder):
    folder.mkdir(exist_ok=True)
    return RowStore(folder, NUM_ROWS, FIELDS)


def values_of(rows):
    """Both fields, different for every row."""
    rows = np.asarray(rows)
    records = np.zeros(len(rows), FIELDS["records"])
    records["loss"], records["prediction"] = np.sqrt(rows), rows + 7
    return np.sin(np.outer(rows, np.arange(1, 6))).astype(np.float16), records


def fill_share(folder, rank, ranks):
    """Put the missing rows of this rank in small batches, with many commits and seals."""
    with open_store(folder) as store:
        print("writing", flush=True)
        mine = np.random.default_rng(0).permutation(NUM_ROWS)[rank::ranks]
        mine = mine[~store.has(mine)]
        for count, batch in enumerate(np.array_split(mine, 120)):
            store.put(batch, *values_of(batch))
            store.commit(seal=count % 10 == 0)
            time.sleep(0.001)
        store.commit(seal=True)


if __name__ == "__main__":
    from pathlib import Path

    fill_share(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
