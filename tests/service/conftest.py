"""A beton with a manifest, and services of it: in a thread, and in a process to kill."""

import asyncio
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastprune.beton.convert.writer import convert
from fastprune.beton.opening import open_beton
from fastprune.service.server import Server
from tests.images import write_image_folder

NUM_ROWS = 120


@pytest.fixture(scope="session")
def beton(tmp_path_factory) -> Path:
    """120 rows of three classes, of different sizes."""
    folder = tmp_path_factory.mktemp("served")
    write_image_folder(folder / "images", classes=3, per_class=NUM_ROWS // 3)
    convert(folder / "images", folder / "train.beton", workers=1)
    return folder / "train.beton"


class ServiceThread:
    """A server in a thread, whose window a test may look into.

    `address` is the one on this machine, `remote` the first beside it.
    """

    def __init__(self, betons, path, *, beside=(), **settings):
        self.address = f"unix:{path}"
        defaults = {"memory_bytes": 64 << 20, "num_workers": 2}
        self.server = Server(
            [open_beton(beton) for beton in betons],
            self.address,
            *beside,
            **{**defaults, **settings},
        )
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),))
        self._thread.start()
        listeners = self.server.listeners
        wait_for(
            lambda: path.exists() and not any(each.address.endswith(":0") for each in listeners)
        )
        self.remote = listeners[-1].address

    async def _serve(self):
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        await self.server.serve(self._stopping)

    def stop(self):
        """End the server as SIGTERM does."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(30)
            assert not self._thread.is_alive()


@pytest.fixture
def serve(tmp_path):
    """A function that starts a server in a thread."""
    started = []

    def start(*betons, name="service.sock", **settings):
        started.append(ServiceThread(betons, tmp_path / name, **settings))
        return started[-1]

    yield start
    for service in started:
        service.stop()


@pytest.fixture
def serve_process(tmp_path):
    """A function that starts `fastprune serve`."""
    started = []

    def start(*betons, name="service.sock", port=None, options=()):
        path = tmp_path / name
        if port is not None:
            options = ["--listen", f"grpc://127.0.0.1:{port}", *options]
        command = [sys.executable, "-m", "fastprune", "serve", *map(str, betons), "--listen"]
        command += [f"unix:{path}", "--memory", "64MiB", "--workers", "2", *options]
        # Into a file: a pipe that no one reads would fill up with the log, and stop the server.
        log = path.with_suffix(".log")
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file)
        started.append(process)
        wait_for(lambda: listens(path, port) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory) -> Path:
    """A folder with authorities ca.pem and other-ca.pem, and with server.pem and client.pem."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make certificates")
    folder = tmp_path_factory.mktemp("certificates")
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    make += ["-nodes", "-days", "2"]
    for name, authority in {
        "ca": None,
        "other-ca": None,
        "server": "ca",
        "client": "ca",
        "stranger": "other-ca",
    }.items():
        command = [*make, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}"]
        if authority is not None:
            command += ["-CA", f"{authority}.pem", "-CAkey", f"{authority}.key"]
            command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def cached_views(service):
    """All views in the windows of a service in a thread."""
    windows = service.server.dispatcher.windows.values()
    return [view for window in windows for view in window.views.values()]


def listens(path, port=None):
    """Whether a server accepts connections, rather than left its socket behind."""
    with socket.socket(socket.AF_UNIX) as probe, socket.socket() as remote:
        return probe.connect_ex(str(path)) == 0 and (
            port is None or remote.connect_ex(("127.0.0.1", port)) == 0
        )


def free_port():
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_for(condition, seconds=60.0):
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never held"
        time.sleep(0.01)
