"""The service over Arrow Flight: the same bits, and only for those who may have them."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from fastprune.base.errors import InvalidValueError
from fastprune.beton.opening import open_beton
from fastprune.cli.service import serve as serve_command
from fastprune.service.address import Address, parse_address, parse_addresses
from fastprune.service.connection import ask_status
from fastprune.service.credentials import ClientCredentials, ServerCredentials
from fastprune.service.flight_listener import FlightChannel
from fastprune.service.server import Server
from tests.service.conftest import NUM_ROWS, free_port, listens, wait_for
from tests.service.test_bits import SUBSET, assert_equal, make_loader, no_fallback  # noqa: F401

TOKEN = "0123456789abcdef" * 2
LOOPBACK = ("grpc://127.0.0.1:0",)
TLS = ("grpc+tls://127.0.0.1:0",)


@pytest.fixture
def credentials(certificates):
    """A function that makes the credentials of a server with a certificate."""

    def make(**settings):
        files = [certificates / "server.pem", certificates / "server.key"]
        return ServerCredentials(*[path.read_bytes() for path in files], **settings)

    return make


@pytest.fixture
def trusting(certificates, monkeypatch):
    """Clients believe the servers' authority."""
    monkeypatch.setenv("FASTPRUNE_SERVICE_CA", str(certificates / "ca.pem"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"order": "pages", "open_pages": 2},
        {"tail": "exact", "batch_size": 7},
        {"tail": "pad", "batch_size": 70},
        {"fields": ("images", "second_images", "labels", "rows")},
        {"distributed": (0, 2), "tail": "pad"},
        {"distributed": (1, 2), "tail": "pad"},
        {"train": False, "augment": None, "image_size": 96},
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_fallback")
def test_batches_equal_a_local_loaders(beton, serve, settings):
    service = serve(beton, beside=LOOPBACK)
    local = make_loader(beton, "", SUBSET, **settings)
    remote = make_loader(beton, service.remote, SUBSET, **settings)
    for _ in range(2):
        assert_equal(remote, local)
    assert service.server.status()["views_decoded"] > 0


@pytest.mark.usefixtures("no_fallback")
def test_views_that_are_large_come_in_smaller_messages(beton, serve):
    service = serve(beton, beside=LOOPBACK, memory_bytes=128 << 20)
    settings = {"image_size": 600, "batch_size": 20}
    assert_equal(
        make_loader(beton, service.remote, SUBSET[:20], **settings),
        make_loader(beton, "", SUBSET[:20], **settings),
    )


@pytest.mark.usefixtures("no_fallback", "trusting")
def test_an_epoch_is_resumed_with_another_transport(beton, serve, credentials):
    service = serve(beton, beside=TLS, credentials=credentials(tokens=(TOKEN,)))
    whole, state, given = list(make_loader(beton, "")), None, []
    for where in ("", service.address, service.remote, ""):
        loader = make_loader(beton, where, token=TOKEN)
        if state is not None:
            loader.load_state_dict(state)
        batches = iter(loader)
        given += [next(batches)]
        state = loader.state_dict()
        batches.close()
    assert_equal(given, whole[:4])
    assert TOKEN not in str(state)


@pytest.mark.usefixtures("no_fallback")
def test_trainers_of_both_transports_share_every_view(beton, serve):
    service = serve(beton, beside=LOOPBACK)
    loaders = [make_loader(beton, a, tail="exact") for a in (service.address, service.remote)]
    for one, other in zip(*loaders, strict=True):
        assert_equal([one], [other])
    status = service.server.status()
    assert status["views_decoded"] == NUM_ROWS
    assert status["views_served"] == 2 * NUM_ROWS


@pytest.mark.usefixtures("no_fallback")
def test_a_small_memory_changes_no_bit(beton, serve):
    service = serve(beton, beside=LOOPBACK, memory_bytes=16 << 20)
    loaders = [make_loader(beton, where, image_size=160) for where in ("", service.remote)]
    assert_equal(*loaders)


@pytest.mark.usefixtures("no_fallback")
def test_views_that_were_displaced_before_they_were_sent_are_decoded_again(
    beton, serve, monkeypatch
):
    service = serve(beton, beside=LOOPBACK, memory_bytes=16 << 20)
    copied, displaced = FlightChannel._copy_views, []

    def displace(channel, request):
        if len(displaced) < 3:
            displaced.append(request.number)
            channel.slab.content[request.views[0].offset] ^= 1  # its generation
        return copied(channel, request)

    monkeypatch.setattr(FlightChannel, "_copy_views", displace)
    # A generation that was changed by force is restored, or the view would stay unusable.
    restored = FlightChannel._release

    def restore(channel, request, is_whole):
        if not is_whole:
            channel.slab.content[request.views[0].offset] ^= 1
        restored(channel, request, is_whole)

    monkeypatch.setattr(FlightChannel, "_release", restore)
    assert_equal(make_loader(beton, service.remote), make_loader(beton, ""))
    assert len(displaced) == 3


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("token", ["", "f" * 32])
def test_a_wrong_token_is_refused_and_batches_are_decoded_here(
    beton, serve, credentials, caplog, token
):
    service = serve(beton, beside=TLS, credentials=credentials(tokens=(TOKEN,)))
    with caplog.at_level(logging.DEBUG, "fastprune"):
        assert_equal(make_loader(beton, service.remote, token=token), make_loader(beton, ""))
    assert "it refuses the token. Pass its token" in caplog.text
    assert "f" * 32 not in caplog.text
    assert service.server.status()["views_served"] == 0


@pytest.mark.usefixtures("trusting", "no_fallback")
def test_the_environment_names_address_and_token(beton, serve, credentials, monkeypatch):
    service = serve(beton, beside=TLS, credentials=credentials(tokens=("e" * 16, TOKEN)))
    monkeypatch.setenv("FASTPRUNE_SERVICE", service.remote)
    monkeypatch.setenv("FASTPRUNE_SERVICE_TOKEN", TOKEN)
    assert_equal(make_loader(beton, None), make_loader(beton, ""))


@pytest.mark.usefixtures("trusting")
def test_client_certificates_are_asked_for(
    beton, serve, credentials, certificates, monkeypatch, caplog
):
    authorities = (certificates / "ca.pem").read_bytes()
    service = serve(beton, beside=TLS, credentials=credentials(authorities=authorities))
    for name, served in {None: 0, "stranger": 0, "client": 112}.items():
        if name is not None:
            monkeypatch.setenv("FASTPRUNE_SERVICE_CERT", str(certificates / f"{name}.pem"))
            monkeypatch.setenv("FASTPRUNE_SERVICE_KEY", str(certificates / f"{name}.key"))
        assert_equal(make_loader(beton, service.remote), make_loader(beton, ""))
        assert service.server.status()["views_served"] == served
    assert "the loading service at grpc+tls://127.0.0.1" in caplog.text


def test_a_server_of_another_authority_is_not_believed(
    beton, serve, credentials, certificates, monkeypatch, caplog
):
    monkeypatch.setenv("FASTPRUNE_SERVICE_CA", str(certificates / "other-ca.pem"))
    service = serve(beton, beside=TLS, credentials=credentials(tokens=(TOKEN,)))
    assert_equal(make_loader(beton, service.remote, token=TOKEN), make_loader(beton, ""))
    assert "does not trust the other's certificate" in caplog.text
    assert service.server.status()["views_served"] == 0


def test_the_systems_authorities_are_believed_without_others(
    beton, serve, credentials, certificates, monkeypatch
):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    service = serve(beton, beside=TLS, credentials=credentials(tokens=(TOKEN,)))
    assert ask_status(service.remote, token=TOKEN)["views_served"] == 0


@pytest.mark.usefixtures("trusting")
def test_plain_text_and_tls_do_not_mix(beton, serve, credentials, caplog):
    closed = serve(beton, beside=TLS, credentials=credentials(tokens=(TOKEN,)))
    plain = serve(beton, name="plain.sock", beside=LOOPBACK)
    for address in (
        closed.remote.replace("grpc+tls", "grpc"),
        plain.remote.replace("grpc", "grpc+tls"),
    ):
        caplog.clear()
        assert_equal(make_loader(beton, address), make_loader(beton, ""))
        assert f"the loading service at {address} cannot be used" in caplog.text


def test_a_token_never_crosses_the_network_in_plain_text(beton, monkeypatch):
    with pytest.raises(
        InvalidValueError, match=r"would cross the network to grpc://192\.0\.2\.1:8815"
    ):
        make_loader(beton, "grpc://192.0.2.1:8815", token=TOKEN)
    monkeypatch.setenv("FASTPRUNE_SERVICE_TOKEN", TOKEN)
    with pytest.raises(InvalidValueError, match=r"Use grpc\+tls://host:8815"):
        make_loader(beton, "unix:/x.sock,grpc://host:8815")
    assert TOKEN not in repr(ClientCredentials(TOKEN))


@pytest.mark.parametrize("token", ["short", "with a space in it!!", "ümlaut" * 4, "a\nb" * 10])
def test_what_cannot_be_a_token_is_refused_without_being_shown(beton, token):
    with pytest.raises(InvalidValueError, match="the service token must be 16 to") as refused:
        make_loader(beton, "grpc+tls://host:8815", token=token)
    assert token not in str(refused.value)


@pytest.mark.parametrize(
    ("address", "settings", "cure"),
    [
        ("grpc://0.0.0.0:8815", {}, "is plain text that others can read"),
        ("grpc://0.0.0.0:8815", {"tokens": (TOKEN,)}, "is plain text that others can read"),
        ("grpc+tls://0.0.0.0:8815", {}, "needs a certificate. Name --tls-cert"),
        ("grpc+tls://0.0.0.0:8815", {"certificate": b"x"}, "would serve everyone who reaches it"),
        ("grpc+tls://host:8815/train.beton", {}, "clients name the beton"),
        ("grpc://127.0.0.1:99999", {}, "is not an address of a loading service"),
        ("tcp://127.0.0.1:8815", {}, "is not an address of a loading service"),
    ],
)
def test_an_address_that_is_open_to_anybody_is_refused(beton, serve, address, settings, cure):
    with pytest.raises(InvalidValueError, match=cure):
        serve(beton, beside=[address], credentials=ServerCredentials(**settings))


def test_certificates_that_are_none_are_refused(certificates, tmp_path):
    (tmp_path / "none.pem").write_text("none")
    pair = [certificates / "server.pem", certificates / "server.key"]
    for files in (
        [pair[0], certificates / "client.key", None],
        [tmp_path / "none.pem", pair[1], None],
        [*pair, tmp_path / "none.pem"],
    ):
        with pytest.raises(InvalidValueError, match="is not PEM, or they do not belong together"):
            ServerCredentials.read(*files, None)


def test_insecure_addresses_can_be_asked_for():
    ServerCredentials(insecure=True).require_closed(parse_address("grpc://0.0.0.0:8815"))
    ServerCredentials().require_closed(parse_address("grpc://127.0.0.1:8815"))
    ServerCredentials().require_closed(parse_address("grpc://[::1]:8815"))


def test_addresses_are_read():
    assert parse_addresses("unix:/a,b.sock, grpc+tls://h:1,grpc://[::1]:2/train.beton") == (
        Address("unix", path="/a,b.sock"),
        Address("grpc+tls", host="h", port=1),
        Address("grpc", host="[::1]", port=2, beton="train.beton"),
    )


def test_a_port_in_use_is_refused(beton, serve):
    service = serve(beton, beside=LOOPBACK)
    second = Server([open_beton(beton)], service.remote, memory_bytes=16 << 20, num_workers=1)
    with pytest.raises(InvalidValueError, match=r"cannot be used: .*Address already in use"):
        asyncio.run(second.serve(asyncio.Event()))


def test_a_server_that_ends_answers_first_and_waits_for_no_idle_client(beton, serve, caplog):
    service = serve(beton, beside=LOOPBACK)
    loader = make_loader(beton, service.remote)
    list(loader)  # its session waits for the next epoch
    batches = iter(make_loader(beton, service.remote))
    got = [next(batches)]
    started = time.monotonic()
    service.stop()
    assert time.monotonic() - started < 10
    assert_equal(got + list(batches), make_loader(beton, ""))
    epochs = make_loader(beton, "")
    epochs.set_epoch(1)
    assert_equal(loader, epochs)


def test_status_over_the_network(beton, serve):
    service = serve(beton, beside=LOOPBACK)
    loader = make_loader(beton, service.remote)
    list(loader)
    found = ask_status(service.remote)
    assert found["views_served"] == 112
    (client,) = found["clients"]
    assert "ipv4:127.0.0.1:" in client["name"]


def test_the_command_serves_and_asks_over_tls(beton, serve_process, certificates, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\nanother-token-of-some-length\n")
    port = free_port()
    files = {"--tls-cert": "server.pem", "--tls-key": "server.key", "--client-ca": "ca.pem"}
    options = ["--listen", f"grpc+tls://127.0.0.1:{port}", "--token-file", tmp_path / "token"]
    options += [part for name, file in files.items() for part in (name, certificates / file)]
    process = serve_process(beton, options=options)
    wait_for(lambda: listens(tmp_path / "service.sock", port))
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(100) == b""
    command = [sys.executable, "-m", "fastprune", "serve", "--json", "--status", options[1]]
    environment = {
        "FASTPRUNE_SERVICE_CA": certificates / "ca.pem",
        "FASTPRUNE_SERVICE_CERT": certificates / "client.pem",
        "FASTPRUNE_SERVICE_KEY": certificates / "client.key",
    }
    environment = os.environ | {name: str(path) for name, path in environment.items()}
    command += ["--token-file", tmp_path / "token"]
    assert json.loads(subprocess.check_output(command, env=environment))["clients"] == []
    refused = subprocess.run(command[:-2], env=environment, capture_output=True, check=False)
    assert refused.returncode == 1
    assert b"it refuses the token" in refused.stderr
    process.terminate()
    output, _ = process.communicate(timeout=30)
    errors = (tmp_path / "service.log").read_bytes()
    assert (process.returncode, output) == (0, b"decoded 0 views, served 0\n")
    assert b"ssl" not in errors
    assert TOKEN.encode() not in errors


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        (["grpc://0.0.0.0:0"], "is plain text that others can read"),
        (["grpc+tls://127.0.0.1:0"], "needs a certificate. Name --tls-cert and --tls-key"),
        (["grpc+tls://127.0.0.1:0", "--tls-cert", "x"], "a certificate needs its key"),
        (["grpc+tls://h:0", "--tls-cert", "x", "--tls-key", "x"], "x cannot be read"),
        (["grpc://127.0.0.1:0", "--token-file", os.devnull], "cannot be read"),
    ],
    ids=range(5),
)
def test_the_command_says_what_is_missing(beton, options, cure):
    found = CliRunner().invoke(serve_command, [str(beton), "--listen", *options])
    assert cure in str(found.exception)
    assert isinstance(found.exception, InvalidValueError)
