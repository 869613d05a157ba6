"""The markers of a JPEG, walked from start to end without decoding."""

import re
import struct
from dataclasses import dataclass

from fastprune.base.errors import JpegError

# libjpeg refuses sides above this (JPEG_MAX_DIMENSION).
MAX_SIDE = 65_500

# A progressive JPEG may have any number of scans, and one of 33 bytes makes a decoder walk over the
# whole image: a few megabytes of them take hours. Encoders write about ten. The second limit lets a
# picture of 500 megapixels have ten; a decoder needs most of a minute for so much.
MAX_SCANS = 500
_MOST_SCANNED_PIXELS = 5_000_000_000

_PROCESSES = {0xC0: "baseline", 0xC1: "extended", 0xC2: "progressive"}
_OTHER_PROCESSES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})

# In entropy-coded data 0xFF is followed by 0x00 (stuffing), by a restart marker or by another
# 0xFF (fill); anything else is the next marker.
_NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """Facts from the markers of a JPEG.

    Attributes:
        width: in pixels, [1, 65500].
        height: in pixels, [1, 65500].
        precision: bits per sample, 8 or 12.
        process: "baseline", "extended", "progressive", or "other" for lossless, hierarchical and
            arithmetic coding.
        color: "gray", "ycbcr", "rgb", "cmyk" or "ycck", told as libjpeg tells it.
        subsampled: whether a component has a lower resolution than another.
        orientation: the EXIF orientation, [1, 8]; 1 where none is given.
        end: offset behind the end-of-image marker, in bytes; the image ends there.
    """

    width: int
    height: int
    precision: int
    process: str
    color: str
    subsampled: bool
    orientation: int
    end: int


@dataclass(slots=True)
class _Seen:
    """Segments that the walk has met so far."""

    frame: bytes = b""
    process: str = ""
    jfif: bool = False
    adobe_transform: int | None = None
    orientation: int = 1
    scans: int = 0


class TooManyScansError(JpegError):
    """A JPEG that takes a decoder much longer than its size lets expect."""


def is_jpeg(content: bytes) -> bool:
    """Whether the bytes start like a JPEG."""
    return content[:3] == b"\xff\xd8\xff"


def read_header(content: bytes) -> JpegHeader:
    """Walk a JPEG's markers to its end and return what they tell.

    Finds truncation (no end-of-image marker), segments that are cut, a frame or scan that is
    missing, a second frame, a size that the amount of data cannot hold, and scans in such numbers
    that a decoder would take minutes or hours. Damage inside the
    entropy-coded data is not found: that takes decoding.

    Args:
        content: the whole file.

    Returns:
        The header.

    Raises:
        JpegError: the bytes are not a whole JPEG; the text tells why, and the caller adds the cure.

    Source: ITU-T T.81, annex B.
    """
    if not is_jpeg(content):
        raise JpegError("it does not start with a JPEG's marker (FF D8 FF)")
    seen = _Seen()
    end = _walk(content, seen)
    if not seen.frame or not seen.scans:
        missing = "frame header" if not seen.frame else "scan"
        raise JpegError(f"it has no {missing} before its end marker")
    return _header(seen, end, len(content))


def _walk(content: bytes, seen: _Seen) -> int:
    """Go from marker to marker; return the offset behind the end-of-image marker."""
    position = 2
    while True:
        found = _NEXT_MARKER.search(content, position)
        if found is None:
            raise JpegError(f"it is truncated: {len(content):,} bytes and no end-of-image marker")
        position, marker = found.end(), content[found.end() - 1]
        if marker == 0xD9:
            return position
        if marker in _ALONE:
            continue
        length = int.from_bytes(content[position : position + 2])
        if length < 2 or position + length > len(content):
            raise JpegError(
                f"segment {marker:02X} at byte {position - 2:,} is cut or has length {length}"
            )
        _note_segment(seen, marker, content[position + 2 : position + length])
        position += length


def _note_segment(seen: _Seen, marker: int, segment: bytes) -> None:
    """Take from one segment what the header needs."""
    if marker == 0xDA:
        seen.scans += 1
        _refuse_many_scans(seen)
    elif marker in _PROCESSES or marker in _OTHER_PROCESSES:
        if seen.process:
            raise JpegError("it has two frame headers")
        seen.frame, seen.process = segment, _PROCESSES.get(marker, "other")
    elif marker == 0xE0 and segment.startswith(b"JFIF\0"):
        seen.jfif = True
    elif marker == 0xEE and segment.startswith(b"Adobe") and len(segment) >= 12:
        seen.adobe_transform = segment[11]
    elif marker == 0xE1 and segment.startswith(b"Exif\0\0"):
        seen.orientation = _exif_orientation(segment[6:])


def _refuse_many_scans(seen: _Seen) -> None:
    height, width = struct.unpack(">xHH", seen.frame[:5].ljust(5, b"\0"))
    if seen.scans > MAX_SCANS or seen.scans * height * width > _MOST_SCANNED_PIXELS:
        raise TooManyScansError(
            f"it has {seen.scans} scans or more of {width} x {height} pixels; a JPEG may have "
            f"{MAX_SCANS}, and {_MOST_SCANNED_PIXELS:,} pixels in all scans together"
        )


def require_few_scans(content: bytes) -> None:
    """Refuse a JPEG that would keep a decoder busy for minutes or hours; other faults are ignored.

    Raises:
        TooManyScansError: it has too many scans; the caller adds the cure.
    """
    seen = _Seen()
    try:
        _walk(content, seen)
    except TooManyScansError:
        raise
    except JpegError:
        # A decoder may read on behind the fault. Whatever looks like a scan may be one.
        seen.scans = content.count(b"\xff\xda")
        _refuse_many_scans(seen)


def _header(seen: _Seen, end: int, num_bytes: int) -> JpegHeader:
    """Read the frame segment and judge whether the file can hold such an image."""
    if len(seen.frame) < 6 or len(seen.frame) < 6 + 3 * seen.frame[5]:
        raise JpegError("its frame header is cut")
    precision, height, width, num_components = struct.unpack(">BHHB", seen.frame[:6])
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise JpegError(
            f"its header claims {width} x {height} pixels, but a JPEG's sides lie in "
            f"[1, {MAX_SIDE:,}]"
        )
    components = [seen.frame[6 + 3 * i : 9 + 3 * i] for i in range(num_components)]
    samplings = [(c[1] >> 4, c[1] & 15) for c in components]
    if not all(1 <= h <= 4 and 1 <= v <= 4 for h, v in samplings):
        raise JpegError(f"its frame header has sampling factors {samplings}")
    # Every block of the first component takes at least one bit, however it is coded.
    if seen.process != "other" and num_bytes * 8 < (width // 8) * (height // 8):
        raise JpegError(
            f"its header claims {width} x {height} pixels, which {num_bytes:,} bytes cannot hold"
        )
    return JpegHeader(
        width=width,
        height=height,
        precision=precision,
        process=seen.process,
        color=_color(components, seen),
        subsampled=len(set(samplings)) > 1,
        orientation=seen.orientation,
        end=end,
    )


def _color(components: list[bytes], seen: _Seen) -> str:
    """The color space, guessed by libjpeg's rules (jdapimin.c, default_decompress_parms)."""
    if len(components) == 1:
        return "gray"
    if len(components) == 4:
        return "ycck" if seen.adobe_transform == 2 else "cmyk"
    if len(components) != 3:
        raise JpegError(f"it has {len(components)} components, but images have 1, 3 or 4")
    if seen.jfif:
        return "ycbcr"
    if seen.adobe_transform is not None:
        return "rgb" if seen.adobe_transform == 0 else "ycbcr"
    return "rgb" if bytes(c[0] for c in components) == b"RGB" else "ycbcr"


def _exif_orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory; 1 where it is missing or makes no sense."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    directory = struct.unpack_from(order + "I", tiff, 4)[0]
    if directory + 2 > len(tiff):
        return 1
    num_entries = struct.unpack_from(order + "H", tiff, directory)[0]
    for entry in range(directory + 2, directory + 2 + 12 * num_entries, 12):
        if entry + 12 > len(tiff):
            return 1
        tag, kind, count = struct.unpack_from(order + "HHI", tiff, entry)
        if (tag, kind, count) == (0x0112, 3, 1):
            value: int = struct.unpack_from(order + "H", tiff, entry + 8)[0]
            return value if 1 <= value <= 8 else 1
    return 1
