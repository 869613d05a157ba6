"""Prometheus metrics of a service at /metrics, and its health at /healthz, over HTTP."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from fastprune.base.errors import InvalidValueError, MissingDependencyError

_ANSWER_SECONDS = 5.0
_COUNTERS = {
    "views_decoded": "Views decoded, and those that could not be.",
    "views_served": "Views that clients received.",
    "detached": "How often a silent client was detached.",
    "fallbacks": "How often a client came back after it had decoded by itself.",
}
_GAUGES = {
    "window_bytes": "Memory that holds decoded views.",
    "memory_bytes": "Most memory for decoded views.",
    "window_views": "Decoded views in memory.",
}


class _HttpServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    timeout = 10  # for a peer that connects and sends nothing

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Log nothing: probes come every few seconds."""


class MetricsServer:
    """An HTTP server in threads of its own.

    Attributes:
        port: where it listens.
    """

    def __init__(
        self, address: str, status: Callable[[], dict[str, Any]], loop: asyncio.AbstractEventLoop
    ):
        """Listen.

        Args:
            address: HOST:PORT.
            status: `Server.status`.
            loop: the event loop, in which alone it may be called.

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
        """Yield the metrics of this moment; called by Prometheus' client."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        found = self._ask_status()
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"fastprune_{name}", text, value=found[name])
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"fastprune_{name}", text, value=found[name])
        number = len(found["clients"])
        yield GaugeMetricFamily("fastprune_clients", "Clients connected.", value=number)

    def _ask_status(self) -> dict[str, Any]:
        """Get the status from the event loop; an answer shows that the loop is not stuck."""

        async def ask() -> dict[str, Any]:
            return self._status()

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result(_ANSWER_SECONDS)

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Answer one request (WSGI)."""
        if environ["PATH_INFO"] == "/metrics":
            return self._metrics(environ, start_response)
        line, body = "404 Not Found", b"/metrics or /healthz\n"
        if environ["PATH_INFO"] == "/healthz":
            try:
                self._ask_status()
                line, body = "200 OK", b"ok\n"
            except TimeoutError:
                line, body = "503 Service Unavailable", b"the event loop does not answer\n"
        start_response(line, [("Content-Type", "text/plain")])
        return [body]
