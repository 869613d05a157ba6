"""Strips of small pictures with a line of text under each."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fastprune.beton.layout import JPG
from fastprune.beton.reader import Beton
from fastprune.errors import BetonError

THUMBNAIL_SIDE = 128
_GAP = 6
_TEXT_HEIGHT = 34
_FRAME, _TEXT, _WRONG = "#4c72b0", "#333333", "#c44e52"
_BORDER = 3


@dataclass(frozen=True)
class Thumbnail:
    """What a strip shows of a row.

    Attributes:
        row: which image.
        text: first line under it, such as its score.
        remark: second line, in red, such as the teacher's wrong guess; empty for none.
        is_kept: whether it gets a frame.
    """

    row: int
    text: str
    remark: str = ""
    is_kept: bool = False


def strip_png(beton: Beton, thumbnails: Sequence[Thumbnail]) -> bytes:
    """Draw rows of a beton side by side.

    Args:
        beton: the images.
        thumbnails: what to show, from left to right.

    Returns:
        A PNG.
    """
    cell = THUMBNAIL_SIDE + 2 * _BORDER
    width = max(1, len(thumbnails)) * (cell + _GAP)
    strip = Image.new("RGB", (width, cell + _TEXT_HEIGHT), "white")
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(size=13)
    for position, thumbnail in enumerate(thumbnails):
        left = position * (cell + _GAP)
        picture = _fitted(read_image(beton, thumbnail.row))
        x, y = ((cell - side) // 2 for side in picture.size)
        if thumbnail.is_kept:
            right, bottom = left + x + picture.width, y + picture.height
            frame = (left + x - _BORDER, y - _BORDER, right + _BORDER - 1, bottom + _BORDER - 1)
            draw.rectangle(frame, fill=_FRAME)
        strip.paste(picture, (left + x, y))
        draw.text((left + _BORDER, cell), thumbnail.text, fill=_TEXT, font=font)
        draw.text((left + _BORDER, cell + 15), thumbnail.remark[:16], fill=_WRONG, font=font)
    buffer = io.BytesIO()
    strip.save(buffer, "PNG")
    return buffer.getvalue()


def read_image(beton: Beton, row: int) -> Image.Image:
    """One whole image of a beton, RGB.

    Raises:
        BetonError: the image cannot be decoded.
    """
    data: NDArray[np.uint8] = beton.image_bytes(row)
    if beton.modes[row] == JPG:
        try:
            return Image.open(io.BytesIO(data.tobytes())).convert("RGB")
        except OSError as error:
            raise BetonError(
                f"row {row:,} of {beton.path} cannot be decoded. See what is damaged: "
                f"fastprune check {beton.path} --deep"
            ) from error
    return Image.fromarray(data.reshape(beton.heights[row], beton.widths[row], 3))


def _fitted(image: Image.Image) -> Image.Image:
    """At most THUMBNAIL_SIDE pixels long; small images are enlarged to whole multiples."""
    longest = max(image.size)
    if longest > THUMBNAIL_SIDE:
        scale = THUMBNAIL_SIDE / longest
        width, height = (max(1, round(side * scale)) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    factor = THUMBNAIL_SIDE // longest
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
