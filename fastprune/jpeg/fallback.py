"""JPEGs that the view decoder does not know, decoded whole by Pillow."""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from fastprune.base.errors import JpegError
from fastprune.jpeg.headers import require_few_scans
from fastprune.jpeg.native import BAD_BOX, MEANINGS


class BoxOutsideImageError(JpegError):
    """A box reaches beyond its image.

    Attributes:
        height: of the image, in pixels.
        width: of the image, in pixels.
    """

    def __init__(self, height: int, width: int):
        super().__init__(MEANINGS[BAD_BOX])
        self.height, self.width = height, width


def decode_whole(
    jpeg_bytes: bytes, *, box: tuple[int, int, int, int], size: tuple[int, int], flip: bool
) -> NDArray[np.uint8]:
    """Decode a whole image, then crop and resize it.

    Args:
        jpeg_bytes: the whole file.
        box: (top, left, height, width) in pixels.
        size: (height, width) of the result in pixels.
        flip: mirror the result left to right.

    Returns:
        (height, width, 3) uint8 in [0, 255], RGB.

    Raises:
        BoxOutsideImageError: the box reaches beyond the image.
        JpegError: Pillow cannot decode it, or would take too long or too much memory; the caller
            adds the cure.
    """
    top, left, height, width = box
    with _opened(jpeg_bytes) as image:
        if top + height > image.height or left + width > image.width:
            raise BoxOutsideImageError(image.height, image.width)
        whole = np.asarray(image.convert("RGB"))
    view = Image.fromarray(whole[top : top + height, left : left + width])
    pixels = np.asarray(view.resize(size[::-1], Image.Resampling.BILINEAR))
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels.copy()


def require_decodable(jpeg_bytes: bytes, *, height: int, width: int) -> None:
    """Decode a whole image of this height and width in pixels, and forget it.

    Raises:
        JpegError: as `decode_whole`, or its size is another.
    """
    with _opened(jpeg_bytes) as image:
        if image.size != (width, height):
            raise JpegError(
                f"Pillow finds an image of {image.height} rows and {image.width} columns, not of "
                f"{height} and {width}"
            )
        image.load()


@contextlib.contextmanager
def _opened(jpeg_bytes: bytes) -> Iterator[Image.Image]:
    """Open an image that can be decoded in bounded time and memory; name what happens then."""
    require_few_scans(jpeg_bytes)
    try:
        # Image.open would warn of a large image as a possible attack, but it is the user's own
        # data. Warnings cannot be silenced in one thread alone.
        with JpegImageFile(io.BytesIO(jpeg_bytes)) as image:
            # From here on Image.open refuses, and `convert` does. At ten bytes a pixel, which a
            # progressive image takes, the default is below 2 GB.
            most = Image.MAX_IMAGE_PIXELS
            if most and image.height * image.width > 2 * most:
                raise JpegError(
                    f"it has {image.height * image.width:,} pixels, more than the {2 * most:,} "
                    "that Pillow decodes (PIL.Image.MAX_IMAGE_PIXELS)"
                )
            yield image
    except (MemoryError, JpegError):
        raise  # the first is not the file's fault
    # What Pillow raises for a damaged file is not bounded: OSError, SyntaxError, ValueError, ...
    except Exception as error:
        raise JpegError(
            f"Pillow cannot decode the image ({type(error).__name__}: {error})"
        ) from error
