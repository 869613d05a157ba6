"""Memory of batches that comes back when the last one who held them lets go."""

import contextlib
import math
import weakref

import numpy as np
import torch


class BatchMemory:
    """Lends tensors on the CPU whose memory comes back when the last reference to it goes.

    The system hands out large blocks page by page on first touch, which takes longer than filling
    them. A batch that the caller still holds, or a view of it, is never given out again.
    """

    def __init__(self, *, most_free: int = 4):
        self._free: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []
        self._most_free = most_free

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized tensor.

        Args:
            shape: of the tensor.
            dtype: of the tensor.

        Returns:
            A contiguous tensor on the CPU.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        block = self._fitting(num_bytes)
        # The tensor holds this array, which dies with the tensor's storage.
        lent = block[:num_bytes]
        weakref.finalize(lent, self._give_back, block).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)

    def _fitting(self, num_bytes: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
        """Return a free block that is large enough, or a new one."""
        # Asked for before it is looked at: iterators in other threads take from the list, too.
        with contextlib.suppress(IndexError):
            while len(block := self._free.pop()) < num_bytes:
                pass
            return block
        return np.empty(num_bytes, np.uint8)

    def _give_back(self, block: "np.ndarray[tuple[int], np.dtype[np.uint8]]") -> None:
        """Keep a block for the next batch, unless there are plenty."""
        if len(self._free) < self._most_free:
            self._free.append(block)
