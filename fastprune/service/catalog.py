"""What a service says of its betons to clients that have no copy: one table, without images."""

import json
from collections.abc import Sequence
from pathlib import PurePath

import pyarrow as pa

from fastprune.service.desk import Served
from fastprune.service.served_beton import METADATA_KEY, SCHEMA
from fastprune.service.wire import ServiceRefusedError


def find_served(betons: Sequence[Served], name: str) -> Served:
    """The beton whose path ends as the name says.

    Raises:
        ServiceRefusedError: there is none, or more than one.
    """
    parts = PurePath(name).parts
    found = [s for s in betons if parts and s.beton.path.parts[-len(parts) :] == parts and s.digest]
    if len(found) == 1:
        return found[0]
    names = ", ".join(served.beton.path.name for served in betons)
    word = "more than one beton" if found else "no beton"
    raise ServiceRefusedError(f"it serves {word} of the name {name[:200]!r}, but {names}")


def beton_table(served: Served) -> pa.Table:
    """Labels, sizes and pages of a beton's rows, its names and its identity."""
    beton = served.beton
    fields = {
        "fingerprint": beton.fingerprint.to_dict(),
        "digest": served.digest,
        "class_names": beton.class_names,
        "has_labels": beton.has_labels,
        "page_bytes": beton.page_bytes,
    }
    # Where a row lies decides the order "pages", which is to be the same without the file.
    pages = beton.offsets // beton.page_bytes
    columns = [beton.labels, beton.widths, beton.heights, pages]
    return pa.Table.from_arrays(
        [pa.array(c, field.type) for c, field in zip(columns, SCHEMA, strict=True)],
        schema=SCHEMA.with_metadata({METADATA_KEY: json.dumps(fields).encode()}),
    )
