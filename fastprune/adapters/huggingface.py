"""A subset as Parquet files that Hugging Face's `datasets` loads: images, labels, scores."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fastprune.base.errors import ArtifactError, InvalidValueError
from fastprune.base.provenance import require_same_images
from fastprune.beton import layout
from fastprune.beton.beton import Beton
from fastprune.rows.score_table import ScoreTable
from fastprune.rows.subset import Subset
from fastprune.selection.exporters import kept_rows_of

# As `datasets` writes images: files that a hub accepts, and row groups that its viewer reads fast.
_SHARD_BYTES = 500 * 10**6
_GROUP_ROWS = 100
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def export_parquet(
    subset: Subset,
    folder: str | Path,
    *,
    beton: Beton | None,
    scores: ScoreTable | None = None,
) -> list[Path]:
    """Write a subset's images, labels and scores; see `write_parquet_shards`.

    Raises:
        InvalidValueError: the beton has no manifest, or holds raw pixels.
        ArtifactMismatch: beton or scores were made from other images than the subset.
        ArtifactError: the folder exists or cannot be written.
    """
    rows = kept_rows_of(subset, beton, "huggingface")
    assert beton is not None
    if scores is not None:
        require_same_images(
            scores.fingerprint,
            "the score table",
            beton.fingerprint,
            str(beton.path),
            cure="Give the scores that the subset was made from.",
        )
    return write_parquet_shards(rows, beton, Path(folder), scores=scores)


def write_parquet_shards(
    rows: NDArray[np.int64],
    beton: Beton,
    folder: Path,
    *,
    scores: ScoreTable | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> list[Path]:
    """Write `train-00000-of-00003.parquet` and so on, whole or not at all.

    Columns are `image` (a struct of bytes and path, decoded by `datasets` on access), `label` (a
    ClassLabel if the beton has class names; missing if it has no labels), `row`, and with scores
    every metric, and `cluster` if there are clusters. The bytes are the stored ones, so
    `fastprune convert` makes the same beton from them.

    `rows` is (K,) and sorted, `beton` has its manifest, and `shard_bytes` is the approximate size
    of the images in a file. Returns the files.

    Raises:
        InvalidValueError: the beton holds raw pixels instead of image files.
        ArtifactError: the folder exists or cannot be written.
    """
    if (beton.modes[rows] != layout.JPG).any():
        raise InvalidValueError(
            f"{beton.path} holds raw pixels, but format 'huggingface' takes image files. Convert "
            "the images with fastprune, which keeps JPEGs."
        )
    if folder.exists():
        raise ArtifactError(f"{folder} exists. Name a folder that does not, or remove it.")
    # The first byte of a row decides its file.
    ends = np.cumsum(beton.sizes[rows])
    shard_of = (ends - beton.sizes[rows]) // shard_bytes
    parts = [rows[shard_of == shard] for shard in np.unique(shard_of)]
    # Beside the folder, so that the rename stays on one disk; a failed export leaves nothing.
    partial = folder.with_name(f"{folder.name}.partial")
    names = [f"train-{number:05d}-of-{len(parts):05d}.parquet" for number in range(len(parts))]
    columns = _columns(beton, scores)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, part in zip(names, parts, strict=True):
            _write_shard(partial / name, part, beton, columns)
        partial.rename(folder)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {folder}: {error.strerror or error}. Free some space, or name a folder "
            "whose parent exists and that you may write to."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [folder / name for name in names]


def _columns(beton: Beton, scores: ScoreTable | None) -> dict[str, NDArray[Any]]:
    """Every column but the image, (N,) each."""
    columns: dict[str, NDArray[Any]] = {"label": beton.labels} if beton.has_labels else {}
    columns["row"] = np.arange(beton.num_rows)
    if scores is not None:
        columns |= scores.metrics
        if scores.clusters is not None:
            columns["cluster"] = scores.clusters
    return columns


def _write_shard(
    path: Path, rows: NDArray[np.int64], beton: Beton, columns: dict[str, NDArray[Any]]
) -> None:
    assert beton.manifest is not None
    sources = beton.manifest.table(["source"])["source"]
    types = {name: pa.from_numpy_dtype(values.dtype) for name, values in columns.items()}
    schema = pa.schema([("image", _IMAGE), *types.items()]).with_metadata(
        {"huggingface": json.dumps(_described(beton, types))}
    )
    with pq.ParquetWriter(path, schema) as writer:
        # A row group at a time, so that memory holds the images of one group.
        for start in range(0, len(rows), _GROUP_ROWS):
            part = rows[start : start + _GROUP_ROWS]
            files = sources.take(pa.array(part)).to_pylist()
            images = [
                {"bytes": beton.image_bytes(row).tobytes(), "path": file and Path(file).name}
                for row, file in zip(part.tolist(), files, strict=True)
            ]
            arrays = [pa.array(values[part]) for values in columns.values()]
            group = pa.table([pa.array(images, _IMAGE), *arrays], schema=schema)
            writer.write_table(group, row_group_size=_GROUP_ROWS)


def _described(beton: Beton, types: dict[str, pa.DataType]) -> dict[str, Any]:
    """Describe the columns as `datasets` does: its `Features`, under "info"."""
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    for name, kind in types.items():
        # Arrow's "float" and "double" are float32 and float64 elsewhere.
        dtype = {"float": "float32", "double": "float64"}.get(str(kind), str(kind))
        features[name] = {"dtype": dtype, "_type": "Value"}
    if "label" in types and beton.class_names is not None:
        features["label"] = {"names": list(beton.class_names), "_type": "ClassLabel"}
    return {"info": {"features": features}}
