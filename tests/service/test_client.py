"""A client whose service sends garbage decodes by itself."""

import contextlib
import socket
import threading
from pathlib import Path

import numpy as np
import pytest

from fastprune.service import wire
from fastprune.service.address import parse_address
from fastprune.service.connection import UnixConnection
from fastprune.service.slab import Slab, slot_bytes
from fastprune.service.wire import FrameKind, ServiceError
from tests.service.test_bits import assert_equal, make_loader
from tests.service.test_peers import mutated

HELLO = wire.Hello(protocol=wire.PROTOCOL, decoder="", images="", image_size=8)
SLAB_BYTES = 64 * slot_bytes(8)


class Impostor:
    """Greets as a service does, and then sends given bytes."""

    def __init__(self, path, frames, greeting=None):
        self.address = f"unix:{path}"
        self._greeting = greeting or wire.message_frame(
            FrameKind.ACCEPTED, wire.Accepted(slab_bytes=SLAB_BYTES)
        )
        self._frames, self._slab = frames, Slab(SLAB_BYTES, 8)
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._thread = threading.Thread(target=self._talk)
        self._thread.start()

    def _talk(self):
        for data in self._frames:
            connection, _ = self._listening.accept()
            with connection, contextlib.suppress(ConnectionError):
                connection.settimeout(10)
                connection.recv(1 << 16)
                socket.send_fds(connection, [self._greeting], [self._slab.descriptor])
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass

    def close(self):
        self._thread.join(30)
        self._listening.close()
        self._slab.close()


def num_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def views_frame(number=0, offset=0, generation=0, count=2, reasons=b""):
    places = np.full(count, 0, wire.SLOT)
    places["offset"], places["generation"] = offset, generation
    return wire.frame(FrameKind.VIEWS, wire.NUMBER.pack(number), places.tobytes(), reasons)


def take(address):
    """Take two views of 8 pixels."""
    connection = UnixConnection(parse_address(address), HELLO, num_rows=10)
    try:
        connection.announce(b"0" * 16, np.arange(2), 1)
        images = np.zeros((2, 8, 8, 3), np.uint8)
        connection.request(np.zeros(2, wire.REQUESTED), images)
        return connection.wait()
    finally:
        connection.close()


@pytest.mark.parametrize(
    "data",
    [
        wire.frame(FrameKind.VIEWS),
        wire.frame(FrameKind.VIEWS, b"12"),
        views_frame(number=7),
        views_frame(count=1),
        views_frame(offset=SLAB_BYTES - 64),
        views_frame(offset=2**63),
        views_frame(offset=wire.NO_SLOT),
        views_frame(offset=wire.NO_SLOT, reasons=b'{"1": "damaged"}'),
        views_frame(reasons=b"[]"),
        views_frame(reasons=b"\x80\x04N."),
        wire.frame(FrameKind.ACCEPTED, b"{}"),
        wire.HEADER.pack(FrameKind.VIEWS, 2**31),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"",
    ],
)
def test_an_answer_that_does_not_fit_is_refused(tmp_path, data):
    impostor = Impostor(tmp_path / "s", [data])
    with pytest.raises(ServiceError):
        take(impostor.address)
    impostor.close()


def test_a_view_that_lies_nowhere_has_its_reason(tmp_path):
    frame = views_frame(offset=wire.NO_SLOT, reasons=b'{"0": "damaged", "1": "torn", "x": "y"}')
    impostor = Impostor(tmp_path / "s", [frame])
    assert take(impostor.address) == (0, {0: "damaged", 1: "torn"})
    impostor.close()


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0-x\r\n", wire.frame(FrameKind.ACCEPTED, b"{}")])
def test_batches_are_decoded_here_where_something_else_listens(beton, tmp_path, greeting):
    impostor = Impostor(tmp_path / "s", [b""], greeting or b"\0")
    assert_equal(make_loader(beton, impostor.address), make_loader(beton, ""))
    impostor.close()


@pytest.mark.parametrize(
    "num_frames",
    [500, pytest.param(100_000, marks=[pytest.mark.full, pytest.mark.timeout(1800)])],
)
def test_mutated_answers_raise_nothing_but_what_a_loader_understands(tmp_path, num_frames):
    generator = np.random.default_rng(0)
    frames = [
        views_frame(),
        wire.frame(FrameKind.HEARTBEAT),
        views_frame(reasons=b'{"1": "damaged"}'),
    ]
    conversations = [mutated(generator, frames) for _ in range(num_frames // len(frames))]
    impostor = Impostor(tmp_path / "s", conversations)
    before = num_descriptors()
    num_refused = 0
    for _ in conversations:
        try:
            take(impostor.address)
        except ServiceError:
            num_refused += 1
    assert num_refused > 0
    # The impostor may still have its last connection.
    assert num_descriptors() <= before + 1
    impostor.close()
