"""Rows of a beton into pixels: by the view decoder, or whole and by Pillow where it cannot."""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastprune.base.errors import JpegError
from fastprune.beton import layout
from fastprune.beton.layout import JPG
from fastprune.decoding import views as columns
from fastprune.decoding.views import FLIP, HEIGHT, LEFT, SHIFT_DOWN, SHIFT_RIGHT, TOP, WIDTH
from fastprune.jpeg.fallback import BoxOutsideImageError, decode_whole
from fastprune.jpeg.frame import HEIGHT as FRAME_HEIGHT
from fastprune.jpeg.frame import WIDTH as FRAME_WIDTH
from fastprune.jpeg.headers import read_header
from fastprune.jpeg.native import (
    BAD_BOX,
    LACKS_ROOM,
    MEANINGS,
    OK,
    OTHER_SIZE,
    UNSUPPORTED,
    entry,
)
from fastprune.jpeg.view import read_view
from fastprune.jpeg.workspace import Workspace, make_workspace

# A thread keeps one workspace. A 4000 x 3000 photograph seen whole needs about 30 MB, a usual
# ImageNet view below 2 MB: what is larger is rare, and is given back at once.
_MOST_KEPT_BYTES = 16 << 20


@dataclass(frozen=True)
class StoredImages:
    """The location of the images of n rows.

    Attributes:
        content: uint8, all bytes of the file, or of a cache of its pages; not writable.
        offsets: (n,) int64, where each image begins in `content`.
        sizes: (n,) int64, in bytes.
        modes: (n,) uint8, 0 for JPEG bytes, 1 for raw RGB pixels.
        sides: (n, 2), height and width in pixels as the beton lists them.
    """

    content: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    modes: NDArray[np.uint8]
    sides: NDArray[np.uint16]

    def __getitem__(self, part: slice) -> "StoredImages":
        return StoredImages(
            self.content,
            self.offsets[part],
            self.sizes[part],
            self.modes[part],
            self.sides[part],
        )


@dataclass
class Outcome:
    """The result of decoding a batch.

    Attributes:
        faults: why a row cannot be used, by its position in the batch; its pixels mean nothing.
        whole_kinds: the kind of each image that was decoded whole, such as "progressive".
    """

    faults: dict[int, str] = field(default_factory=dict)
    whole_kinds: list[str] = field(default_factory=list)


class RowDecoder:
    """Decodes views of stored images; any number of threads may call it at once."""

    def __init__(self, image_size: int):
        self._image_size = image_size
        # Of each thread; what it holds goes when the thread ends.
        self._kept = threading.local()

    def decode(
        self, stored: StoredImages, views: NDArray[np.int32], images: NDArray[np.uint8]
    ) -> Outcome:
        """Decode n rows, without the GIL where the view decoder can.

        Args:
            stored: where the rows lie.
            views: (n, 7), see `crops.CropPolicy.views`.
            images: (n, S, S, 3) uint8, C-contiguous; filled.

        Returns:
            Which rows failed and why, at positions in [0, n).
        """
        starts = np.arange(len(views)) * (3 * self._image_size**2)
        return self.decode_into(stored, views, images.reshape(-1), starts)

    def decode_into(
        self,
        stored: StoredImages,
        views: NDArray[np.int32],
        pixels: NDArray[np.uint8],
        starts: NDArray[np.int64],
    ) -> Outcome:
        """Decode n rows to places that may lie apart; see `decode`.

        Args:
            stored: where the rows lie.
            views: (n, 7), see `crops.CropPolicy.views`.
            pixels: uint8, the memory; S * S * 3 bytes of it are filled for each row.
            starts: (n,) int64, where the pixels of each row begin in it.
        """
        side = self._image_size
        outcome = Outcome()
        codes = np.full(len(views), UNSUPPORTED, np.int32)
        needed = np.stack([stored.sizes, views[:, HEIGHT], views[:, WIDTH]], axis=1)
        pieces = [slice(0, len(views))]
        if self._num_bytes(_largest(needed)) > _MOST_KEPT_BYTES:
            # One by one, so that the longest and the widest of different images need not fit at
            # once.
            pieces = [slice(i, i + 1) for i in range(len(views))]
        for piece in pieces:
            some = stored[piece]
            if (some.modes == JPG).any():
                work = self._workspace(_largest(needed[piece]))
                decode_rows(
                    some.content,
                    pixels,
                    starts[piece],
                    side,
                    codes[piece],
                    views[piece],
                    some.offsets,
                    some.sizes,
                    some.modes,
                    some.sides,
                    work,
                )
        for i in np.flatnonzero(codes != OK).tolist():
            image = pixels[starts[i] : starts[i] + 3 * side**2].reshape(side, side, 3)
            try:
                self._settle(stored, i, int(codes[i]), views[i], image, outcome)
            except JpegError as error:
                outcome.faults[i] = str(error).rstrip(".")
        return outcome

    def _settle(
        self,
        stored: StoredImages,
        i: int,
        code: int,
        view: NDArray[np.int32],
        image: NDArray[np.uint8],
        outcome: Outcome,
    ) -> None:
        """Decode a row that the view decoder does not know.

        Raises:
            JpegError: it cannot be used.
        """
        start = int(stored.offsets[i])
        data = stored.content[start : start + int(stored.sizes[i])]
        height, width = map(int, stored.sides[i])
        if stored.modes[i] != JPG:
            _resize_raw(data.reshape(height, width, 3), view, image)
        elif code == UNSUPPORTED:
            kind = _decode_jpeg_whole(data.tobytes(), (height, width), view, image)
            outcome.whole_kinds.append(kind)
        else:
            raise JpegError(MEANINGS[code])

    def _num_bytes(self, needed: tuple[int, ...]) -> int:
        """Estimate the memory of a workspace for views of (file bytes, box height, box width)."""
        file_bytes, height, width = needed
        return 5 * file_bytes + height * (3 * width + 2 * self._image_size)

    def _workspace(self, needed: tuple[int, ...]) -> Workspace:
        """Return this thread's workspace, grown for larger views up to a limit."""
        room: tuple[int, ...] = getattr(self._kept, "room", (0, 0, 0))
        if all(map(int.__le__, needed, room)):
            kept: Workspace = self._kept.work
            return kept
        room = tuple(map(max, needed, room))
        if self._num_bytes(room) > _MOST_KEPT_BYTES:
            room = needed
        file_bytes, height, width = room
        work = make_workspace(
            file_bytes=file_bytes,
            height=height,
            width=width,
            output_height=self._image_size,
            output_width=self._image_size,
        )
        if self._num_bytes(room) <= _MOST_KEPT_BYTES:
            self._kept.work, self._kept.room = work, room
        return work


def _largest(needed: NDArray[np.int64]) -> tuple[int, ...]:
    """Return the largest of each column."""
    return tuple(needed.max(axis=0).tolist())


# The columns of a view and the modes of a row are compiled in as numbers.
_compiled = entry(Path(columns.__file__), Path(layout.__file__), Path(__file__))


@_compiled
def shift(image: Any, view: Any) -> None:
    """Shift (S, S, 3) flipped pixels by their view; black comes in at the border."""
    down, right = view[SHIFT_DOWN], view[SHIFT_RIGHT]
    # Views shift first and flip then, but these pixels are flipped already.
    if view[FLIP]:
        right = -right
    if down == 0 and right == 0:
        return
    rows, columns, _ = image.shape
    for i in range(rows):
        # In place: what a pixel is taken from must not have been overwritten yet.
        y = rows - 1 - i if down > 0 else i
        for j in range(columns):
            x = columns - 1 - j if right > 0 else j
            inside = 0 <= y - down < rows and 0 <= x - right < columns
            for channel in range(3):
                image[y, x, channel] = image[y - down, x - right, channel] if inside else 0


@_compiled
def decode_rows(
    content: Any,
    pixels: Any,
    starts: Any,
    side: Any,
    codes: Any,
    views: Any,
    offsets: Any,
    sizes: Any,
    modes: Any,
    sides: Any,
    work: Any,
) -> None:
    """Fill `pixels` from each of `starts` (n,) on with a row's view, and `codes` (n,) with a code.

    A view has `side` rows and columns. `sides` (n, 2) are the heights and widths in the beton.
    Raw rows are unsupported.
    """
    for i in range(len(codes)):
        codes[i] = UNSUPPORTED
        if modes[i] != JPG:
            continue
        view = views[i]
        image = pixels[starts[i] : starts[i] + 3 * side * side]
        codes[i] = read_view(
            content[offsets[i] : offsets[i] + sizes[i]],
            work,
            np.int64(view[TOP]),
            np.int64(view[LEFT]),
            np.int64(view[HEIGHT]),
            np.int64(view[WIDTH]),
            side,
            side,
            view[FLIP] != 0,
            image,
        )
        # Only then has the header been read. A box drawn for one size shows another part of an
        # image of another size, or none of it.
        if codes[i] == OK or codes[i] == BAD_BOX or codes[i] == LACKS_ROOM:
            height, width = work.frame[FRAME_HEIGHT], work.frame[FRAME_WIDTH]
            if height != sides[i, 0] or width != sides[i, 1]:
                codes[i] = OTHER_SIZE
        if codes[i] == OK:
            shift(image.reshape(side, side, 3), view)


def _decode_jpeg_whole(
    jpeg_bytes: bytes, sides: tuple[int, int], view: NDArray[np.int32], image: NDArray[np.uint8]
) -> str:
    """Fill `image` (S, S, 3) with a view by Pillow; return the JPEG's kind.

    Raises:
        JpegError: it is damaged, no JPEG, or not of these sides (height, width).
    """
    header = read_header(jpeg_bytes)
    if (header.height, header.width) != sides:
        raise JpegError(MEANINGS[OTHER_SIZE])
    box: Any = tuple(view[[TOP, LEFT, HEIGHT, WIDTH]].tolist())
    try:
        image[:] = decode_whole(jpeg_bytes, box=box, size=image.shape[:2], flip=bool(view[FLIP]))
    except BoxOutsideImageError as error:
        raise JpegError(MEANINGS[OTHER_SIZE]) from error
    shift(image, view)
    if header.process != "baseline":
        return header.process
    return header.color.upper() if header.color not in ("gray", "ycbcr") else "of unusual layout"


def _resize_raw(
    pixels: NDArray[np.uint8], view: NDArray[np.int32], image: NDArray[np.uint8]
) -> None:
    """Fill `image` (S, S, 3) with the view of an image's pixels (height, width, 3)."""
    top, left, height, width = view[[TOP, LEFT, HEIGHT, WIDTH]].tolist()
    box = Image.fromarray(pixels[top : top + height, left : left + width])
    resized = np.asarray(box.resize(image.shape[1::-1], Image.Resampling.BILINEAR))
    image[:] = resized[:, ::-1] if view[FLIP] else resized
    shift(image, view)
