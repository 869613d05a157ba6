"""A mutated beton is opened rightly or refused with our error, in no more memory than its size."""

import tracemalloc

import numpy as np
import pytest

from fastprune import check_beton, open_beton
from fastprune.base.errors import BetonError
from fastprune.beton import layout
from tests.beton.damage import write_plain_beton

_STRIKING = np.array([0, 1, 2, 0x7F, 0x80, 0xFF], np.uint8)


def mutate(content, generator):
    """Change a few bytes of the header, the fields, the metadata or the table; sometimes cut."""
    content = content.copy()
    header = content[: layout.HEADER.itemsize].view(layout.HEADER)[0]
    metadata = layout.metadata_start(int(header["num_fields"]))
    table = int(header["alloc_table_ptr"])
    regions = ((0, 24), (24, metadata), (metadata, metadata + 6 * 72), (table, len(content)))
    for _ in range(generator.integers(1, 5)):
        start, end = regions[generator.integers(4)]
        length = int(generator.choice([1, 1, 2, 4, 8]))
        place = int(generator.integers(start, max(start + 1, end - length)))
        value = generator.choice(_STRIKING) if generator.random() < 0.5 else generator.integers(256)
        content[place : place + length] = value
    kind = generator.random()
    if kind < 0.05:
        content = content[: generator.integers(len(content))]
    elif kind < 0.1:
        content = np.concatenate([content, generator.integers(0, 256, 48).astype(np.uint8)])
    return content


def hammer(path, mutations, seed):
    original = np.fromfile(path, np.uint8)
    generator = np.random.default_rng(seed)
    opened = 0
    tracemalloc.start()
    try:
        for number in range(mutations):
            mutated = mutate(original, generator)
            path.unlink()  # an earlier mutation may still be mapped
            mutated.tofile(path)
            file_bytes = len(mutated)
            del mutated
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                beton = open_beton(path)
            except BetonError:
                assert check_beton(path)
            else:
                opened += 1
                assert all(len(beton.image_bytes(row)) for row in range(beton.num_rows))
                check_beton(path, deep=number % 20 == 0)
            allowed = max(file_bytes, 1 << 20)
            assert tracemalloc.get_traced_memory()[1] - before <= allowed
    finally:
        tracemalloc.stop()
    assert 0 < opened < mutations


def test_a_thousand_mutations_are_opened_or_refused(tmp_path):
    hammer(write_plain_beton(tmp_path / "a.beton"), 1000, seed=0)


@pytest.mark.full
def test_ten_thousand_mutations_are_opened_or_refused(tmp_path):
    hammer(write_plain_beton(tmp_path / "a.beton"), 10_000, seed=1)
