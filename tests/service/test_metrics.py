"""Metrics and health over HTTP."""

import urllib.error
import urllib.request

import pytest

from fastprune.base.errors import InvalidValueError
from tests.service.conftest import wait_for
from tests.service.test_bits import make_loader

pytest.importorskip("prometheus_client")


def get(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.read().decode()


def test_metrics_and_health_are_served(beton, serve):
    service = serve(beton, metrics="127.0.0.1:0")
    wait_for(lambda: service.server.metrics is not None)
    port = service.server.metrics.port
    loader = make_loader(beton, service.address)
    list(loader)
    lines = get(port, "/metrics").splitlines()
    assert "fastprune_views_decoded_total 112.0" in lines
    assert "fastprune_views_served_total 112.0" in lines
    assert "fastprune_clients 1.0" in lines
    assert get(port, "/healthz") == "ok\n"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(port, "/other")


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:x", "127.0.0.1:99999", "a.invalid:80"])
def test_an_address_that_cannot_be_used_is_named(beton, tmp_path, address):
    import asyncio

    from fastprune.beton.opening import open_beton
    from fastprune.service.server import Server

    server = Server(
        [open_beton(beton)],
        f"unix:{tmp_path}/service.sock",
        memory_bytes=8 << 20,
        num_workers=1,
        metrics=address,
    )
    with pytest.raises(InvalidValueError, match=r"--metrics .* cannot be used .*HOST:PORT"):
        asyncio.run(server.run())
    assert not (tmp_path / "service.sock").exists()
