"""From a bucket to batches, cold: fastprune, MosaicML Streaming and LitData, in turn.

    python benchmarks/remote_peers.py --images folder-of-jpegs --peers venv/bin/python

The same JPEGs lie in one bucket in each library's format: a folder behind nginx on loopback. A pass
is a new process with an empty local folder that makes batches of 64 training views of 224 pixels:
fastprune by its loader, the others by a torch DataLoader with Pillow and torchvision's
RandomResizedCrop. Passes over all rows are shuffled by each library; for a random half the others
are indexed by sorted rows, because neither takes a list of rows. Timed from the making of the
dataset, behind all imports; bytes and requests are the server's own counts, on the same CPUs.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH = 64
SIDE = 224
WORKERS = 2
CHUNK_BYTES = 16 << 20
READERS = ("fastprune", "mosaicml-streaming", "litdata")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder of JPEG files")
    parser.add_argument("--peers", help="Python of an environment with both libraries")
    parser.add_argument("--repeats", type=int, default=3, help="how often each image is a row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where to write; default: the system's")
    parser.add_argument("--task", nargs=4, metavar=("DO", "LIBRARY", "SOURCE", "TARGET"))
    arguments = parser.parse_args()
    if arguments.task:
        run_task(*arguments.task)
        return
    from _harness import write_result

    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        result = measure(Path(name), arguments)
    path = write_result("remote-peers", result)
    print(json.dumps({key: result[key] for key in result if key != "settings"}, indent=1))
    print(f"-> {path}")


def measure(folder: Path, arguments: argparse.Namespace) -> dict:
    import numpy as np
    from _harness import ratios, spread
    from remote import nginx

    bucket = folder / "root" / "bucket"
    bucket.mkdir(parents=True)
    files = sorted(path for path in arguments.images.iterdir() if path.is_file())
    listed = folder / "files.json"
    listed.write_text(json.dumps([str(file) for file in files] * arguments.repeats))
    num_rows = len(files) * arguments.repeats
    half = np.flatnonzero(np.random.default_rng(0).random(num_rows) < 0.5)
    (folder / "half.json").write_text(json.dumps(half.tolist()))
    (folder / "all.json").write_text(json.dumps(None))
    python = {name: sys.executable if name == "fastprune" else arguments.peers for name in READERS}
    for name in READERS:
        task(python[name], "write", name, listed, bucket / name)
    stored = {name: sum(p.stat().st_size for p in (bucket / name).rglob("*")) for name in READERS}
    runs: dict[str, dict[str, list[dict]]] = {}
    with nginx(folder, folder / "root") as server:
        for _ in range(arguments.rounds):
            for rows in ("all", "half"):
                for name in READERS:
                    server.counts()
                    local = folder / "local"
                    run = task(python[name], "read", name, folder / f"{rows}.json", local)
                    shutil.rmtree(local)
                    run |= server.counts()
                    runs.setdefault(rows, {}).setdefault(name, []).append(run)
    rates = {
        rows: {
            name: [run["images"] / run["seconds"] for run in some] for name, some in kinds.items()
        }
        for rows, kinds in runs.items()
    }
    return {
        "question": "how fast, and with how many bytes, do batches come from a bucket to an empty "
        "node",
        "settings": {
            "rows": num_rows,
            "kept_rows": len(half),
            "batch_size": BATCH,
            "image_size": SIDE,
            "workers": WORKERS,
            "chunk_bytes": CHUNK_BYTES,
            "rounds": arguments.rounds,
        },
        "peer_versions": task(python["litdata"], "versions", "", "", "."),
        "stored_bytes": stored,
        "images_per_second": {
            rows: {name: spread(values) for name, values in kinds.items()}
            for rows, kinds in rates.items()
        },
        "fastprune_over": {
            rows: {name: ratios(kinds["fastprune"], kinds[name]) for name in READERS[1:]}
            for rows, kinds in rates.items()
        },
        **{
            field: {
                rows: {name: spread([run[key] for run in some]) for name, some in kinds.items()}
                for rows, kinds in runs.items()
            }
            for field, key in (
                ("first_batch_seconds", "first"),
                ("fetched_bytes", "bytes"),
                ("requests", "requests"),
            )
        },
    }


def task(python: str, *words: object) -> dict:
    """Run a task of this file in an environment; returns what it prints last."""
    command = [python, __file__, "--task", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_task(what: str, library: str, source: str, target: str) -> None:
    if what == "versions":
        from importlib.metadata import version

        print(json.dumps({name: version(name) for name in READERS[1:]}))
    elif what == "write":
        write(library, json.loads(Path(source).read_text()), Path(target))
        print("{}")
    else:
        print(json.dumps(read(library, json.loads(Path(source).read_text()), target)))


def sample(index_and_path: tuple[int, str]) -> dict:
    index, path = index_and_path
    return {"jpg": Path(path).read_bytes(), "label": index % 100}


def write(library: str, files: list[str], folder: Path) -> None:
    rows = list(enumerate(files))
    if library == "fastprune":
        from fastprune import convert

        images = [(sample(row)["jpg"], sample(row)["label"]) for row in rows]
        convert(images, folder, jpeg="original", shards=8)
    elif library == "litdata":
        import litdata

        litdata.optimize(sample, rows, str(folder), chunk_bytes=CHUNK_BYTES, num_workers=1)
    else:
        from streaming import MDSWriter

        columns = {"jpg": "bytes", "label": "int"}
        with MDSWriter(out=str(folder), columns=columns, size_limit=CHUNK_BYTES) as out:
            for row in rows:
                out.write(sample(row))


def read(library: str, rows: list[int] | None, local: str) -> dict:
    """One pass; seconds to the first batch and to the last."""
    make = {"fastprune": own_batches, "litdata": lit_batches, "mosaicml-streaming": mds_batches}
    make = make[library](rows, local)
    started = time.perf_counter()
    first, images = None, 0
    for batch in make():
        first = first or time.perf_counter() - started
        images += len(batch[0])
    return {"first": first, "seconds": time.perf_counter() - started, "images": images}


def own_batches(rows, local):
    import numpy as np
    import torch

    from fastprune import Loader, open_beton

    settings = {"batch_size": BATCH, "image_size": SIDE, "augment": "rrc", "dtype": torch.uint8}
    settings |= {"tail": "exact", "num_workers": WORKERS, "device": "cpu", "order": "random"}
    subset = None if rows is None else np.array(rows)
    return lambda: Loader(open_beton("s3://bucket/fastprune/", cache=local), subset, **settings)


def views():
    """What becomes of a sample in a peer's worker."""
    import io

    from PIL import Image
    from torchvision.transforms import functional
    from torchvision.transforms.v2 import RandomHorizontalFlip, RandomResizedCrop

    crop, flip = RandomResizedCrop(SIDE), RandomHorizontalFlip()

    def view(sample):
        image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
        return functional.pil_to_tensor(flip(crop(image))), sample["label"]

    return view


def indexed(dataset, rows):
    """The rows of a dataset, in their order, which is the order of its chunks."""
    from torch.utils.data import Dataset

    class Rows(Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, at):
            return dataset[rows[at]]

    return Rows()


def mds_batches(rows, local):
    import os

    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    view = views()

    class Views(StreamingDataset):
        def __getitem__(self, at):
            return view(super().__getitem__(at))

    def make():
        options = {"remote": "s3://bucket/mosaicml-streaming", "local": local, "batch_size": BATCH}
        dataset = Views(shuffle=rows is None, **options)
        dataset = dataset if rows is None else indexed(dataset, rows)
        return DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS)

    return make


def lit_batches(rows, local):
    import os

    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.downloader import _OBSTORE_CLIENT_OPTIONS
    from torch.utils.data import DataLoader

    # Its client takes servers without TLS only if it is asked to, for which there is no setting.
    _OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    view = views()

    class Views(StreamingDataset):
        def __getitem__(self, at):
            return view(super().__getitem__(at))

    def make():
        dataset = Views(
            "s3://bucket/litdata",
            cache_dir=local,
            shuffle=rows is None,
            storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL"]},
        )
        if rows is None:
            return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS)
        return DataLoader(indexed(dataset, rows), batch_size=BATCH, num_workers=WORKERS)

    return make


if __name__ == "__main__":
    main()
