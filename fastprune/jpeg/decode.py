"""`decode_view`: bytes and a box in, a resized crop in RGB out."""

import operator
import threading
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fastprune.base.errors import InvalidValueError, JpegError
from fastprune.jpeg.fallback import BoxOutsideImageError, decode_whole, require_decodable
from fastprune.jpeg.frame import HEIGHT, WIDTH, read_frame
from fastprune.jpeg.headers import MAX_SIDE, is_jpeg
from fastprune.jpeg.native import BAD_BOX, LACKS_ROOM, MEANINGS, OK, UNSUPPORTED, entry
from fastprune.jpeg.scan import prepare_tables, read_scan
from fastprune.jpeg.view import read_view
from fastprune.jpeg.workspace import Workspace, make_workspace, workspace_bytes

_kept = threading.local()
# A 4000 x 3000 photograph seen whole needs about 40 MB, an ImageNet view about 2.
_MOST_KEPT_BYTES = 16 << 20

_CURE = "Get the file again, or leave it out."


def decode_view(
    jpeg_bytes: bytes | NDArray[np.uint8],
    *,
    box: tuple[int, int, int, int],
    size: tuple[int, int] = (224, 224),
    flip: bool = False,
) -> NDArray[np.uint8]:
    """Decode a crop of a JPEG, resized, without decoding what the crop does not show.

    Baseline JPEGs of 8 bits in gray or YCbCr (4:4:4, 4:2:2, 4:4:0, 4:2:0) are decoded by compiled
    code of our own, any others whole by Pillow. EXIF orientation is ignored. The first call in a
    process loads the compiled code, the first on a machine compiles it.

    Args:
        jpeg_bytes: the whole file; bytes, or (n,) uint8.
        box: (top, left, height, width) in pixels, inside the image.
        size: (height, width) of the result in pixels.
        flip: mirror the result left to right.

    Returns:
        (height, width, 3) uint8 in [0, 255], RGB: the same as Pillow's
        `crop(box).resize(size, BILINEAR)` but for rounding and chroma interpolation.

    Raises:
        InvalidValueError: the box is empty or not inside the image, or a number is out of range.
        JpegError: the bytes are not a JPEG, or the part that the crop needs is damaged or missing.

    Thread safety: any number of threads may call this at once; each keeps a workspace.
    """
    box, size = _checked(box, size)
    try:
        return _decoded(jpeg_bytes, box, size, flip)
    except JpegError as error:
        raise JpegError(f"{error}. {_CURE}") from error


def require_whole(jpeg_bytes: bytes, *, height: int, width: int) -> None:
    """Decode all of an image, which finds what the loader would refuse in any view of it.

    Needs little more memory than the file where the view decoder knows its kind: nothing but the
    entropy-coded data can be damaged, so no pixel is made.

    Args:
        jpeg_bytes: the whole file.
        height: in pixels, in [1, 65500].
        width: in pixels, in [1, 65500].

    Raises:
        JpegError: its data is damaged or missing, or its size differs; the caller adds the
            cure.
    """
    data = _as_array(jpeg_bytes)
    work = make_workspace(file_bytes=len(data), width=1, height=1, output_height=1, output_width=1)
    code = _read_whole(data, work)
    if code == UNSUPPORTED:
        require_decodable(jpeg_bytes, height=height, width=width)
    elif code != OK:
        raise JpegError(f"the image cannot be decoded: {MEANINGS[code]}")
    elif (work.frame[HEIGHT], work.frame[WIDTH]) != (height, width):
        raise JpegError(
            f"it has {work.frame[HEIGHT]} rows and {work.frame[WIDTH]} columns, not {height} and "
            f"{width}"
        )


def _as_array(jpeg_bytes: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """View a JPEG's bytes as an array, always read-only: Numba compiles for either kind."""
    data = np.frombuffer(memoryview(cast(bytes, jpeg_bytes)).toreadonly(), np.uint8)
    if not is_jpeg(data[:3].tobytes()):
        raise JpegError(
            "the bytes do not start with a JPEG's marker (FF D8 FF): decode_view takes JPEGs alone"
        )
    return data


def _decoded(
    jpeg_bytes: bytes | NDArray[np.uint8],
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    flip: bool,
) -> NDArray[np.uint8]:
    """A view, see `decode_view`."""
    data = _as_array(jpeg_bytes)
    pixels = np.empty((*size, 3), np.uint8)
    work = _workspace(len(data), box, size)
    code = read_box(data, work, np.array(box, np.int64), bool(flip), pixels)
    if code == UNSUPPORTED:
        try:
            return decode_whole(data.tobytes(), box=box, size=size, flip=flip)
        except BoxOutsideImageError as error:
            raise _outside(box, error.height, error.width) from error
    if code == BAD_BOX:
        raise _outside(box, int(work.frame[HEIGHT]), int(work.frame[WIDTH]))
    assert code != LACKS_ROOM
    if code != OK:
        raise JpegError(f"the image cannot be decoded in box {box}: {MEANINGS[code]}")
    return pixels


@entry()
def _read_whole(data: Any, work: Any) -> Any:
    """Read all of an image without making pixels; return a code."""
    code = read_frame(data, work)
    if code == OK:
        code = prepare_tables(work)
    return read_scan(data, work) if code == OK else code


@entry()
def read_box(data: Any, work: Any, box: Any, flip: Any, pixels: Any) -> Any:
    """Fill (height, width, 3) pixels with the view of a box; return a code."""
    output_height, output_width, _ = pixels.shape
    return read_view(
        data,
        work,
        box[0],
        box[1],
        box[2],
        box[3],
        output_height,
        output_width,
        flip,
        pixels.reshape(-1),
    )


def _checked(box: Any, size: Any) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """Box and size as tuples of integers, in range."""
    try:
        top, left, height, width = (operator.index(side) for side in box)
        output_height, output_width = (operator.index(side) for side in size)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(
            f"box ({box}) must be four integers (top, left, height, width) and size ({size}) two, "
            "(height, width)"
        ) from error
    if min(top, left) < 0 or min(height, width) < 1:
        raise InvalidValueError(
            f"box {(top, left, height, width)} must have top and left >= 0, height and width >= 1"
        )
    if max(top, left, height, width) > MAX_SIDE:
        raise InvalidValueError(
            f"box {(top, left, height, width)} reaches beyond {MAX_SIDE}, where a JPEG's sides end"
        )
    if not (1 <= output_height <= MAX_SIDE and 1 <= output_width <= MAX_SIDE):
        raise InvalidValueError(
            f"size ({output_height}, {output_width}) must be two integers in [1, {MAX_SIDE}]"
        )
    return (top, left, height, width), (output_height, output_width)


def _outside(box: tuple[int, int, int, int], height: int, width: int) -> InvalidValueError:
    """The error for a box that reaches beyond its image."""
    return InvalidValueError(
        f"box (top, left, height, width) = {box} is not inside the image of {height} rows and "
        f"{width} columns: top + height must be <= {height}, left + width <= {width}"
    )


def _workspace(file_bytes: int, box: tuple[int, int, int, int], size: tuple[int, int]) -> Workspace:
    """Return this thread's workspace, replaced if it is too small; a large one is not kept."""
    needed = (file_bytes, box[3], box[2])
    room = (0, 0, 0)
    if getattr(_kept, "size", None) == size:
        room = _kept.room
        if all(n <= r for n, r in zip(needed, room, strict=True)):
            kept: Workspace = _kept.work
            return kept
    # Room for the longest file and the widest and the tallest box so far, unless these, which need
    # not be of one image, are too much together.
    room = (max(needed[0], room[0]), max(needed[1], room[1]), max(needed[2], room[2]))
    if workspace_bytes(*room, *size) > _MOST_KEPT_BYTES:
        room = needed
    file_bytes, width, height = room
    work = make_workspace(
        file_bytes=file_bytes,
        width=width,
        height=height,
        output_height=size[0],
        output_width=size[1],
    )
    # Not before there was memory for it.
    if workspace_bytes(*room, *size) <= _MOST_KEPT_BYTES:
        _kept.work, _kept.size, _kept.room = work, size, room
    return work
