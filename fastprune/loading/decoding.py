"""Rows of a beton into pixels, in one thread: by the view decoder, else whole and by Pillow."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastprune.beton import layout
from fastprune.beton.layout import JPG
from fastprune.errors import JpegError
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
from fastprune.loading import augment
from fastprune.loading.augment import FLIP, HEIGHT, LEFT, SHIFT_DOWN, SHIFT_RIGHT, TOP, WIDTH

MOST_KEPT_BYTES = 16 << 20


# The columns of a view and the modes of a row are compiled in as numbers.
_compiled = entry(Path(augment.__file__), Path(layout.__file__), Path(__file__))


@_compiled
def shift(image: Any, view: Any) -> None:
    """Move (S, S, 3) pixels, flipped already, as their view says; what comes in is black."""
    down, right = view[SHIFT_DOWN], view[SHIFT_RIGHT]
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
    images: Any,
    codes: Any,
    views: Any,
    offsets: Any,
    sizes: Any,
    modes: Any,
    sides: Any,
    work: Any,
) -> None:
    """Fill `images` (n, S, S, 3) with the views of n rows and `codes` (n,) with a code each.

    `sides` (n, 2) are the height and width that the beton says. Raw rows are unsupported.
    """
    output = images.shape[1]
    for i in range(len(codes)):
        codes[i] = UNSUPPORTED
        if modes[i] != JPG:
            continue
        view = views[i]
        codes[i] = read_view(
            content[offsets[i] : offsets[i] + sizes[i]],
            work,
            np.int64(view[TOP]),
            np.int64(view[LEFT]),
            np.int64(view[HEIGHT]),
            np.int64(view[WIDTH]),
            output,
            output,
            view[FLIP] != 0,
            images[i].reshape(-1),
        )
        if codes[i] == OK or codes[i] == BAD_BOX or codes[i] == LACKS_ROOM:
            height, width = work.frame[FRAME_HEIGHT], work.frame[FRAME_WIDTH]
            if height != sides[i, 0] or width != sides[i, 1]:
                codes[i] = OTHER_SIZE
        if codes[i] == OK:
            shift(images[i], view)


def decode_jpeg_whole(
    jpeg_bytes: bytes, sides: tuple[int, int], view: NDArray[np.int32], image: NDArray[np.uint8]
) -> str:
    """Fill `image` (S, S, 3) with the view of a JPEG that the view decoder does not know.

    Args:
        jpeg_bytes: the whole file.
        sides: height and width in pixels that it must have.
        view: (7,), see `augment.Recipe.views`.
        image: (S, S, 3) uint8.

    Returns:
        Its kind, such as "progressive".

    Raises:
        JpegError: it is damaged, no JPEG, or of another size.
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


def resize_raw(
    pixels: NDArray[np.uint8], view: NDArray[np.int32], image: NDArray[np.uint8]
) -> None:
    """Fill `image` (S, S, 3) with the view of an image's pixels (height, width, 3)."""
    top, left, height, width = view[[TOP, LEFT, HEIGHT, WIDTH]].tolist()
    box = Image.fromarray(pixels[top : top + height, left : left + width])
    resized = np.asarray(box.resize(image.shape[1::-1], Image.Resampling.BILINEAR))
    image[:] = resized[:, ::-1] if view[FLIP] else resized
    shift(image, view)


class Workspaces:
    """One thread's workspace, grown for larger views; what would take much memory is not kept."""

    def __init__(self, image_size: int):
        self._image_size = image_size
        self._kept: Workspace | None = None
        self._room: tuple[int, ...] = (0, 0, 0)

    def num_bytes(self, needed: tuple[int, ...]) -> int:
        """About how much memory a view (file bytes, height, width of its box) takes."""
        file_bytes, height, width = needed
        return 5 * file_bytes + height * (3 * width + 2 * self._image_size)

    def holding(self, needed: tuple[int, ...]) -> Workspace:
        """A workspace for views up to these (file bytes, height, width of the box)."""
        if self._kept is not None and all(map(int.__le__, needed, self._room)):
            return self._kept
        room = tuple(map(max, needed, self._room))
        if self.num_bytes(room) > MOST_KEPT_BYTES:
            room = needed
        file_bytes, height, width = room
        work = make_workspace(
            file_bytes=file_bytes,
            height=height,
            width=width,
            output_height=self._image_size,
            output_width=self._image_size,
        )
        if self.num_bytes(room) <= MOST_KEPT_BYTES:
            self._kept, self._room = work, room
        return work
