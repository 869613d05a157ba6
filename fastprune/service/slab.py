"""The memory that a service shares with its clients: one sealed file in memory, cut into places.

The slab is divided into extents. An extent holds places of one size, for views of one image size;
an empty extent may be cut anew for another. The file is sealed: nobody can change its length, and
nobody who maps it later can write it. It has no name, so it ends with its last process.
"""

import fcntl
import mmap
import os
import secrets
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from fastprune.base.errors import InvalidValueError
from fastprune.service.wire import GUARD_BYTES

EXTENT_BYTES = 4 << 20
# Missing in the module `fcntl` of Python 3.11; the number is of linux/fcntl.h.
F_SEAL_FUTURE_WRITE = 0x0010
SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


def place_bytes(image_size: int) -> int:
    """Bytes of a place for a view (S, S, 3), its guard included: a multiple of a cache line."""
    return GUARD_BYTES + -(-3 * image_size**2 // 64) * 64


@dataclass(eq=False)
class Extent:
    """A piece of the slab.

    Attributes:
        start: its first byte in the slab.
        place_bytes: size of its places; 0 while it is not cut.
        num_places: places it is cut into.
        num_free: places of it that hold nothing.
        is_retiring: whether its places are given out no more, so that it becomes empty.
    """

    start: int
    place_bytes: int = 0
    num_places: int = 0
    num_free: int = 0
    is_retiring: bool = False

    @property
    def offsets(self) -> range:
        """Where its places lie in the slab."""
        return range(self.start, self.start + self.num_places * self.place_bytes, self.place_bytes)


class Slab:
    """Places for views in a sealed memory file.

    Attributes:
        descriptor: of the file; clients map it read-only.
        num_bytes: length of the file.
        extents: all of it.
        num_extents: extents that are cut, by the size of their places in bytes.
        num_retiring: extents that become empty.
        content: (num_bytes,) uint8, the file, writable.
    """

    def __init__(self, memory_bytes: int):
        """Make the file; its pages come into being when they are first written.

        Raises:
            InvalidValueError: the memory holds no extent.
        """
        count = memory_bytes // EXTENT_BYTES
        if count == 0:
            raise InvalidValueError(
                f"memory must be at least {EXTENT_BYTES:,} bytes, not {memory_bytes:,}."
            )
        self.num_bytes = count * EXTENT_BYTES
        self.descriptor = os.memfd_create("fastprune-slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, self.num_bytes)
        self.content = np.frombuffer(mmap.mmap(self.descriptor, self.num_bytes), np.uint8)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, SEALS)
        self.extents = [Extent(i * EXTENT_BYTES) for i in range(count)]
        self.num_extents: Counter[int] = Counter()
        self.num_retiring = 0
        self._uncut = self.extents[::-1]
        self._free: defaultdict[int, list[int]] = defaultdict(list)  # by size of the place
        self._generations = self.content.view(np.uint64)
        # Begins anywhere, so that no pixels of an earlier cut look like a generation.
        self._next_generation = secrets.randbits(62)

    def take(self, size: int) -> int | None:
        """Give out a free place of so many bytes.

        Its generation changes, so that whoever still reads what was there before finds out.

        Returns:
            Its offset in the slab, or None while there is none.
        """
        if not self._free[size]:
            if not self._uncut:
                return None
            extent = self._uncut.pop()
            extent.place_bytes = size
            self.num_extents[size] += 1
            extent.num_places = extent.num_free = EXTENT_BYTES // size
            # The first place is the last in the list, and given out first.
            self._free[size] = list(reversed(extent.offsets))
        offset = self._free[size].pop()
        self.extent_at(offset).num_free -= 1
        self._next_generation += 1
        self._generations[offset // 8] = self._next_generation
        return offset

    def give_back(self, offset: int) -> None:
        """Make a place free."""
        extent = self.extent_at(offset)
        extent.num_free += 1
        if not extent.is_retiring:
            self._free[extent.place_bytes].append(offset)
        elif extent.num_free == extent.num_places:
            self._uncut_again(extent)

    def retire(self, extent: Extent) -> None:
        """Give out no more places of an extent; once all are back, it can be cut anew."""
        extent.is_retiring = True
        self.num_retiring += 1
        free = self._free[extent.place_bytes]
        free[:] = [offset for offset in free if self.extent_at(offset) is not extent]
        if extent.num_free == extent.num_places:
            self._uncut_again(extent)

    def num_free(self, size: int) -> int:
        """Places of so many bytes that can be given out."""
        return len(self._free[size]) + len(self._uncut) * (EXTENT_BYTES // size)

    def generation(self, offset: int) -> int:
        """The number of the giving out of a place."""
        return int(self._generations[offset // 8])

    def extent_at(self, offset: int) -> Extent:
        """The extent that a place lies in."""
        return self.extents[offset // EXTENT_BYTES]

    def close(self) -> None:
        """Close the descriptor; the memory goes with the last map of it."""
        os.close(self.descriptor)

    def _uncut_again(self, extent: Extent) -> None:
        self.num_extents[extent.place_bytes] -= 1
        self.num_retiring -= 1
        extent.place_bytes, extent.is_retiring = 0, False
        self._uncut.append(extent)
