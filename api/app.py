"""From services to a listening server, and from there to a clean end.

make_app wires routes and middlewares; ApiServer owns the listening socket and the drain: stop accepting, let
open requests finish for a bounded time, then end them with an error. What the process does with signals is
in __main__.py.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from api.errors import EngineUnavailable, Failure
from api.middleware import MIDDLEWARES, SERVER_NAME, add_headers
from api.routes import add_routes
from api.routes.health import PROBE, HealthProbe
from api.services import SERVICES, Services
from engine.errors import ConfigError

_log = logging.getLogger("octet.api")

BACKLOG = 1024  # connections the kernel keeps for us while the event loop is busy
LAST_WORDS_SECONDS = 2.0  # for the error that ends what is still open after the drain


def make_app(services: Services) -> web.Application:
    app = web.Application(middlewares=MIDDLEWARES, client_max_size=services.config.max_body_bytes)
    app[SERVICES] = services
    app[PROBE] = HealthProbe()
    app.on_response_prepare.append(add_headers)
    add_routes(app)
    return app


class JsonErrorHandler(RequestHandler):
    """One connection; what never reaches a handler (malformed HTTP) is answered in our error shape too."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status >= 500:
            _log.error("a connection failed outside of every handler", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer was already begun on this connection")
        if status < 500:
            failure = Failure(status, "This is not valid HTTP, or a header is too long.", code="bad_http")
        else:
            failure = Failure(status, "The server failed to handle this request.", code="internal_error")
        response = web.Response(
            status=status,
            body=failure.body(),
            headers={"Server": SERVER_NAME},
            content_type="application/json",
        )
        response.force_close()
        return response


class ApiServer:
    """The public port of one api process."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self._runner = web.AppRunner(
            make_app(services),
            handler_cancellation=True,  # a client that leaves cancels its handler
            access_log=None,
            shutdown_timeout=LAST_WORDS_SECONDS,
        )
        self._listener: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen, and return the port, which the kernel chose if the configured one is 0.

        Raises ConfigError when the port is taken.
        """
        await self._runner.setup()
        loop, config = asyncio.get_running_loop(), self.services.config
        try:
            self._listener = await loop.create_server(
                self._make_connection, config.host, config.port, backlog=BACKLOG, reuse_address=True
            )
        except OSError as error:
            raise ConfigError(
                f"Cannot listen on {config.host} port {config.port}: {error.strerror or error}. "
                "Choose another --port."
            ) from None
        port: int = self._listener.sockets[0].getsockname()[1]
        return port

    async def drain(self, seconds: float) -> None:
        """Stop accepting, give open requests `seconds` to finish, end the rest with an error."""
        admission = self.services.admission
        admission.is_draining = True
        if self._listener is not None:
            self._listener.close()
        if not await admission.until_empty(seconds):
            _log.warning("ending %d requests that are still open after %.0f s", admission.num_open, seconds)
            self.services.engine.fail_all(EngineUnavailable("The server is shutting down."))
            await admission.until_empty(LAST_WORDS_SECONDS)

    async def close(self) -> None:
        """Close every connection; whatever still runs is cancelled."""
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()

    def _make_connection(self) -> RequestHandler:
        manager = self._runner.server
        assert manager is not None
        options: dict[str, Any] = {"access_log": None, "keepalive_timeout": 75.0}
        return JsonErrorHandler(manager, loop=asyncio.get_running_loop(), **options)
