"""The protocol between a loading service and its clients: frames over a stream of bytes.

A frame is a header of eight bytes (its kind, the length of its payload) and the payload. Each kind
has a longest payload, which is checked before anything is read or allocated. Payloads are arrays of
a fixed layout or, where frames are rare, JSON; nothing is ever unpickled.

    client                                            server
    HELLO    JSON: which images, which size
                                                      ACCEPTED   JSON, and the slab's descriptor
    EPOCH    name of a stream, the rows to come
    REQUEST  a number, n rows and views
                                                      VIEWS      the number, the slots of n views
    RELEASE  the number: its views were copied
    STATUS   instead of HELLO
                                                      STATUS     JSON
                                                      HEARTBEAT  while a client waits
                                                      REFUSED    the reason; the connection ends

Views lie in the slab, shared memory that only the server writes. A slot begins with a generation
number. A client copies a view and then compares the generation with the one in VIEWS. If they
differ, the server gave the slot to another view, because the client had been silent for too long:
the client discards the copy and requests the view again.

Between machines the same frames travel as metadata of Arrow Flight messages (DoExchange); HELLO is
the call's descriptor. VIEWS names no slots there: the message's one column holds the pixels. As
nothing is read from a slab, RELEASE is not used; STATUS is an action.
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
from pydantic import Field

from fastprune import __version__
from fastprune.base.errors import InvalidValueError, LoadingError
from fastprune.base.headers import Header, Model, parse_json, parse_model
from fastprune.beton.beton import Beton
from fastprune.decoding import pixels as decoding
from fastprune.jpeg import native

PROTOCOL = 2

HEADER = struct.Struct("<II")
NUMBER = struct.Struct("<I")
EPOCH_HEAD = struct.Struct("<16sI")  # name of the stream, views of each row

#: One requested view: its row, and its box as `CropPolicy.views` draws it.
REQUESTED = np.dtype([("row", "<i8"), ("view", "<i4", (7,))])
#: Where a view lies in the slab, in bytes. NO_SLOT: it cannot be decoded; the reason follows as
#: JSON.
SLOT = np.dtype([("offset", "<u8"), ("generation", "<u8")])
NO_SLOT = 2**64 - 1
#: From the start of a slot, where its generation is, to its pixels: one cache line.
SLOT_HEADER_BYTES = 64

#: Views in one request at most: enough to occupy all threads, few enough for views to flow.
MAX_REQUEST_VIEWS = 64
MAX_REASON_CHARACTERS = 200
MAX_IMAGE_SIZE = 1 << 14
#: A server that sends nothing for so long is lost; it sends a heartbeat every two seconds.
SERVER_SILENT_SECONDS = 10.0
_MAX_MESSAGE_BYTES = 16 << 20
_MAX_JSON_BYTES = 64 << 10


class ServiceError(LoadingError):
    """A loading service cannot be reached, was lost or refuses; clients then decode themselves."""


class ServiceRefusedError(ServiceError):
    """The service answered, and does not serve what was requested."""


class FrameKind(IntEnum):
    """The kinds of frames."""

    HELLO = 1
    ACCEPTED = 2
    EPOCH = 3
    REQUEST = 4
    VIEWS = 5
    RELEASE = 6
    STATUS = 7
    HEARTBEAT = 8
    REFUSED = 9


class Hello(Header):
    """First message of a client."""

    protocol: int  # `PROTOCOL`
    decoder: str  # `decoder_name`
    images: str  # `images_digest` of its beton
    image_size: int = Field(ge=1, le=MAX_IMAGE_SIZE)  # S, side of its views in pixels
    name: str = ""  # for people
    num_lost: int = 0  # how often it lost a service so far


class Accepted(Header):
    """Answer to a client that was admitted; over a Unix socket the slab's descriptor follows."""

    slab_bytes: int | None = None  # length of the slab; None where there is none to map


class Refused(Header):
    """The reason why a service ends a connection."""

    reason: str


def max_payload_bytes(kind: int, num_rows: int = 0) -> int:
    """Longest payload of a kind of frame; -1 for an unknown kind. `num_rows` is 0 before HELLO."""
    longest = {
        FrameKind.HELLO: _MAX_JSON_BYTES,
        FrameKind.ACCEPTED: _MAX_JSON_BYTES,
        FrameKind.EPOCH: EPOCH_HEAD.size + -(-num_rows // 8),
        FrameKind.REQUEST: NUMBER.size + MAX_REQUEST_VIEWS * REQUESTED.itemsize,
        # JSON writes a character in up to six bytes, and the position beside the reason.
        FrameKind.VIEWS: NUMBER.size
        + MAX_REQUEST_VIEWS * (SLOT.itemsize + 6 * MAX_REASON_CHARACTERS + 16),
        FrameKind.RELEASE: NUMBER.size,
        FrameKind.STATUS: 4 << 20,
        FrameKind.HEARTBEAT: 0,
        FrameKind.REFUSED: _MAX_JSON_BYTES,
    }
    return longest.get(kind, -1)  # type: ignore[call-overload, no-any-return]


def frame(kind: FrameKind, *parts: bytes) -> bytes:
    """Pack a frame."""
    return b"".join((HEADER.pack(kind, sum(map(len, parts))), *parts))


def message_frame(kind: FrameKind, message: Header) -> bytes:
    """Pack a message."""
    return frame(kind, message.model_dump_json().encode())


def refused_frame(reason: str) -> bytes:
    """Pack the frame that ends a connection."""
    return message_frame(FrameKind.REFUSED, Refused(reason=reason))


def require_frame(kind: int, length: int, kinds: tuple[FrameKind, ...], num_rows: int = 0) -> None:
    """Refuse a header of another kind than these, or of a payload that is too long.

    Raises:
        ServiceError: before the payload is read.
    """
    if kind not in kinds or length > max_payload_bytes(kind, num_rows):
        raise ServiceError(f"a frame of kind {kind} and {length:,} bytes is not understood")


def split(data: bytes, kinds: tuple[FrameKind, ...], num_rows: int = 0) -> tuple[FrameKind, bytes]:
    """Split a whole frame of one of these kinds into kind and payload.

    Raises:
        ServiceError: it has another kind or a wrong length.
    """
    if len(data) < HEADER.size:
        raise ServiceError(f"a frame of {len(data)} bytes is not understood")
    kind, length = HEADER.unpack_from(data)
    require_frame(kind, max(length, len(data) - HEADER.size), kinds, num_rows)
    if length != len(data) - HEADER.size:
        raise ServiceError(f"a frame of kind {kind} and {length:,} bytes is not understood")
    return FrameKind(kind), data[HEADER.size :]


def read_message(payload: bytes, model: type[Model]) -> Model:
    """Read a JSON payload, whose length the frame has bounded, as a strict model.

    Raises:
        ServiceError: it does not fit.
    """
    try:
        return parse_model(payload, model)
    except ValueError as error:
        raise ServiceError(f"a message is not understood: {error}") from error


def read_json(payload: bytes) -> dict[str, Any]:
    """Read a JSON payload whose keys are not fixed.

    Raises:
        ServiceError: it is not a JSON object.
    """
    try:
        fields = parse_json(payload)
    except ValueError as error:
        raise ServiceError(f"a message is not understood: {error}") from error
    if not isinstance(fields, dict):
        raise ServiceError(f"a message is not a JSON object but {type(fields).__name__}")
    return fields


def epoch_frame(stream: bytes, rows: NDArray[np.int64], views_per_row: int, num_rows: int) -> bytes:
    """Pack the frame that begins an epoch; see `connection.Connection.announce`."""
    is_kept = np.zeros(num_rows, np.bool_)
    is_kept[rows] = True
    head = EPOCH_HEAD.pack(stream, views_per_row)
    return frame(FrameKind.EPOCH, head, np.packbits(is_kept).tobytes())


def pack_reasons(reasons: dict[int, str]) -> bytes:
    """Pack why views of a request cannot be decoded, by position; b"" if all can."""
    return json.dumps(reasons).encode() if reasons else b""


def read_reasons(text: bytes, num_views: int) -> dict[int, str]:
    """Read what `pack_reasons` packed; positions outside [0, num_views) are ignored.

    Raises:
        ServiceError: it is something else.
    """
    found = {str(i): str(reason) for i, reason in (read_json(text) if text else {}).items()}
    return {i: found[str(i)] for i in range(num_views) if str(i) in found}


def max_message_views(image_size: int) -> int:
    """Views in one Flight message at most; large ones come in smaller numbers."""
    return max(1, min(MAX_REQUEST_VIEWS, _MAX_MESSAGE_BYTES // (3 * image_size**2)))


def views_schema(view_bytes: int) -> Any:
    """Arrow schema of a message with views."""
    return pa.schema([pa.field("view", pa.binary(view_bytes), nullable=False)])


@cache
def decoder_name() -> str:
    """Name the decoder: where both sides have the same name, pixels are equal to the bit."""
    digest = hashlib.blake2b(digest_size=8)
    folder = Path(native.__file__).parent
    for path in (*sorted(folder.glob("*.py")), Path(decoding.__file__)):
        digest.update(path.read_bytes())
    # Pillow decodes what the view decoder does not know, and resizes raw images.
    return f"fastprune {__version__} {digest.hexdigest()}, Pillow {PIL.__version__}"


def images_digest(beton: Beton) -> str:
    """Digest the stored images of a beton, by which client and server agree on what a row is.

    The fingerprint covers the sources only, and these may have been transcoded in more than one
    way; so the checksums of the stored bytes are included.

    Returns:
        32 hex digits.

    Raises:
        InvalidValueError: the beton has no manifest.
    """
    if beton.manifest is None:
        raise InvalidValueError(
            f"{beton.path} has no manifest to identify its images by. Make one with: fastprune "
            f"check {beton.path} --deep --write-manifest"
        )
    stored = beton.manifest.column("stored_crc32c")
    digest = hashlib.blake2b(str(beton.fingerprint.to_dict()).encode(), digest_size=16)
    digest.update(stored.to_numpy().astype("<u4").tobytes())
    return digest.hexdigest()
