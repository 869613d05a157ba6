"""What is in a beton, in numbers."""

from pathlib import Path
from typing import Any

import numpy as np

from fastprune.beton import layout
from fastprune.beton.reader import open_beton


def summarize(path: str | Path) -> dict[str, Any]:
    """What `fastprune info` shows of a beton, ready for JSON.

    Args:
        path: the beton.

    Returns:
        Name -> value; sizes in bytes, sides in pixels.

    Raises:
        BetonError: as `open_beton`.
    """
    beton = open_beton(path)
    rows_per_class = np.unique(beton.labels, return_counts=True)[1]
    modes = np.bincount(beton.modes, minlength=2)
    manifest = beton.manifest
    return {
        "path": str(beton.path),
        "rows": beton.num_rows,
        "fields": {field.name: field.kind for field in beton.fields},
        "classes": beton.num_classes,
        "classes_without_rows": max(0, beton.num_classes - len(rows_per_class)),
        "rows_per_class": _spread(rows_per_class),
        "file_bytes": len(beton.content),
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


def _spread(values: Any) -> dict[str, float]:
    """The smallest, the median, the largest value and their sum."""
    return {
        "smallest": int(values.min()),
        "median": float(np.median(values)),
        "largest": int(values.max()),
        "sum": int(values.astype(np.int64).sum()),
    }
