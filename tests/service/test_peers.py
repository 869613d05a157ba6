"""Clients that break the rules, die or stand still: others never notice, nothing stays behind."""

import gc
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from fastprune.beton.opening import open_beton
from fastprune.service import window, wire
from fastprune.service.address import parse_address
from fastprune.service.wire import FrameKind
from tests.service.conftest import NUM_ROWS, cached_views, wait_for
from tests.service.test_bits import assert_equal, make_loader

HELLO = {"protocol": wire.PROTOCOL, "image_size": 32, "name": "test"}
EPOCH = wire.EPOCH_HEAD.pack(b"0" * 16, 1) + b"\xff" * (NUM_ROWS // 8)

# A trainer in a process: it prints a digest of an epoch's batches, and a line for each.
TRAINER = """
import hashlib, sys, time
from fastprune import Loader, open_beton
beton, address, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
digest = hashlib.blake2b()
beton = open_beton(beton, service=address)
loader = Loader(beton, batch_size=8, image_size=160, num_workers=1,
                fields=("images", "labels", "rows"))
for images, labels, rows in loader:
    digest.update(images.contiguous().numpy().tobytes() + rows.numpy().tobytes())
    print("batch", flush=True)
    time.sleep(seconds)
print(digest.hexdigest(), loader.num_decoded_whole)
"""


def start_trainer(beton, address, seconds=0.0):
    command = [sys.executable, "-c", TRAINER, str(beton), address, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def connect(address):
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(parse_address(address).path)
    return connection


def hello_payload(beton, **changes):
    images = {"images": wire.images_digest(open_beton(beton))}
    return json.dumps(HELLO | {"decoder": wire.decoder_name()} | images | changes).encode()


def hello(beton, **changes):
    return wire.frame(FrameKind.HELLO, hello_payload(beton, **changes))


def answer(connection):
    """The next frame that is no mere sign of life; None at the end of the connection."""
    incoming = connection.makefile("rb")
    while len(header := incoming.read(wire.HEADER.size)) == wire.HEADER.size:
        kind, length = wire.HEADER.unpack(header)
        body = incoming.read(length)
        if kind != FrameKind.HEARTBEAT:  # which comes while a slow machine still decodes
            return kind, body
    return None


def greeted(beton, address):
    """A connection that was admitted."""
    connection = connect(address)
    connection.sendall(hello(beton))
    kind, _ = answer(connection)
    assert kind == FrameKind.ACCEPTED
    return connection


def ask(rows, view=(0, 0, 10, 10, 0, 0, 0), number=0):
    wanted = np.zeros(len(rows), wire.REQUESTED)
    wanted["row"], wanted["view"] = rows, view
    return wire.frame(FrameKind.REQUEST, wire.NUMBER.pack(number), wanted.tobytes())


def assert_serves(beton, address):
    """Somebody else gets the right bits, from the service."""
    before = status(address)["views_served"]
    assert_equal(make_loader(beton, address), make_loader(beton, ""))
    assert status(address)["views_served"] > before


def status(address):
    with connect(address) as connection:
        connection.sendall(wire.frame(FrameKind.STATUS))
        kind, payload = answer(connection)
        assert kind == FrameKind.STATUS
        return json.loads(payload)


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "is not understood"),
        (bytes(range(256)) * 10, "is not understood"),
        (wire.HEADER.pack(FrameKind.HELLO, 2**31), "2,147,483,648 bytes is not understood"),
        (wire.HEADER.pack(FrameKind.REQUEST, 4), "is not understood"),
        (wire.HEADER.pack(77, 0), "is not understood"),
        (wire.frame(FrameKind.HELLO, b"\x80\x04N."), "a message is not understood"),
        (wire.frame(FrameKind.HELLO, b"[" * 60_000), "it is nested too deeply"),
        (wire.frame(FrameKind.HELLO, b"[]"), "it is a list, but must be an object"),
        (wire.frame(FrameKind.HELLO, b"{}"), "it has no 'protocol'; it speaks protocol 2"),
        (wire.frame(FrameKind.HELLO), "a message is not understood"),
    ],
)
def test_whoever_does_not_greet_is_refused(beton, serve, first, reason):
    service = serve(beton)
    with connect(service.address) as connection:
        connection.sendall(first)
        kind, payload = answer(connection)
        assert kind == FrameKind.REFUSED
        assert reason in json.loads(payload)["reason"]
        assert answer(connection) is None
    assert_serves(beton, service.address)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": 99}, "they must be the same"),
        ({"decoder": "fastprune 0.0.0"}, "they must be the same"),
        ({"images": "0" * 32}, "the images are not those of a served beton"),
        ({"image_size": 0}, "its 'image_size' is 0, but must be greater than or equal to 1"),
        ({"image_size": "32"}, "its 'image_size' is '32', but must be an integer"),
        ({"image_size": 10**9}, "but must be less than or equal to 16384"),
        ({"image_size": 4000}, "are too small for 1 clients"),
        ({"name": "x", "unknown": 1}, "its 'unknown' is unknown"),
    ],
)
def test_whoever_wants_what_is_not_served_is_refused(beton, serve, changes, reason):
    service = serve(beton)
    with connect(service.address) as connection:
        connection.sendall(hello(beton, **changes))
        kind, payload = answer(connection)
    assert kind == FrameKind.REFUSED
    assert reason in json.loads(payload)["reason"]


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        (ask([0]), "before an epoch is announced"),
        (wire.frame(FrameKind.EPOCH, EPOCH[:-1]), "wrong length"),
        (wire.HEADER.pack(FrameKind.EPOCH, 2**20), "is not understood"),
        (wire.frame(FrameKind.EPOCH, EPOCH) + ask([NUM_ROWS]), "row 120 is outside"),
        (wire.frame(FrameKind.EPOCH, EPOCH) + ask([-1]), "row -1 is outside"),
        (wire.frame(FrameKind.EPOCH, EPOCH) + ask([2**62]), "is outside"),
        (wire.frame(FrameKind.EPOCH, EPOCH) + ask([0], (0, 0, 9999, 9, 0, 0, 0)), "not lie inside"),
        (wire.frame(FrameKind.EPOCH, EPOCH) + ask([0]) + ask([1]), "is open already"),
        (wire.frame(FrameKind.EPOCH, EPOCH) + ask([]), "wrong length"),
        (wire.frame(FrameKind.EPOCH, EPOCH) + ask(range(65)), "is not understood"),
        (
            wire.frame(FrameKind.EPOCH, EPOCH) + wire.frame(FrameKind.REQUEST, b"0" * 41),
            "a request is of a wrong length",
        ),
        (wire.frame(FrameKind.RELEASE, b"12"), "wrong length"),
        (hello.__name__.encode() * 10, "is not understood"),
    ],
)
def test_a_client_that_breaks_the_rules_is_refused_and_others_are_served(
    beton, serve, frames, reason
):
    service = serve(beton)
    with greeted(beton, service.address) as connection:
        connection.sendall(frames)
        while (found := answer(connection))[0] == FrameKind.VIEWS:
            pass
        assert found[0] == FrameKind.REFUSED
        assert reason in json.loads(found[1])["reason"]
        assert_serves(beton, service.address)
    wait_for(lambda: not status(service.address)["clients"])


def test_clients_that_stop_in_the_middle_of_a_frame_hold_nobody_up(beton, serve):
    service = serve(beton)
    halves = [connect(service.address), greeted(beton, service.address)]
    halves[0].sendall(hello(beton)[:20])
    halves[1].sendall(wire.frame(FrameKind.EPOCH, EPOCH)[:30])
    assert_serves(beton, service.address)
    for connection in halves:
        connection.close()
    wait_for(lambda: not status(service.address)["clients"])


def test_a_client_that_never_reads_holds_nobody_up(beton, serve):
    service = serve(beton)
    with greeted(beton, service.address) as connection:
        connection.sendall(wire.frame(FrameKind.EPOCH, EPOCH))
        for number in range(1000):
            connection.sendall(ask(range(number % 50, number % 50 + 64), number=number))
        assert_serves(beton, service.address)
        connection.sendall(b"".join(ask([0], number=2000 + number) for number in range(100)))
        wait_for(lambda: not status(service.address)["clients"])


def test_a_client_that_is_killed_frees_what_it_held(beton, serve):
    service = serve(beton)
    trainer = start_trainer(beton, service.address, seconds=60)
    trainer.stdout.readline()
    assert any(view.num_holders for view in cached_views(service))
    trainer.kill()
    trainer.communicate()
    wait_for(lambda: not status(service.address)["clients"])
    assert not any(view.num_holders for view in cached_views(service))
    assert_serves(beton, service.address)


def test_a_client_that_stood_still_gets_the_right_bits_though_its_views_were_displaced(
    beton, serve, monkeypatch
):
    monkeypatch.setattr(window, "SILENT_SECONDS", 0.3)
    local = start_trainer(beton, "")
    expected = local.communicate()[0].split("\n")[-2]
    service = serve(beton, memory_bytes=16 << 20)
    trainer = start_trainer(beton, service.address, seconds=0.01)
    trainer.stdout.readline()
    os.kill(trainer.pid, signal.SIGSTOP)
    views = cached_views(service)
    held = {view.offset: view.generation for view in views if view.num_holders}
    assert held
    wait_for(lambda: status(service.address)["detached"] == 1)
    # Others need the memory in which its views lie.
    for seed in range(1, 4):
        settings = {"seed": seed, "image_size": 160}
        assert_equal(
            make_loader(beton, service.address, **settings), make_loader(beton, "", **settings)
        )
    slab = service.server.dispatcher.windows[160].slab
    assert any(slab.generation(offset) != generation for offset, generation in held.items())
    os.kill(trainer.pid, signal.SIGCONT)
    assert trainer.communicate()[0].split("\n")[-2] == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_other_users_are_refused_whatever_the_mode_of_the_socket(beton, serve, tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        service = serve(beton, name=f"{folder}/service.sock")
        path = Path(folder) / "service.sock"
        assert path.stat().st_mode & 0o777 == 0o600
        other = (
            "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
            "s.connect(sys.argv[1]); print(s.recv(1000))"
        )
        command = [sys.executable, "-S", "-c", other, str(path)]
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "PermissionError" in refused.stderr
        path.chmod(0o666)
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "serves user 0 alone, not user 65534" in refused.stdout
        service.stop()


def mutated(generator, frames):
    """A conversation with some bytes changed, left out or doubled."""
    data = bytearray(b"".join(frames))
    for _ in range(generator.integers(1, 4)):
        at = int(generator.integers(len(data)))
        match generator.integers(3):
            case 0:
                data[at] = generator.integers(256)
            case 1:
                del data[at : at + int(generator.integers(1, 9))]
            case 2:
                data[at:at] = data[at : at + 8]
    return bytes(data)


@pytest.mark.parametrize(
    "num_frames",
    [2_000, pytest.param(100_000, marks=[pytest.mark.full, pytest.mark.timeout(1800)])],
)
def test_mutated_frames_crash_nothing(beton, serve_process, tmp_path, num_frames):
    process = serve_process(beton)
    address = f"unix:{tmp_path}/service.sock"
    generator = np.random.default_rng(0)
    frames = [
        hello(beton),
        wire.frame(FrameKind.EPOCH, EPOCH),
        ask([1, 2, 3]),
        ask([4, 5], number=1),
    ]
    frames.append(wire.frame(FrameKind.RELEASE, wire.NUMBER.pack(0)))
    for _ in range(num_frames // len(frames)):
        with connect(address) as connection:
            try:
                connection.sendall(mutated(generator, frames))
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass
            except OSError:
                pass
    assert process.poll() is None
    assert_serves(beton, address)
    wait_for(lambda: not status(address)["clients"])


def test_the_window_never_passes_its_memory(beton, serve_process, tmp_path):
    process = serve_process(beton, options=["--memory", "16MiB"])
    address = f"unix:{tmp_path}/service.sock"
    most = 0
    for image_size in (160, 32, 96):
        for seed in range(2):
            for _ in make_loader(beton, address, image_size=image_size, seed=seed):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                (shared,) = (int(s.split()[1]) for s in lines if s.startswith("RssShmem"))
                most = max(most, shared * 1024)
    assert 8 << 20 < most <= 16 << 20


def test_clients_that_come_and_go_leave_nothing_behind(beton, serve_process, tmp_path):
    process = serve_process(beton)
    address = f"unix:{tmp_path}/service.sock"

    def resources():
        folder = Path(f"/proc/{process.pid}")
        return len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))

    def mine():
        maps = Path("/proc/self/maps").read_text()
        return len(list(Path("/proc/self/fd").iterdir())), maps.count("fastprune-slab")

    assert_serves(beton, address)
    wait_for(lambda: not status(address)["clients"])
    gc.collect()  # what earlier tests left must not go in between
    before, mine_before = resources(), mine()
    loader = make_loader(beton, address)
    for number in range(200):
        batches = iter(make_loader(beton, address, seed=number) if number % 10 == 0 else loader)
        next(batches)
        batches.close()
    del loader, batches
    wait_for(lambda: not status(address)["clients"])
    wait_for(lambda: resources() == before)
    gc.collect()
    assert mine() == mine_before


def test_sigterm_answers_what_was_asked_and_ends_with_zero(beton, serve_process, tmp_path):
    process = serve_process(beton)
    address = f"unix:{tmp_path}/service.sock"
    with greeted(beton, address) as connection:
        connection.sendall(wire.frame(FrameKind.EPOCH, EPOCH) + ask(range(64)))
        wait_for(lambda: status(address)["clients"][0]["epochs"] == 1)
        process.send_signal(signal.SIGTERM)
        assert answer(connection)[0] == FrameKind.VIEWS
        assert answer(connection) is None
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert output.decode() == "decoded 64 views, served 64\n"
    assert not (tmp_path / "service.sock").exists()


def test_a_killed_servers_socket_is_replaced_and_a_running_ones_is_not(
    beton, serve_process, tmp_path
):
    first = serve_process(beton)
    first.kill()
    first.wait()
    process = serve_process(beton)
    command = [sys.executable, "-m", "fastprune", "serve", str(beton), "--listen"]
    command.append(f"unix:{tmp_path}/service.sock")
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "another service listens at" in second.stderr
    assert process.poll() is None
    (tmp_path / "file").touch()
    command[-1] = f"unix:{tmp_path}/file"
    third = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "exists and is not a socket" in third.stderr


def test_status_is_a_table_or_json(beton, serve_process, tmp_path):
    serve_process(beton)
    address = f"unix:{tmp_path}/service.sock"
    loader = make_loader(beton, address)
    list(loader)
    command = [sys.executable, "-m", "fastprune", "serve", "--status", address]
    found = json.loads(subprocess.check_output([*command, "--json"]))
    assert found["views_decoded"] == found["views_served"] == 112
    (client,) = found["clients"]
    assert client["epochs"] == 1
    assert client["position"] == 1.0
    table = subprocess.check_output(command, text=True)
    assert "decoded 112 views, served 112" in table
    nobody = subprocess.run([*command[:-1], "unix:/nowhere"], capture_output=True, check=False)
    assert nobody.returncode == 1
    assert b"no service answers at unix:/nowhere" in nobody.stderr


def test_the_layout_of_frames_is_as_documented():
    assert wire.REQUESTED.itemsize == 36
    assert wire.SLOT.itemsize == 16
    assert wire.frame(FrameKind.RELEASE, wire.NUMBER.pack(7)) == struct.pack("<III", 6, 4, 7)


def test_a_second_image_size_needs_its_share_of_the_memory(beton, serve):
    service = serve(beton)
    with greeted(beton, service.address), connect(service.address) as connection:
        connection.sendall(hello(beton, image_size=48))
        kind, payload = answer(connection)
        assert kind == FrameKind.REFUSED
        assert "views of 32 pixels; start it with --sizes 2" in json.loads(payload)["reason"]
    wait_for(lambda: not status(service.address)["clients"])
    # Views of a size that no client takes make room.
    assert_equal(
        make_loader(beton, service.address, image_size=48), make_loader(beton, "", image_size=48)
    )
    assert list(service.server.dispatcher.windows) == [48]
