"""What can go wrong with a file while it is read, found out and named."""

import pyarrow.compute as pc

from fastprune.beton.reader import Beton
from fastprune.errors import LoadingError


class FileWatch:
    """Notices that an open beton was cut short, replaced or removed.

    A file that is cut between this check and the reading of a page still ends the process with
    SIGBUS; no check from outside the kernel can close that gap.
    """

    def __init__(self, beton: Beton):
        self._path = beton.path
        self._opened = beton.path.stat()
        self._num_bytes = len(beton.content)

    def check(self) -> None:
        """Look at the file as it is now.

        Raises:
            LoadingError: it is not the file that was opened any more.
        """
        try:
            now = self._path.stat()
        except OSError as error:
            raise LoadingError(
                f"{self._path} cannot be found any more ({error.strerror}). Put it back and start "
                "the loader again."
            ) from error
        if (now.st_dev, now.st_ino) != (self._opened.st_dev, self._opened.st_ino):
            raise LoadingError(
                f"{self._path} was replaced while it was read. Start the loader again."
            )
        if now.st_size < self._num_bytes:
            raise LoadingError(
                f"{self._path} was cut from {self._num_bytes:,} to {now.st_size:,} bytes while it "
                "was read. Get a whole copy of it, or convert the images again."
            )


def undecodable(beton: Beton, row: int, reason: str) -> LoadingError:
    """The error for a row whose image cannot be decoded."""
    return LoadingError(
        f"row {row:,} of {beton.path}{_source(beton, row)} cannot be decoded: {reason}. Leave such "
        f'rows out with on_error="skip", or find all of them with `fastprune check {beton.path} '
        "--deep` and convert the images again."
    )


def _source(beton: Beton, row: int) -> str:
    """The file that a row was made from, where the manifest knows it."""
    if beton.manifest is None:
        return ""
    lines = beton.manifest.table(["row", "source"])
    line = lines.filter(pc.equal(lines["row"], row))
    return f" (from {line['source'][0]})"
