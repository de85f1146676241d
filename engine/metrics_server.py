"""The metrics port: GET /metrics for Prometheus, and the debug pages as JSON.

Runs in threads of its own. Pages look into the scheduler, so they are made in the engine's thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from engine.debug_pages import Page
from engine.errors import ConfigError
from engine.metrics import Metrics

_PATIENCE = 10.0  # seconds a page waits for the engine's thread


class MetricsServer:
    """Listens from the start; `show` adds the pages once there is something to see.

    Made in the engine's thread while its event loop runs.
    """

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._metrics_app: Any = make_wsgi_app(metrics.registry)
        self._pages: dict[str, Page] = {}
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            kind = type("_Server", (_ThreadingServer,), {"address_family": family})
            self._server: WSGIServer = make_server(str(address[0]), port, self._answer, kind, _SilentHandler)
        except OSError as error:
            raise ConfigError(f"--metrics-port {port} cannot be used on {host}: {error.strerror}") from None
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def show(self, pages: Mapping[str, Page]) -> None:
        self._pages = dict(pages)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if not path.startswith("/debug"):
            return self._metrics_app(environ, start)
        page = self._pages.get(path)
        if page is None:
            return _json(start, "404 Not Found", {"pages": sorted(self._pages)})
        try:
            return _json(start, "200 OK", self._in_the_engine(page))
        except concurrent.futures.TimeoutError:
            return _json(start, "503 Service Unavailable", {"error": "the engine is busy"})

    def _in_the_engine(self, page: Page) -> dict[str, Any]:
        """Between two callbacks of the event loop the books are never half written."""
        made: concurrent.futures.Future[dict[str, Any]] = concurrent.futures.Future()

        def make() -> None:
            try:
                made.set_result(page())
            except Exception as error:
                made.set_exception(error)

        self._loop.call_soon_threadsafe(make)
        return made.result(_PATIENCE)


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A line per scrape would drown the log."""


def _json(start: Callable[..., Any], status: str, content: dict[str, Any]) -> list[bytes]:
    body = json.dumps(content, indent=1).encode() + b"\n"
    start(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
