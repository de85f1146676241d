"""What happens around every handler: an id, the API key, CORS, errors in one shape, one log line per failure.

Each middleware does one of these; MIDDLEWARES is their order, outermost first. Handlers raise, and nothing
but `observe` turns exceptions into responses.
"""

from __future__ import annotations

import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web

from api.errors import Failure, describe
from api.services import SERVICES
from api.trace import TRACE, Trace
from engine.errors import RequestError
from engine.messages import RequestObserved

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_log = logging.getLogger("octet.api")

CLIENT_GONE = 499  # nginx's number for a client that closed the connection; only logs and metrics see it
PUBLIC_ROUTES = frozenset({"/live", "/ready", "/health"})  # probes of an orchestrator carry no key
PAGE, PAGE_FILES = "/", "/static/"  # the chat page loads without one, then asks for it

SERVER_NAME = "octet"  # instead of which libraries, in which versions

_SANE_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_EXPOSED = "X-Request-Id, X-Client-Request-Id, X-Octet-Warning, Retry-After"
MAX_WARNED_FIELDS = 20


def warn(request: web.Request, unknown_fields: Iterable[str]) -> None:
    """Name fields that were ignored in the X-Octet-Warning header."""
    names = [ascii(name[:64]) for name in unknown_fields]
    if names:
        more = ", ..." if len(names) > MAX_WARNED_FIELDS else ""
        request[TRACE].warning = f"unknown fields ignored: {', '.join(names[:MAX_WARNED_FIELDS])}{more}"


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request its id, turn exceptions into responses, count and log the outcome."""
    trace = request[TRACE] = Trace()
    started = time.monotonic()
    status = CLIENT_GONE
    try:
        response = await handler(request)
        status = response.status
    except ConnectionError:
        raise  # the client left in the middle of a write
    except Exception as error:
        trace.failure = describe(error, trace.id)
        trace.exception = error if trace.failure.is_ours else None
        response = _error_response(trace.failure, error)
    finally:
        if trace.failure is not None:
            status = trace.failure.status
            _log_failure(request, trace, trace.failure)
        _report(request, trace, status, time.monotonic() - started)
    return response


@web.middleware
async def answer_preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A browser asks before it sends a key or JSON to another origin; any origin may."""
    if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
        return await handler(request)
    asked = request.headers.get("Access-Control-Request-Headers", "Authorization, Content-Type")
    return web.Response(
        status=204,
        headers={
            "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": asked,
            "Access-Control-Max-Age": "86400",
        },
    )


@web.middleware
async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
    """With keys configured, everything but the probes and the page's files needs one; unknown paths too."""
    keys = request.app[SERVICES].config.api_keys
    if keys and not is_public(request.path):
        request[TRACE].api_key = _known_key(request, keys)
    return await handler(request)


def is_public(path: str) -> bool:
    return path in PUBLIC_ROUTES or path == PAGE or path.startswith(PAGE_FILES)


MIDDLEWARES = (observe, answer_preflight, check_key)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: what every response carries, streams and errors included."""
    headers = response.headers
    trace = request.get(TRACE) or Trace()  # none when the request was no HTTP
    headers["X-Request-Id"] = trace.id
    headers["Server"] = SERVER_NAME
    headers["Access-Control-Allow-Origin"] = "*"
    headers["Access-Control-Expose-Headers"] = _EXPOSED
    if _SANE_ID.fullmatch(given := request.headers.get("X-Request-Id", "")):
        headers["X-Client-Request-Id"] = given
    if trace.warning:
        headers["X-Octet-Warning"] = trace.warning


def _known_key(request: web.Request, keys: Iterable[str]) -> str:
    """The configured key that the request carries; RequestError 401 without one."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    key = given.strip().encode("utf-8", "surrogateescape") if scheme.lower() == "bearer" else b""
    matches = [known for known in keys if hmac.compare_digest(key, known.encode())]  # compares with all
    if not matches:
        raise RequestError(
            "This server needs an API key: send it as `Authorization: Bearer KEY`.",
            status=401,
            code="invalid_api_key",
        )
    return matches[0]


def _error_response(failure: Failure, error: Exception) -> web.Response:
    headers = failure.headers()
    if isinstance(error, web.HTTPMethodNotAllowed):
        headers["Allow"] = ", ".join(sorted(error.allowed_methods))
    if failure.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(
        status=failure.status, body=failure.body(), headers=headers, content_type="application/json"
    )


def _log_failure(request: web.Request, trace: Trace, failure: Failure) -> None:
    level = logging.INFO if failure.status < 500 else logging.WARNING
    if trace.exception is not None:
        level = logging.ERROR
    given = request.headers.get("X-Request-Id", "")
    request_id = f"{trace.id} (client's {given})" if _SANE_ID.fullmatch(given) else trace.id
    line, route = "%s %s %d %s: %.300s", _route(request)
    values = (request.method[:10], route, failure.status, request_id, failure.message)
    _log.log(level, line, *values, exc_info=trace.exception)


def _report(request: web.Request, trace: Trace, status: int, seconds: float) -> None:
    failure = trace.failure
    request.app[SERVICES].engine.observe(
        RequestObserved(
            route=_route(request),
            status=status,
            seconds=seconds,
            error_type=(failure.code or failure.type) if failure else "",
            num_images=sum(prompt.num_images for prompt in trace.prompts),
            num_videos=sum(prompt.num_videos for prompt in trace.prompts),
            media_seconds=sum(prompt.media_seconds for prompt in trace.prompts),
            stream_seconds=trace.stream_seconds,
        )
    )


def _route(request: web.Request) -> str:
    """The pattern of the route, so that what clients invent never becomes a metric label."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unmatched"
