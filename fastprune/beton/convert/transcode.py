"""One image on its way into a beton: a JPEG as it is or rewritten without loss, else made one."""

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fastprune.base.errors import ConversionError, JpegError
from fastprune.jpeg.headers import MAX_SIDE, JpegHeader, is_jpeg, read_header
from fastprune.settings import ImageSettings

COPIED, TRANSCODED, SKIPPED, FOUND, REWRITTEN = range(5)
ACTIONS = ("copied", "transcoded", "skipped", "found", "rewritten")

#: In smaller files the markers cost more than they save; measured in docs/decisions/0009.
FEWEST_BYTES_TO_REWRITE = 16 << 10

# EPS and the like are left out on purpose: reading them runs other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_GRAY_MODES = ("1", "L", "LA", "La")

_CURE = "Get the file again, or leave it out with --on-error skip"

Content = bytes | Image.Image | NDArray[np.uint8]


class CompilationError(ConversionError):
    """The compiled decoder cannot be loaded, compiled or kept; no image is to blame."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image as it will be stored.

    Attributes:
        data: a whole JPEG file.
        width: in pixels.
        height: in pixels.
        action: `COPIED`, `REWRITTEN` or `TRANSCODED`.
        reason: why it was transcoded, or copied although a rewrite was asked for; else empty.
    """

    data: bytes
    width: int
    height: int
    action: int
    reason: str


def prepare_image(content: Content, settings: ImageSettings) -> Prepared:
    """Keep a JPEG's coefficients where every reader of a beton understands it, else transcode.

    Args:
        content: the bytes of an image file, a PIL image, or (H, W, 3) or (H, W) uint8 pixels.
        settings: what is asked for.

    Returns:
        What to store.

    Raises:
        ConversionError: the image is damaged, of an unknown format, or too large; the text says
            why but not where, which the caller knows.
        CompilationError: the machine is to blame.
    """
    prepared = _in_a_jpeg(content, settings)
    if settings.jpeg == "original" or (
        settings.jpeg == "auto" and len(prepared.data) < FEWEST_BYTES_TO_REWRITE
    ):
        return prepared
    return _with_restart_rows(prepared)


def _in_a_jpeg(content: Content, settings: ImageSettings) -> Prepared:
    """Return an image as a JPEG: its own where that will do."""
    if not isinstance(content, bytes):
        return _transcode(_as_picture(content), settings, "pixels", subsampled=False)
    if not content:
        raise ConversionError("it is empty (0 bytes)")
    # By the bytes, not the name: ImageNet has a PNG that is called .JPEG.
    if not is_jpeg(content):
        picture = _open(content)
        return _transcode(picture, settings, _describe(picture), subsampled=False)
    try:
        header = read_header(content)
    except JpegError as error:
        raise ConversionError(f"{error}. {_CURE}") from error
    # Pillow decodes what the view decoder does not, and refuses above twice its limit.
    most = Image.MAX_IMAGE_PIXELS
    if most and header.width * header.height > 2 * most:
        raise _too_many_pixels()
    reason = _why_not_copied(header, settings)
    if reason:
        return _transcode(_open(content), settings, reason, subsampled=header.subsampled)
    if settings.verify:
        _, require_whole = _compiled()
        try:
            require_whole(content, height=header.height, width=header.width)
        except JpegError as error:
            raise ConversionError(f"{error}. {_CURE}") from error
    return Prepared(content, header.width, header.height, COPIED, "")


def _with_restart_rows(prepared: Prepared) -> Prepared:
    """Return the same image in the fast layout, if its kind of JPEG can have it."""
    to_restart_rows, _ = _compiled()
    try:
        data = to_restart_rows(prepared.data)
    except JpegError as error:
        raise ConversionError(f"{error}. {_CURE}") from error
    if prepared.action == TRANSCODED:
        return prepared if data is None else replace(prepared, data=data)
    if data is None:
        process = read_header(prepared.data).process
        kind = process if process != "baseline" else "unusual"
        return replace(prepared, reason=f"{kind} JPEG, which has no fast layout")
    return replace(prepared, data=data, action=REWRITTEN)


@functools.cache
def _compiled() -> tuple[Callable[[bytes], bytes | None], Callable[..., None]]:
    """Compile `to_restart_rows` and `require_whole`, so that no image is blamed for what fails."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    try:
        # Numba is loaded where it is needed alone.
        from fastprune.jpeg.decode import require_whole
        from fastprune.jpeg.rewrite import to_restart_rows

        to_restart_rows(buffer.getvalue())
        require_whole(buffer.getvalue(), height=16, width=16)
    except Exception as error:  # Numba and the file system may raise anything
        raise CompilationError(
            f"the decoder cannot be compiled ({error!r}). Free some space, or name a folder that "
            "can be written in NUMBA_CACHE_DIR"
        ) from error
    return to_restart_rows, require_whole


def source_bytes(content: Content) -> bytes:
    """Return what the content fingerprint is made of: the file's bytes, or the pixels'."""
    return content if isinstance(content, bytes) else np.asarray(content).tobytes()


def _why_not_copied(header: JpegHeader, settings: ImageSettings) -> str:
    """Say why the bytes of a JPEG cannot stay as they are; empty if they can."""
    # Every reader of a beton decodes these two, stock FFCV's libjpeg-turbo and DALI included.
    if header.process not in ("baseline", "progressive") or header.precision != 8:
        return f"{header.process} {header.precision}-bit JPEG"
    if header.color not in ("gray", "ycbcr"):
        return f"{header.color.upper()} JPEG"
    if settings.exif == "apply" and header.orientation != 1:
        return f"EXIF orientation {header.orientation}"
    if settings.max_side and max(header.width, header.height) > settings.max_side:
        return f"{header.width} x {header.height} pixels"
    return ""


def _describe(picture: Image.Image) -> str:
    """Name the format and pixel kind of an image that is no JPEG."""
    frames = getattr(picture, "n_frames", 1)
    first = f", first of {frames} frames" if frames > 1 else ""
    return f"{picture.format} of mode {picture.mode}{first}"


def _as_picture(content: Image.Image | NDArray[Any]) -> Image.Image:
    """Return pixels from a dataset as a PIL image."""
    if isinstance(content, Image.Image):
        return content
    if not isinstance(content, np.ndarray):
        raise ConversionError(
            f"it is a {type(content).__name__}, but must be a PIL image, uint8 pixels "
            "(height, width, 3), or the bytes of an image file"
        )
    rgb_or_gray = content.ndim == 2 or (content.ndim == 3 and content.shape[2] == 3)
    if content.dtype != np.uint8 or not rgb_or_gray or content.size == 0:
        raise ConversionError(
            f"its pixels are {content.dtype} of shape {content.shape}, but must be uint8 of shape "
            "(height, width, 3) or (height, width)"
        )
    return Image.fromarray(content)


def _open(content: bytes) -> Image.Image:
    """Read an image's header with PIL; its pixels are not decoded yet."""
    try:
        return Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise ConversionError(
            f"it is no image: it starts with {content[:12]!r}. Remove it, or leave it out "
            "with --on-error skip"
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_many_pixels() from error
    except Exception as error:  # PIL's plugins raise anything on damaged headers
        raise ConversionError(f"its header cannot be read: {error}") from error


def _too_many_pixels() -> ConversionError:
    """Describe an image that Pillow refuses to decode, now or in `fastprune check --deep`."""
    return ConversionError(
        f"it has more than the {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels that Pillow decodes. "
        "Shrink the file, or leave it out with --on-error skip"
    )


def _load(picture: Image.Image) -> None:
    """Decode the pixels."""
    try:
        picture.load()
    except Exception as error:  # PIL's plugins raise anything on damaged data
        raise ConversionError(f"it cannot be decoded: {error}. {_CURE}") from error


def _transcode(
    picture: Image.Image, settings: ImageSettings, reason: str, *, subsampled: bool
) -> Prepared:
    """Decode, turn and shrink as asked, and encode as a JPEG."""
    limit = settings.max_side or MAX_SIDE
    if max(picture.size) > MAX_SIDE and not settings.max_side:
        raise ConversionError(
            f"it is {picture.width:,} x {picture.height:,} pixels, but a JPEG's sides end at "
            f"{MAX_SIDE:,}. Shrink it with --max-side"
        )
    _load(picture)
    if settings.exif == "apply":
        picture = ImageOps.exif_transpose(picture)
    picture = _rgb_or_gray(picture)
    longest = max(picture.size)
    if longest > limit:
        # The longer side becomes the limit exactly; integers, so that no rounding mode matters.
        width, height = (max(1, side * limit // longest) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BOX)
    buffer = io.BytesIO()
    # Chroma keeps the resolution that it had: 4:2:0 (2) only where the source was subsampled.
    picture.save(buffer, "JPEG", quality=settings.quality, subsampling=2 if subsampled else 0)
    return Prepared(buffer.getvalue(), picture.width, picture.height, TRANSCODED, reason)


def _rgb_or_gray(picture: Image.Image) -> Image.Image:
    """Convert to mode RGB or L; transparency is dropped, as torchvision's ImageFolder does."""
    if picture.mode.startswith("I;16"):
        # PIL would clip at 255 instead of scaling.
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ConversionError(
            f"its pixels are 32-bit (mode {picture.mode}), whose range is not known. Save it with "
            "8 or 16 bits"
        )
    if picture.mode in _GRAY_MODES:
        return picture.convert("L")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")
