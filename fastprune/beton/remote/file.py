"""An object of a store as a read-only file, for readers of tar and Parquet."""

import io
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

from fastprune.beton.remote.store import ListedObject, Store

# Listing a tar reads its headers, which lie between the images: the whole tar is read, in such
# blocks, unless an image is larger.
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class RemoteFile:
    """An object, with the names that a local `Path` has."""

    store: Store = field(compare=False)
    entry: ListedObject

    @property
    def name(self) -> str:
        """The last part of its name."""
        return self.entry.name.rpartition("/")[2]

    @property
    def parent(self) -> str:
        """The URL that it lies below."""
        return str(self).rpartition("/")[0]

    def __str__(self) -> str:
        return f"{self.store.url}/{self.entry.name}"

    def stat(self) -> ListedObject:
        """Size and time of its last change."""
        return self.entry

    def open(self, mode: Literal["rb"]) -> BinaryIO:
        """Open it; bytes are fetched in blocks."""
        assert mode == "rb"
        return io.BufferedReader(_Ranges(self.store, self.entry), _BLOCK_BYTES)


class _Ranges(io.RawIOBase):
    """An object as a file: each read is one request, which `Store` retries."""

    def __init__(self, store: Store, entry: ListedObject):
        self._store, self._entry, self._at = store, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._entry.st_size}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        # 0 at the end of the object: BufferedReader takes it for the end of the file.
        size = max(0, min(len(buffer), self._entry.st_size - self._at))
        if size:
            buffer[:size] = self._store.read(self._entry.name, self._at, size)
            self._at += size
        return size
