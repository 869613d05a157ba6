"""Over the network, too: others never notice who breaks the rules, dies or stands still."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

from fastprune.beton.opening import open_beton
from fastprune.service import flight_listener as service_side
from fastprune.service import wire
from fastprune.service.address import parse_address
from fastprune.service.connection import ask_status
from fastprune.service.credentials import ClientCredentials
from fastprune.service.flight_connection import FlightConnection
from fastprune.service.wire import FrameKind, ServiceError
from tests.service.conftest import NUM_ROWS, free_port, wait_for
from tests.service.test_bits import assert_equal, make_loader
from tests.service.test_peers import EPOCH, HELLO, ask, mutated, start_trainer

LOOPBACK = ("grpc://127.0.0.1:0",)
LOST = (flight.FlightError, pa.ArrowException, StopIteration, OSError)


def hello(beton, **changes):
    images = {"images": wire.images_digest(open_beton(beton))}
    return json.dumps(HELLO | {"decoder": wire.decoder_name()} | images | changes).encode()


class Raw:
    """A client that says anything."""

    def __init__(self, address, greeting):
        self._client = flight.FlightClient(
            address, generic_options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self.writer, self.reader = self._client.do_exchange(
            flight.FlightDescriptor.for_command(greeting)
        )

    def say(self, *frames):
        for frame in frames:
            self.writer.write_metadata(frame)

    def answer(self):
        """FrameKind and payload of the next frame that is no mere sign of life."""
        while True:
            data = self.reader.read_chunk().app_metadata.to_pybytes()
            kind, _ = wire.HEADER.unpack_from(data)
            if kind != FrameKind.HEARTBEAT:
                return kind, data[wire.HEADER.size :]

    def leave(self):
        self.reader.cancel()
        with contextlib.suppress(*LOST):
            self.writer.close()
        self._client.close()


@pytest.fixture
def connect():
    """A function that connects a client that says anything."""
    made = []

    def start(*arguments):
        made.append(Raw(*arguments))
        return made[-1]

    yield start
    for client in made:
        client.leave()


def assert_serves(beton, address):
    """Somebody else gets the right bits, from the service."""
    before = ask_status(address)["views_served"]
    assert_equal(make_loader(beton, address), make_loader(beton, ""))
    assert ask_status(address)["views_served"] > before


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b"", "is not understood"),
        (b"\x80\x04N.", "is not understood"),
        (b"[" * 60_000, "it is nested too deeply"),
        (b"{" + b" " * 100_000 + b"}", "100,002 bytes is not understood"),
        (b"{}", "it has no 'protocol'"),
    ],
    ids=["empty", "pickle", "deep", "long", "nobody"],
)
def test_whoever_does_not_greet_is_refused(beton, serve, connect, greeting, reason):
    service = serve(beton, beside=LOOPBACK)
    client = connect(service.remote, greeting)
    client.say(wire.frame(FrameKind.HEARTBEAT))
    kind, payload = client.answer()
    assert kind == FrameKind.REFUSED
    assert reason in json.loads(payload)["reason"]
    assert_serves(beton, service.remote)


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([b"x"], "a frame of 1 bytes"),
        ([bytes(range(256)) * 9], "is not understood"),
        ([wire.HEADER.pack(FrameKind.EPOCH, 2**31)], "2,147,483,648 bytes is not understood"),
        ([wire.frame(FrameKind.RELEASE, wire.NUMBER.pack(0))], "is not understood"),
        ([ask([0])], "before an epoch is announced"),
        ([wire.frame(FrameKind.EPOCH, EPOCH[:-1])], "wrong length"),
        ([wire.frame(FrameKind.EPOCH, EPOCH), ask([NUM_ROWS])], "row 120 is outside"),
        ([wire.frame(FrameKind.EPOCH, EPOCH), ask([-1])], "row -1 is outside"),
        (
            [wire.frame(FrameKind.EPOCH, EPOCH), ask([0], (0, 0, 9999, 9, 0, 0, 0))],
            "not lie inside",
        ),
        ([wire.frame(FrameKind.EPOCH, EPOCH), ask(range(65))], "is not understood"),
        ([wire.frame(FrameKind.EPOCH, EPOCH), ask([0]) + b"0"], "is not understood"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_client_that_breaks_the_rules_is_refused(beton, serve, connect, frames, reason):
    service = serve(beton, beside=LOOPBACK)
    client = connect(service.remote, hello(beton))
    client.say(wire.frame(FrameKind.HEARTBEAT), *frames)
    kinds = []
    while not kinds or kinds[-1] != FrameKind.REFUSED:
        kind, payload = client.answer()
        kinds.append(kind)
    assert reason in json.loads(payload)["reason"]
    wait_for(lambda: not ask_status(service.remote)["clients"])


def test_data_where_none_belongs_is_refused(beton, serve, connect):
    service = serve(beton, beside=LOOPBACK)
    client = connect(service.remote, hello(beton))
    batch = pa.record_batch({"x": pa.array([1, 2, 3])})
    client.writer.begin(batch.schema)
    client.writer.write_batch(batch)
    kinds = [client.answer()[0] for _ in range(2)]
    assert kinds == [FrameKind.ACCEPTED, FrameKind.REFUSED]


def test_fewer_large_views_are_given_at_once(beton, serve, connect):
    service = serve(beton, beside=LOOPBACK, memory_bytes=256 << 20)
    client = connect(service.remote, hello(beton, image_size=1000))
    client.say(wire.frame(FrameKind.HEARTBEAT), wire.frame(FrameKind.EPOCH, EPOCH), ask(range(6)))
    assert client.answer()[0] == FrameKind.ACCEPTED
    assert b"more than 5 views" in client.answer()[1]


def test_a_client_that_never_reads_is_cut_off_and_holds_nobody_up(
    beton, serve_process, tmp_path, connect
):
    process = serve_process(beton, port=(port := free_port()))
    address = f"grpc://127.0.0.1:{port}"
    assert_serves(beton, address)

    def resident():
        (line,) = [s for s in Path(f"/proc/{process.pid}/status").read_text().splitlines()
                   if s.startswith("RssAnon")]  # fmt: skip
        return int(line.split()[1]) << 10

    before = resident()
    client = connect(address, hello(beton, image_size=256))

    def flood():
        with contextlib.suppress(*LOST):
            client.say(wire.frame(FrameKind.HEARTBEAT), wire.frame(FrameKind.EPOCH, EPOCH))
            for number in range(2000):
                client.say(ask(range(number % 50, number % 50 + 64), number=number))

    flooding = threading.Thread(target=flood)
    flooding.start()
    assert_serves(beton, address)
    time.sleep(1)
    # One message of 12 MB, what gRPC has on the way, and asks.
    assert resident() - before < 100 << 20
    client.reader.cancel()
    flooding.join()
    wait_for(lambda: not ask_status(address)["clients"])


def test_a_message_that_is_not_read_for_long_ends_its_call(beton, serve, connect, monkeypatch):
    monkeypatch.setattr(service_side, "_STUCK_SECONDS", 0.5)
    service = serve(beton, beside=LOOPBACK)
    client = connect(service.remote, hello(beton, image_size=256))
    client.say(wire.frame(FrameKind.HEARTBEAT), wire.frame(FrameKind.EPOCH, EPOCH))
    client.say(*[ask(range(64), number=number) for number in range(20)])
    wait_for(lambda: ask_status(service.remote)["clients"])
    wait_for(lambda: not ask_status(service.remote)["clients"])


@pytest.mark.parametrize(
    "num_before",
    [pytest.param(0, marks=pytest.mark.full), 1, pytest.param(3, marks=pytest.mark.full)],
)
def test_a_killed_server_changes_no_bit(beton, serve_process, caplog, num_before):
    process = serve_process(beton, port=(port := free_port()))
    batches = iter(make_loader(beton, f"grpc://127.0.0.1:{port}"))
    got = [next(batches) for _ in range(num_before)]
    process.kill()
    process.wait()
    assert_equal(got + list(batches), make_loader(beton, ""))
    assert len(caplog.records) == 1


def test_a_stopped_server_is_given_up_on(beton, serve_process, monkeypatch, caplog):
    monkeypatch.setattr(wire, "SERVER_SILENT_SECONDS", 0.5)
    process = serve_process(beton, port=(port := free_port()))
    batches = iter(make_loader(beton, f"grpc://127.0.0.1:{port}"))
    got = [next(batches)]
    os.kill(process.pid, signal.SIGSTOP)
    assert_equal(got + list(batches), make_loader(beton, ""))
    assert "nothing was heard" in caplog.text
    # One that does not even accept: the next epoch waits for it no longer than it may.
    assert_equal(make_loader(beton, f"grpc://127.0.0.1:{port}"), make_loader(beton, ""))


def test_a_client_that_is_killed_frees_what_it_held(beton, serve):
    service = serve(beton, beside=LOOPBACK)
    trainer = start_trainer(beton, service.remote, seconds=60)
    trainer.stdout.readline()
    trainer.kill()
    trainer.communicate()
    wait_for(lambda: not ask_status(service.remote)["clients"])
    assert_serves(beton, service.remote)


def test_a_trainer_that_ends_in_the_middle_of_an_epoch_ends_quietly(beton, serve):
    service = serve(beton, beside=LOOPBACK)
    script = (
        "import sys; from fastprune import Loader, open_beton;"
        "beton = open_beton(sys.argv[1], service=sys.argv[2]);"
        "loader = Loader(beton, batch_size=8, image_size=32);"
        "batches = iter(loader); next(batches)"
    )
    command = [sys.executable, "-c", script, str(beton), service.remote]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    wait_for(lambda: not ask_status(service.remote)["clients"])


def test_a_forked_process_decodes_by_itself(beton, serve):
    service = serve(beton, beside=LOOPBACK)
    script = (
        "import os, sys; from fastprune import Loader, open_beton;"
        "beton = open_beton(sys.argv[1], service=sys.argv[2]);"
        "loader = Loader(beton, batch_size=8, image_size=32);"
        "list(loader); pid = os.fork();"
        "count = len(list(loader)); print(count, flush=True);"
        "os._exit(0) if pid == 0 else os.waitpid(pid, 0)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(beton), service.remote]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == "15\n15\n", ended.stderr
    assert "forked" in ended.stderr


def test_clients_that_come_and_go_leave_nothing_behind(beton, serve_process):
    process = serve_process(beton, port=(port := free_port()))
    address = f"grpc://127.0.0.1:{port}"

    def resources(pid):
        folder = Path(f"/proc/{pid}")
        return len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))

    def come_and_go(number):
        loader = make_loader(beton, address)
        for _ in range(number):
            batches = iter(loader)
            next(batches)
            batches.close()

    come_and_go(10)
    gc.collect()
    wait_for(lambda: not ask_status(address)["clients"])
    before, mine = resources(process.pid), resources("self")
    come_and_go(60)
    wait_for(lambda: not ask_status(address)["clients"])
    # gRPC keeps a few threads for the next call, and ends others when they idled for a while.
    wait_for(lambda: np.less_equal(resources(process.pid), np.add(before, 2)).all())
    gc.collect()
    wait_for(lambda: np.less_equal(resources("self"), np.add(mine, 2)).all())


@pytest.mark.parametrize(
    "num_frames",
    [500, pytest.param(100_000, marks=[pytest.mark.full, pytest.mark.timeout(3600)])],
)
def test_mutated_frames_crash_nothing(beton, serve, num_frames):
    address = serve(beton, beside=LOOPBACK).remote
    generator = np.random.default_rng(0)
    frames = [wire.frame(FrameKind.EPOCH, EPOCH), ask([1, 2, 3]), ask([4, 5], number=1)]
    frames += [ask([6], number=2), ask([7], number=3)]
    client = flight.FlightClient(address)
    for _ in range(num_frames // len(frames)):
        greeting = hello(beton)
        if generator.random() < 0.2:
            greeting = mutated(generator, [greeting])
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(greeting))
        with contextlib.suppress(*LOST):
            for frame in frames:
                is_changed = generator.random() < 0.3
                writer.write_metadata(mutated(generator, [frame]) if is_changed else frame)
            writer.done_writing()
            while True:
                reader.read_chunk()
        with contextlib.suppress(*LOST):
            writer.close()
    client.close()
    assert_serves(beton, address)
    wait_for(lambda: not ask_status(address)["clients"])


GREETING = wire.Hello(protocol=wire.PROTOCOL, decoder="", images="", image_size=8)


class Impostor(flight.FlightServerBase):
    """Greets as a service does, and then sends what it likes."""

    def __init__(self, batch, metadata):
        self._batch, self._metadata = batch, metadata
        super().__init__("grpc://127.0.0.1:0")

    def do_action(self, context, action):
        return iter(())

    def do_exchange(self, context, descriptor, reader, writer):
        writer.write_metadata(wire.message_frame(FrameKind.ACCEPTED, wire.Accepted()))
        if self._batch is not None:
            writer.begin(self._batch.schema)
            writer.write_with_metadata(self._batch, self._metadata)
        else:
            writer.write_metadata(self._metadata)
        with contextlib.suppress(*LOST):
            while True:
                reader.read_chunk()


def views_batch(num_views=2, size=192, *, schema=None, buffer=None):
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(size), num_views, [None, buffer or pa.py_buffer(bytes(num_views * size))]
    )
    return pa.RecordBatch.from_arrays([column], schema=schema or wire.views_schema(size))


def views_frame(number=0, text=b""):
    return wire.frame(FrameKind.VIEWS, wire.NUMBER.pack(number), text)


@pytest.mark.parametrize(
    ("batch", "metadata"),
    [
        (None, views_frame()),
        (None, b"garbage"),
        (views_batch(3), views_frame()),
        (views_batch(1), views_frame()),
        (views_batch(2, 191), views_frame()),
        (pa.record_batch({"view": pa.array([1, 2])}), views_frame()),
        (views_batch(), views_frame(number=7)),
        (views_batch(), views_frame(text=b"[" * 60_000)),
        (views_batch(), b"\0" * 8),
        (views_batch(100_000), views_frame()),
    ],
    ids=range(10),
)
def test_a_client_believes_no_answer_that_does_not_fit(batch, metadata):
    server = Impostor(batch, metadata)
    address = parse_address(f"grpc://127.0.0.1:{server.port}")
    connection = FlightConnection(address, GREETING, num_rows=10, credentials=ClientCredentials())
    connection.request(np.zeros(2, wire.REQUESTED), np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ServiceError):
        connection.wait()
    connection.close()
    server.shutdown()


def test_a_client_takes_an_answer_that_fits():
    server = Impostor(views_batch(buffer=pa.py_buffer(bytes([7]) * 384)), views_frame())
    address = parse_address(f"grpc://127.0.0.1:{server.port}")
    connection = FlightConnection(address, GREETING, num_rows=10, credentials=ClientCredentials())
    images = np.zeros((2, 8, 8, 3), np.uint8)
    connection.request(np.zeros(2, wire.REQUESTED), images)
    assert connection.wait() == (0, {})
    assert (images == 7).all()
    connection.close()
    server.shutdown()
