"""Summaries of betons, score tables and subsets, in numbers."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fastprune.beton import layout
from fastprune.beton.convert.transcode import ACTIONS, COPIED, FEWEST_BYTES_TO_REWRITE, REWRITTEN
from fastprune.beton.manifest import Manifest
from fastprune.beton.opening import open_beton
from fastprune.rows.score_table import ScoreTable
from fastprune.rows.subset import Subset


def summarize(path: str | Path) -> dict[str, Any]:
    """Summarize a file for `fastprune info`, ready for JSON.

    Args:
        path: a subset (.npy), a score table (.parquet), or a beton (any other name).

    Returns:
        Name -> value; sizes in bytes, sides in pixels.

    Raises:
        ArtifactError: the file is missing, damaged, or something else; a `BetonError` for a beton.
        InvalidValueError: a subset's rows are not valid rows.
    """
    path = Path(path)
    # By the name: betons of other writers have any suffix.
    if path.suffix == ".npy":
        return _subset(path)
    if path.suffix == ".parquet":
        return _scores(path)
    return _beton(path)


def _subset(path: Path) -> dict[str, Any]:
    subset = Subset.load(path)
    return {
        "path": str(path),
        "rows": len(subset.rows),
        "first_row": int(subset.rows[0]),
        "last_row": int(subset.rows[-1]),
        "keep_ratio": subset.keep_ratio,
        "metric": subset.metric,
        "strategy": subset.strategy,
        "parameters": subset.parameters,
        "seed": subset.seed,
        "rows_per_class": None
        if subset.class_counts is None
        else _spread(np.array(subset.class_counts)),
        "made_for": None if subset.fingerprint is None else subset.fingerprint.to_dict(),
        "command": subset.command,
    }


def _scores(path: Path) -> dict[str, Any]:
    table = ScoreTable.load(path)
    return {
        "path": str(path),
        "rows": table.num_rows,
        "classes": len(table.class_counts),
        "metrics": {
            name: f"{np.nanmin(values):.4g} to {np.nanmax(values):.4g}, "
            f"median {np.nanmedian(values):.4g}"
            for name, values in table.metrics.items()
        },
        **(
            {"teacher_accuracy": float(np.mean(table.predictions == table.labels))}
            if table.clusters is None
            else {"clusters": table.clustering}
        ),
        "teacher": table.teacher,
        "view": table.view,
        "seconds": table.seconds,
        "made_for": table.fingerprint.to_dict(),
    }


def _beton(path: Path) -> dict[str, Any]:
    beton = open_beton(path)
    rows_per_class = np.unique(beton.labels, return_counts=True)[1]
    modes = np.bincount(beton.modes, minlength=2)
    manifest = beton.manifest
    return {
        "path": str(beton.path),
        "rows": beton.num_rows,
        **({} if beton.present is None else {"rows_present": int(beton.present.sum())}),
        "fields": {field.name: field.kind for field in beton.fields},
        "classes": beton.num_classes if beton.has_labels else 0,
        "classes_without_rows": max(0, beton.num_classes - len(rows_per_class)),
        "rows_per_class": _spread(rows_per_class),
        "files": len(beton.files),
        "file_bytes": sum(file.num_bytes for file in beton.files),
        "image_bytes": _spread(beton.sizes),
        "width": _spread(beton.widths),
        "height": _spread(beton.heights),
        "modes": {"jpg": int(modes[layout.JPG]), "raw": int(modes[layout.RAW])},
        "page_bytes": beton.page_bytes,
        "pages": len(np.unique(beton.offsets // beton.page_bytes)),
        "fingerprint": beton.fingerprint.to_dict(),
        "images": None if manifest is None else manifest.counts,
        "settings": None if manifest is None else manifest.settings,
    }


def jpeg_layouts(manifest: Manifest) -> str:
    """Describe which JPEGs a conversion rewrote, and why not the others; one line."""
    table = manifest.table(["action", "reason"])
    # In numpy: the import of pyarrow.compute takes longer than this and all else of a small job.
    copied = table["action"].to_numpy() == ACTIONS[COPIED]
    kinds = Counter(table["reason"].to_numpy()[copied].tolist())
    # Only files that a rewrite was tried on have a reason.
    small = kinds.pop(None, 0)
    rewritten = manifest.counts[ACTIONS[REWRITTEN]]
    parts = [f"{rewritten:,} JPEG{'s' * (rewritten != 1)} in the fast layout"]
    if small:
        parts.append(f"{small:,} below {FEWEST_BYTES_TO_REWRITE >> 10} KiB as they were")
    parts += [f"{count:,} as they were ({kind})" for kind, count in kinds.items()]
    return f"--jpeg {manifest.settings['jpeg']}: {', '.join(parts)}"


def _spread(values: Any) -> dict[str, float]:
    return {
        "smallest": int(values.min()),
        "median": float(np.median(values)),
        "largest": int(values.max()),
        "sum": int(values.astype(np.int64).sum()),
    }
