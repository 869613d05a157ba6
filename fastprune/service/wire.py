"""What a loading service and its clients say to each other: frames over a stream of bytes.

A frame is a header of eight bytes, its kind and the length of its payload, and the payload. Every
kind has a longest payload, which is checked before anything is read or allocated. Payloads are
arrays of a fixed layout or, where frames are rare, JSON; nothing is ever unpickled.

    client                                         server
    HELLO   JSON: who, which images, which size
                                                   WELCOME  JSON, and the slab's descriptor
    EPOCH   a stream's name, the rows to come
    ASK     a number, n wanted views
                                                   VIEWS    the number, where n views lie
    TAKEN   the number
    STATUS  instead of HELLO
                                                   STATUS   JSON
                                                   ALIVE    now and then, while a client waits
                                                   REFUSED  a sentence; the connection ends

Views lie in the slab, a file in memory that the server alone can write. The eight bytes at the
start of a place are its generation. A client copies a view and then compares the generation with
the one in VIEWS: if the server gave the place to another view meanwhile, because the client had
been silent for too long, the copy is thrown away and the view asked for again.

Between machines the same frames travel as the metadata of messages of Arrow Flight (DoExchange),
HELLO as its descriptor. VIEWS has no places there: the message's one column holds the pixels of all
views asked for. Nothing is taken from a slab, so there is no TAKEN; STATUS is an action.
"""

import hashlib
import json
import struct
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
from numpy.typing import NDArray

from fastprune import __version__
from fastprune.base.errors import InvalidValueError, LoadingError
from fastprune.beton.beton import Beton
from fastprune.decoding import pixels as decoding
from fastprune.jpeg import native

PROTOCOL = 2

HEADER = struct.Struct("<II")
NUMBER = struct.Struct("<I")
EPOCH_HEAD = struct.Struct("<16sI")  # name of the stream, views of each row

#: One wanted view: its row, and its box as `CropPolicy.views` draws it.
WANTED = np.dtype([("row", "<i8"), ("view", "<i4", (7,))])
#: Where a view lies in the slab, in bytes. No view lies at NOWHERE: its reason follows in JSON.
PLACE = np.dtype([("offset", "<u8"), ("generation", "<u8")])
NOWHERE = 2**64 - 1
#: From the start of a place, its generation, to its pixels: a cache line.
GUARD_BYTES = 64

#: Views in one ASK at most: enough to occupy all threads, few enough for views to flow.
MOST_WANTED = 64
MOST_REASON_CHARACTERS = 200
_MOST_MESSAGE_BYTES = 16 << 20
_MOST_JSON_BYTES = 64 << 10


class ServiceError(LoadingError):
    """A loading service cannot be reached, was lost, or refuses; clients then decode themselves."""


class ServiceRefusedError(ServiceError):
    """The service answered, and does not serve what was asked for."""


class Kind(IntEnum):
    """The kinds of frames."""

    HELLO = 1
    WELCOME = 2
    EPOCH = 3
    ASK = 4
    VIEWS = 5
    TAKEN = 6
    STATUS = 7
    ALIVE = 8
    REFUSED = 9


def most_bytes(kind: int, num_rows: int = 0) -> int:
    """The longest payload of a kind of frame, in bytes; -1 for kinds that do not exist.

    Args:
        kind: as a header says.
        num_rows: of the beton that client and server agreed upon; 0 before.
    """
    longest = {
        Kind.HELLO: _MOST_JSON_BYTES,
        Kind.WELCOME: _MOST_JSON_BYTES,
        Kind.EPOCH: EPOCH_HEAD.size + -(-num_rows // 8),
        Kind.ASK: NUMBER.size + MOST_WANTED * WANTED.itemsize,
        # JSON writes a character in up to six bytes, and positions beside it.
        Kind.VIEWS: NUMBER.size + MOST_WANTED * (PLACE.itemsize + 6 * MOST_REASON_CHARACTERS + 16),
        Kind.TAKEN: NUMBER.size,
        Kind.STATUS: 4 << 20,
        Kind.ALIVE: 0,
        Kind.REFUSED: _MOST_JSON_BYTES,
    }
    return longest.get(kind, -1)  # type: ignore[call-overload, no-any-return]


def frame(kind: Kind, *parts: bytes) -> bytes:
    """A whole frame."""
    return b"".join((HEADER.pack(kind, sum(map(len, parts))), *parts))


def json_frame(kind: Kind, fields: dict[str, Any]) -> bytes:
    """A whole frame of JSON."""
    return frame(kind, json.dumps(fields).encode())


def split(data: bytes, kinds: tuple[Kind, ...], num_rows: int = 0) -> tuple[Kind, bytes]:
    """Kind and payload of a whole frame, if it is of these kinds.

    Raises:
        ServiceError: it is not, or its length is wrong.
    """
    if len(data) < HEADER.size:
        raise ServiceError(f"a frame of {len(data)} bytes is not understood")
    kind, length = HEADER.unpack_from(data)
    if kind not in kinds or not length == len(data) - HEADER.size <= most_bytes(kind, num_rows):
        raise ServiceError(f"a frame of kind {kind} and {length:,} bytes is not understood")
    return Kind(kind), data[HEADER.size :]


def read_json(payload: bytes) -> dict[str, Any]:
    """The fields of a JSON payload.

    Raises:
        ServiceError: it is no JSON object.
    """
    try:
        fields = json.loads(payload)
    # A deep nest of brackets exhausts the parser's stack.
    except (ValueError, RecursionError) as error:
        raise ServiceError(f"a message is no JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ServiceError(f"a message is no JSON object but {type(fields).__name__}")
    return fields


def epoch_frame(stream: bytes, rows: NDArray[np.int64], views_per_row: int, num_rows: int) -> bytes:
    """The frame that begins an epoch; see `service_session.Session.announce`."""
    is_wanted = np.zeros(num_rows, np.bool_)
    is_wanted[rows] = True
    head = EPOCH_HEAD.pack(stream, views_per_row)
    return frame(Kind.EPOCH, head, np.packbits(is_wanted).tobytes())


def read_reasons(text: bytes, num_views: int) -> dict[int, str]:
    """Why views cannot be decoded, by position in [0, num_views), of a JSON object.

    Raises:
        ServiceError: it is none.
    """
    found = {str(i): str(reason) for i, reason in (read_json(text) if text else {}).items()}
    return {i: found[str(i)] for i in range(num_views) if str(i) in found}


def most_in_message(image_size: int) -> int:
    """Views in one message of Flight at most; large ones come in smaller numbers."""
    return max(1, min(MOST_WANTED, _MOST_MESSAGE_BYTES // (3 * image_size**2)))


def views_schema(view_bytes: int) -> Any:
    """The Arrow schema of a message with views."""
    return pa.schema([pa.field("view", pa.binary(view_bytes), nullable=False)])


def socket_path(address: str) -> str:
    """The path in an address of the form unix:PATH.

    Raises:
        InvalidValueError: it has another form, or the path is too long for a socket.
    """
    scheme, separator, path = address.partition(":")
    if scheme != "unix" or not separator or not path:
        raise InvalidValueError(
            f"{address!r} is no address of a loading service on this machine. Write unix:PATH, "
            "such as unix:/run/fastprune.sock."
        )
    if len(path.encode()) > 107:  # sun_path holds 108 bytes with the final zero
        raise InvalidValueError(
            f"{path} is too long for a socket ({len(path.encode())} bytes, at most 107). Use a "
            "shorter path."
        )
    return path


@cache
def decoder_name() -> str:
    """Name what must be equal on both sides for pixels to be equal to the bit."""
    digest = hashlib.blake2b(digest_size=8)
    folder = Path(native.__file__).parent
    for path in (*sorted(folder.glob("*.py")), Path(decoding.__file__)):
        digest.update(path.read_bytes())
    # Pillow decodes what the view decoder does not know, and resizes raw images.
    return f"fastprune {__version__} {digest.hexdigest()}, Pillow {PIL.__version__}"


def images_digest(beton: Beton) -> str:
    """Digest what must be equal on both sides for rows to be the same images, stored alike.

    The content fingerprint is of the images' sources, which may have been transcoded in more than
    one way; so the checksums of what is stored count, too.

    Returns:
        32 hex digits.

    Raises:
        InvalidValueError: there is no manifest beside the beton.
    """
    if beton.manifest is None:
        raise InvalidValueError(
            f"{beton.path} has no manifest to know its images by. Make one with: fastprune check "
            f"{beton.path} --deep --write-manifest"
        )
    stored = beton.manifest.column("stored_crc32c")
    digest = hashlib.blake2b(str(beton.fingerprint.to_dict()).encode(), digest_size=16)
    digest.update(stored.to_numpy().astype("<u4").tobytes())
    return digest.hexdigest()
