"""What a service tells monitors over HTTP: Prometheus metrics at /metrics, and /healthz."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from fastprune.base.errors import InvalidValueError, MissingDependencyError

_ANSWER_SECONDS = 5.0


class _HttpServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    timeout = 10  # of a peer that connects and says nothing

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing: probes come every few seconds."""


class Monitor:
    """An HTTP server in threads of its own.

    Attributes:
        port: the one it listens at.
    """

    def __init__(
        self, address: str, status: Callable[[], dict[str, Any]], loop: asyncio.AbstractEventLoop
    ):
        """Listen.

        Args:
            address: HOST:PORT.
            status: `Server.status`.
            loop: the event loop in which it may be called.

        Raises:
            InvalidValueError: the address cannot be used.
            MissingDependencyError: prometheus-client is not installed.
        """
        try:
            from prometheus_client import CollectorRegistry, make_wsgi_app
        except ImportError as error:
            raise MissingDependencyError(
                f"--metrics needs the package prometheus-client ({error}). Install it with "
                "fastprune's extra `service`."
            ) from error
        self._status, self._loop = status, loop
        registry = CollectorRegistry()
        registry.register(self)
        self._metrics = make_wsgi_app(registry)
        host, _, port = address.rpartition(":")
        try:
            self._server = make_server(
                host.strip("[]"), int(port), self._answer, _HttpServer, _QuietHandler
            )
        except (OSError, OverflowError, ValueError) as error:
            raise InvalidValueError(
                f"--metrics {address} cannot be used ({error}). Write HOST:PORT, such as "
                "127.0.0.1:9464."
            ) from error
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def collect(self) -> Iterator[Any]:
        """Yield the metrics of this moment, for Prometheus."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        found = self._ask()
        counters = {
            "views_decoded": "Views decoded, also those that could not be.",
            "views_served": "Views that clients got.",
            "detached": "How often a silent client was detached.",
            "fallbacks": "How often a client came back after it had decoded by itself.",
        }
        for name, text in counters.items():
            yield CounterMetricFamily(f"fastprune_{name}", text, value=found[name])
        for name in ("window_bytes", "memory_bytes", "window_views"):
            yield GaugeMetricFamily(f"fastprune_{name}", f"The status's {name}.", value=found[name])
        number = len(found["clients"])
        yield GaugeMetricFamily("fastprune_clients", "Clients connected.", value=number)

    def _ask(self) -> dict[str, Any]:
        """The status, from the thread that owns it; that it answers shows that it is alive."""

        async def ask() -> dict[str, Any]:
            return self._status()

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result(_ANSWER_SECONDS)

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Answer one request."""
        if environ["PATH_INFO"] == "/metrics":
            return self._metrics(environ, start_response)
        line, body = "404 Not Found", b"/metrics or /healthz\n"
        if environ["PATH_INFO"] == "/healthz":
            try:
                self._ask()
                line, body = "200 OK", b"ok\n"
            except TimeoutError:
                line, body = "503 Service Unavailable", b"the event loop does not answer\n"
        start_response(line, [("Content-Type", "text/plain")])
        return [body]
