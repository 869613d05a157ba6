"""The memory that a service shares with its clients: one sealed memfd, divided into equal slots.

Only the server writes to it; clients map it read-only. The seals fix its length (a file cut under a
map would end the reader with SIGBUS) and forbid new writable maps. The file has no name, so the
kernel frees it with the last process that holds it.
"""

import fcntl
import mmap
import os

import numpy as np

from fastprune.service.wire import SLOT_HEADER_BYTES

# Missing in the module `fcntl` of Python 3.11; the number is from linux/fcntl.h.
F_SEAL_FUTURE_WRITE = 0x0010
SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


def slot_bytes(image_size: int) -> int:
    """Bytes of a slot for a view (S, S, 3): its header, and whole cache lines of pixels."""
    return SLOT_HEADER_BYTES + -(-3 * image_size**2 // 64) * 64


class Slab:
    """Slots for views of one image size.

    A slot is a sequence lock without a lock: `take` changes its generation before its pixels are
    overwritten, and readers compare the generation after they copied the pixels. A reader thus
    notices that it was overtaken, and the server never waits for one.

    Attributes:
        descriptor: the memfd; clients map it read-only.
        slot_bytes: size of a slot.
        num_slots: slots in all.
        num_bytes: length of the file.
        content: (num_bytes,) uint8, the file, writable.
    """

    def __init__(self, memory_bytes: int, image_size: int):
        """Make the file; its pages are allocated when they are first written."""
        self.slot_bytes = slot_bytes(image_size)
        self.num_slots = memory_bytes // self.slot_bytes
        assert self.num_slots > 0
        self.num_bytes = self.num_slots * self.slot_bytes
        self.descriptor = os.memfd_create("fastprune-slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, self.num_bytes)
        # Our own map must exist before the seals forbid writable ones.
        self.content = np.frombuffer(mmap.mmap(self.descriptor, self.num_bytes), np.uint8)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, SEALS)
        self._generations = self.content.view(np.uint64)
        self._last_generation = 0
        self._num_touched = 0  # slots from here on were never used, and have no pages yet
        self._free: list[int] = []

    def take(self) -> int | None:
        """Take a free slot, and give it a new generation.

        Returns:
            Its offset in the slab; None if every slot is taken.
        """
        if self._free:
            offset = self._free.pop()
        elif self._num_touched < self.num_slots:
            offset = self._num_touched * self.slot_bytes
            self._num_touched += 1
        else:
            return None
        self._last_generation += 1
        self._generations[offset // 8] = self._last_generation
        return offset

    def give_back(self, offset: int) -> None:
        """Make a slot free."""
        self._free.append(offset)

    def generation(self, offset: int) -> int:
        """Read the generation of a slot."""
        return int(self._generations[offset // 8])

    def close(self) -> None:
        """Close the descriptor; the memory is freed with the last map of it."""
        os.close(self.descriptor)
