"""Views of the JPEGs that the view decoder does not know, decoded whole by Pillow."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from fastprune.errors import JpegError
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
        JpegError: Pillow cannot decode it, or would take too long; the caller says what to do.
    """
    top, left, height, width = box
    require_few_scans(jpeg_bytes)
    try:
        # Image.open would warn of a large image, which is no attack: the user's own data set holds
        # it. Warnings cannot be silenced in one thread alone.
        with JpegImageFile(io.BytesIO(jpeg_bytes)) as image:
            if top + height > image.height or left + width > image.width:
                raise BoxOutsideImageError(image.height, image.width)
            whole = np.asarray(image.convert("RGB"))
    except (MemoryError, BoxOutsideImageError):
        raise  # the file is not to blame
    # What Pillow raises for a damaged file is not bounded: OSError, SyntaxError, ValueError, ...
    except Exception as error:
        raise JpegError(
            f"Pillow cannot decode the image ({type(error).__name__}: {error})"
        ) from error
    view = Image.fromarray(whole[top : top + height, left : left + width])
    pixels = np.asarray(view.resize(size[::-1], Image.Resampling.BILINEAR))
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels.copy()
