"""GET /live: this process. /ready: may traffic come. /health: a round trip through every rank. /version."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from api.services import SERVICES
from api.version import VERSION
from engine.messages import Pong


class HealthProbe:
    """Asks the engine at most once at a time, however many probes come in: they need no key."""

    def __init__(self) -> None:
        self._running: asyncio.Task[Pong] | None = None

    async def check(self, request: web.Request) -> Pong:
        if self._running is None or self._running.done():
            services = request.app[SERVICES]
            self._running = asyncio.create_task(services.engine.ping(services.config.rank_timeout))
        return await asyncio.shield(self._running)


PROBE: web.AppKey[HealthProbe] = web.AppKey("health_probe", HealthProbe)


async def live(request: web.Request) -> web.Response:
    return _status(200, "live")


async def ready(request: web.Request) -> web.Response:
    services = request.app[SERVICES]
    if services.admission.is_draining:
        return _status(503, "stopping")
    state = services.engine.state
    return _status(200 if state.state == "ready" else 503, state.state, state.detail)


async def health(request: web.Request) -> web.Response:
    state = request.app[SERVICES].engine.state
    if state.state != "ready":
        return _status(503, state.state, state.detail)
    pong = await request.app[PROBE].check(request)
    return _status(200, "healthy") if pong.healthy else _status(503, "unhealthy", pong.detail)


async def version(request: web.Request) -> web.Response:
    return web.Response(body=msgspec.json.encode({"version": VERSION}), content_type="application/json")


def _status(status: int, word: str, detail: str = "") -> web.Response:
    body: dict[str, Any] = {"status": word}
    if detail:
        body["detail"] = detail
    headers = {"Retry-After": "5"} if status == 503 else {}
    return web.Response(
        status=status, body=msgspec.json.encode(body), content_type="application/json", headers=headers
    )
