"""Server-sent events: the deltas of a generation written to one connection as they arrive.

All that is queued goes out in one write, and nothing ever waits for more. The status line is sent with
the first delta, so a request that fails before it still gets a real HTTP error; during a long prefill
comments keep the connection alive. How a chunk looks is in render.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from aiohttp import web

from api.errors import describe
from api.generation import Generation
from api.render import DONE, Renderer, sse
from api.trace import TRACE

KEEP_ALIVE_SECONDS = 10.0  # of silence, then a comment is written; proxies give up after 30 to 60
KEEP_ALIVE = b": waiting\n\n"

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would collect events otherwise
}


class Alarm:
    """Calls back after every `seconds` of silence; costs nothing per write."""

    def __init__(self, seconds: float, ring: Callable[[], None]) -> None:
        self._seconds, self._ring = seconds, ring
        self._loop = asyncio.get_running_loop()
        self._last_write = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._check)

    def written(self) -> None:
        self._last_write = self._loop.time()

    def stop(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        silent = self._loop.time() - self._last_write
        if silent >= self._seconds:
            self._ring()
            silent = 0.0
        self._timer = self._loop.call_later(self._seconds - silent, self._check)


async def stream_answer(
    request: web.Request, generation: Generation, renderer: Renderer, keep_alive: float = KEEP_ALIVE_SECONDS
) -> web.StreamResponse:
    """Write the whole generation; raises what `generation.next` raises while nothing was written yet."""
    response = web.StreamResponse(headers=_HEADERS)
    alarm = Alarm(keep_alive, generation.wake)
    try:
        while not generation.is_finished:
            deltas = await generation.next()
            data = renderer.chunks(deltas) if deltas else KEEP_ALIVE
            if generation.is_finished:
                data += renderer.last_chunk() + DONE
            if data:
                began = time.monotonic()
                await _write(request, response, data)
                generation.stopwatch.stream_seconds += time.monotonic() - began
                alarm.written()
    except Exception as error:
        if not response.prepared or isinstance(error, ConnectionError):
            raise
        await _write_error(request, response, error)
    finally:
        alarm.stop()
        request[TRACE].stream_seconds = generation.stopwatch.stream_seconds
    return response


async def _write(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    if not response.prepared:
        await response.prepare(request)
    await response.write(data)


async def _write_error(request: web.Request, response: web.StreamResponse, error: Exception) -> None:
    """Too late for a status: an error object as an event, then the end. The middleware reports it."""
    trace = request[TRACE]
    trace.failure = failure = describe(error, trace.id)
    trace.exception = error if failure.is_ours else None
    await response.write(sse(failure.body()) + DONE)
