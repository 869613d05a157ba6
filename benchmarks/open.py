"""How long does it take to open a beton of ImageNet's size, its whole structure checked?

    python benchmarks/open.py --images folder-of-jpegs

The beton has real metadata and a real allocation table, with sizes drawn from the files, and holes
where the images would be: opening reads no image. FFCV's workers leave the table in no order, so
that is measured too. So are the same rows in 64 shards. "Cold" opens what the page cache was told
to drop.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from _harness import ratios, spread, write_result

from fastprune.base.provenance import Fingerprint, content_digest
from fastprune.beton import layout
from fastprune.beton.check import found_lines
from fastprune.beton.convert.assembly import FIELDS
from fastprune.beton.manifest import Manifest, manifest_path, write_manifest
from fastprune.beton.opening import open_beton
from fastprune.beton.output import PageCursor, write_frame
from fastprune.beton.shards import shard_name, write_set

IMAGENET_ROWS = 1_281_167
NUM_SHARDS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG files")
    parser.add_argument("--rows", type=int, default=IMAGENET_ROWS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where to write; default: the system's")
    arguments = parser.parse_args()
    file_bytes = [path.stat().st_size for path in arguments.images.iterdir() if path.is_file()]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        paths = {"rows in order": Path(folder, "a"), "rows in no order": Path(folder, "b")}
        generator = np.random.default_rng(0)
        sizes = generator.choice(file_bytes, arguments.rows)
        write_hollow_beton(paths["rows in order"], sizes, np.arange(arguments.rows))
        write_hollow_beton(paths["rows in no order"], sizes, generator.permutation(arguments.rows))
        paths[f"{NUM_SHARDS} shards"] = Path(folder, "c")
        write_hollow_shards(paths[f"{NUM_SHARDS} shards"], sizes)
        seconds = {f"{name}, {state}": [] for name in paths for state in ("warm", "cold")}
        for number in range(1 + arguments.rounds):
            for name, path in paths.items():
                for state in ("warm", "cold"):
                    if state == "cold":
                        drop_from_memory(path)
                    started = time.perf_counter()
                    open_beton(path)
                    if number:
                        seconds[f"{name}, {state}"].append(time.perf_counter() - started)
    result = {
        "question": "seconds to open a beton with its structure checked",
        "settings": {"rows": arguments.rows, "rounds": arguments.rounds},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "shards_over_single": {
            state: ratios(
                seconds[f"{NUM_SHARDS} shards, {state}"], seconds[f"rows in order, {state}"]
            )
            for state in ("warm", "cold")
        },
    }
    path = write_result("open", result)
    print(f"{result['seconds']}\n-> {path}")


def drop_from_memory(path: Path) -> None:
    """Make the next read of a beton, a file or a folder, one from the disk."""
    for file in path.iterdir() if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_hollow_beton(path: Path, sizes: np.ndarray, order: np.ndarray) -> None:
    """A beton without its images, whose table lists the rows in this order."""
    start = layout.metadata_start(len(FIELDS)) + 24 * len(sizes)
    page = layout.DEFAULT_PAGE_BYTES
    cursor = PageCursor(layout.align_up(start, page), page)
    metadata = np.zeros(len(sizes), layout.metadata_dtype(FIELDS))
    metadata["f0"]["width"], metadata["f0"]["height"] = 500, 375
    metadata["f0"]["data_ptr"] = [cursor.place(int(size)) for size in sizes]
    metadata["f1"] = np.arange(len(sizes)) % 1000
    table = np.zeros(len(sizes), layout.ALLOCATION)
    table["sample_id"] = order
    table["ptr"], table["size"] = metadata["f0"]["data_ptr"][order], sizes[order]
    path.touch()
    write_frame(path, FIELDS, metadata, table, cursor, 1000)


def write_hollow_shards(folder: Path, sizes: np.ndarray) -> None:
    """A sharded beton without its images, with manifests as `convert --shards` writes them."""
    folder.mkdir()
    job = {"shards": NUM_SHARDS}
    for index, part in enumerate(np.array_split(sizes, NUM_SHARDS)):
        path = folder / shard_name(index)
        write_hollow_beton(path, part, np.arange(len(part)))
        beton = open_beton(path)
        rows, crcs = np.arange(len(part)), np.full(len(part), index, np.uint32)
        manifest = Manifest(
            path=manifest_path(path),
            fingerprint=Fingerprint(len(part), beton.structure, content_digest(crcs)),
            class_names=tuple(f"n{number:08d}" for number in range(1000)),
            counts={"found": len(part)},
            settings={**job, "shard": index},
        )
        write_manifest(manifest, found_lines(beton, rows, crcs))
    write_set(folder, NUM_SHARDS, job)


if __name__ == "__main__":
    main()
