"""How many requests and bytes do kept rows take from object storage, at the size of ImageNet?

    python benchmarks/fetch_plan.py --images folder-of-jpegs

No network: the plan that `fastprune stage` and a loader make, for rows whose sizes are drawn from
the files, laid out as `fastprune convert --shards` does. Requests of many nodes at once are
compared with what S3 answers per prefix; a node with several trainers has one mirror.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from _harness import write_result

from fastprune.beton import layout
from fastprune.beton.output import PageCursor
from fastprune.beton.remote.mirror import WINDOW_BYTES
from fastprune.beton.remote.plan import SLACK, Places, in_windows, requests_for

IMAGENET_ROWS = 1_281_167
# AWS: "at least 5,500 GET/HEAD requests per second per partitioned Amazon S3 prefix", and the price
# of S3 Standard in us-east-1 (a transfer within the region is free).
REQUESTS_PER_SECOND_PER_PREFIX = 5_500
DOLLARS_PER_MILLION_GETS = 0.40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG files")
    parser.add_argument("--rows", type=int, default=IMAGENET_ROWS)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 4, 100])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument(
        "--megabytes-per-second", type=float, default=1000, help="what a node's network gives"
    )
    arguments = parser.parse_args()
    places = lay_out(arguments.images, arguments.rows, arguments.shards)
    generator = np.random.default_rng(0)
    times, order = generator.random(arguments.rows), generator.permutation(arguments.rows)
    plans = {}
    for keep in arguments.keep:
        rows = np.flatnonzero(times < keep)
        staged = requests_for(places, rows, slack=SLACK)
        in_order = order[times[order] < keep]
        ahead = [
            request
            for window in in_windows(places, in_order, window_bytes=WINDOW_BYTES)
            for request in requests_for(places, window, slack=0)
        ]
        wanted = int(places.sizes[rows].sum())
        plans[f"keep {keep:g}"] = {
            "rows": len(rows),
            "wanted_bytes": wanted,
            "staged": described(staged, wanted, arguments),
            "ahead of a random order": described(ahead, wanted, arguments),
        }
    result = {
        "question": "requests and bytes of kept rows from object storage",
        "settings": {
            "rows": arguments.rows,
            "shards": arguments.shards,
            "megabytes_per_second_of_a_node": arguments.megabytes_per_second,
            "requests_per_second_of_a_prefix": REQUESTS_PER_SECOND_PER_PREFIX,
            "dollars_per_million_gets": DOLLARS_PER_MILLION_GETS,
        },
        "plans": plans,
    }
    path = write_result("fetch-plan", result)
    print(f"{json.dumps(plans, indent=1)}\n-> {path}")


def lay_out(images: Path, num_rows: int, num_shards: int) -> Places:
    """Places of rows whose sizes are drawn from the files."""
    file_bytes = [path.stat().st_size for path in images.iterdir() if path.is_file()]
    sizes = np.random.default_rng(0).choice(file_bytes, num_rows).astype(np.int64)
    parts = np.array_split(np.arange(num_rows), num_shards)
    offsets = np.empty(num_rows, np.int64)
    for part in parts:
        start = layout.metadata_start(2) + 24 * len(part)
        page = layout.DEFAULT_PAGE_BYTES
        cursor = PageCursor(layout.align_up(start, page), page)
        offsets[part] = [cursor.place(int(size)) for size in sizes[part]]
    return Places(np.repeat(np.arange(num_shards), list(map(len, parts))), offsets, sizes)


def described(requests: list, wanted: int, arguments: argparse.Namespace) -> dict:
    num_requests, num_bytes = len(requests), sum(request.size for request in requests)
    seconds = num_bytes / arguments.megabytes_per_second / 1e6
    nodes = {}
    for count in arguments.nodes:
        rate = count * num_requests / seconds
        nodes[str(count)] = {
            "requests": count * num_requests,
            "requests_per_second_at_full_rate": round(rate),
            "prefixes_needed": int(np.ceil(rate / REQUESTS_PER_SECOND_PER_PREFIX)),
            "seconds_with_one_prefix": round(
                max(seconds, count * num_requests / REQUESTS_PER_SECOND_PER_PREFIX), 1
            ),
            "dollars": round(count * num_requests / 1e6 * DOLLARS_PER_MILLION_GETS, 4),
        }
    return {
        "requests": num_requests,
        "bytes_over_wanted": num_bytes / wanted,
        "seconds_at_full_rate": round(seconds, 1),
        "nodes": nodes,
    }


if __name__ == "__main__":
    main()
