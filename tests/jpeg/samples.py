"""JPEGs of every kind that the view decoder knows, made on the spot."""

import io

from PIL import Image

from tests.images import picture

SAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}


def encode(image: Image.Image, **options: object) -> bytes:
    """An image as JPEG, with options of Pillow's encoder."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def known_kinds(width: int = 83, height: int = 61) -> dict[str, bytes]:
    """One small JPEG of each kind that needs no other decoder."""
    color = picture(3, width=width, height=height)
    kinds = {name: encode(color, subsampling=code) for name, code in SAMPLINGS.items()}
    kinds["gray"] = encode(color.convert("L"))
    kinds["4:4:0"] = as_440(kinds["4:2:2"])
    kinds["optimized"] = encode(color, optimize=True, quality=60)
    kinds["best"] = encode(color, quality=100, subsampling=0)
    kinds["restart rows"] = encode(color, restart_marker_rows=1)
    kinds["restart blocks"] = encode(color, restart_marker_blocks=2)
    return kinds


def as_440(jpeg_422: bytes) -> bytes:
    """A 4:2:2 file told to be 4:4:0: a valid file, whose blocks are in other places."""
    frame = jpeg_422.index(b"\xff\xc0") + 4
    height = int.from_bytes(jpeg_422[frame + 1 : frame + 3])
    width = int.from_bytes(jpeg_422[frame + 3 : frame + 5])
    across, down = -(-width // 16), -(-height // 8)
    size = (16 * down).to_bytes(2) + (8 * across).to_bytes(2)
    changed = bytearray(jpeg_422)
    changed[frame + 1 : frame + 5] = size
    changed[frame + 7] = 0x12
    return bytes(changed)


def with_many_scans(progressive: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan, of a few bytes, comes so many times more."""
    last = progressive.rindex(b"\xff\xda")
    return progressive[:-2] + progressive[last:-2] * count + progressive[-2:]


def with_two_frames(jpeg: bytes) -> bytes:
    """A JPEG with a second, smaller frame header, which Pillow believes."""
    start = jpeg.index(b"\xff\xc0")
    frame = bytearray(jpeg[start : start + 2 + int.from_bytes(jpeg[start + 2 : start + 4])])
    frame[5:9] = (8).to_bytes(2) + (8).to_bytes(2)
    scan = jpeg.index(b"\xff\xda")
    return jpeg[:scan] + bytes(frame) + jpeg[scan:]


def with_hidden_frame(jpeg: bytes) -> bytes:
    """A JPEG with a smaller frame header inside a reserved segment, into which Pillow looks."""
    frame = b"\xff\xc2\x00\x0b\x08\x00\x08\x00\x08\x01\x01\x11\x00"
    segment = b"\xff\xf0" + (len(frame) + 2).to_bytes(2) + frame
    scan = jpeg.index(b"\xff\xda")
    return jpeg[:scan] + segment + jpeg[scan:]
