"""What happens around every handler: an id, the API key, CORS, errors in one shape, one log line per failure.

Each middleware does one of these; MIDDLEWARES is their order, outermost first. Handlers raise, and nothing
but `observe` turns exceptions into responses.
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web

from api.errors import Failure, describe
from api.services import SERVICES
from engine.errors import RequestError
from engine.messages import RequestObserved

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_log = logging.getLogger("octet.api")

CLIENT_GONE = 499  # nginx's number for a client that closed the connection; only logs and metrics see it
PUBLIC_ROUTES = frozenset({"/live", "/ready", "/health"})  # probes of an orchestrator carry no key

_SANE_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_EXPOSED = "X-Request-Id, X-Client-Request-Id, X-Octet-Warning, Retry-After"
MAX_WARNED_FIELDS = 20


def warn(request: web.Request, unknown_fields: Iterable[str]) -> None:
    """Name fields that were ignored in the X-Octet-Warning header."""
    names = [ascii(name[:64]) for name in unknown_fields]
    if names:
        more = ", ..." if len(names) > MAX_WARNED_FIELDS else ""
        request["warning"] = f"unknown fields ignored: {', '.join(names[:MAX_WARNED_FIELDS])}{more}"


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request its id, turn exceptions into responses, count and log the outcome."""
    request["id"] = f"req-{secrets.token_hex(12)}"
    started = time.monotonic()
    status, failure = CLIENT_GONE, None
    try:
        response = await handler(request)
        status, failure = response.status, request.get("failure")
        if "exception" in request:
            _log_failure(request, failure, request["exception"])
    except ConnectionError:
        raise  # the client left in the middle of a write
    except Exception as error:
        failure = describe(error, request["id"])
        status = failure.status
        _log_failure(request, failure, error if failure.is_ours else None)
        response = _error_response(failure, error)
    finally:
        _report(request, status, time.monotonic() - started, failure)
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
    """With keys configured, everything but the probes needs one; unknown paths too."""
    keys = request.app[SERVICES].config.api_keys
    if keys and request.path not in PUBLIC_ROUTES and not _has_key(request, keys):
        raise RequestError(
            "This server needs an API key: send it as `Authorization: Bearer KEY`.",
            status=401,
            code="invalid_api_key",
        )
    return await handler(request)


MIDDLEWARES = (observe, answer_preflight, check_key)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: what every response carries, streams and errors included."""
    headers = response.headers
    headers["X-Request-Id"] = request.get("id", "none")
    headers["Access-Control-Allow-Origin"] = "*"
    headers["Access-Control-Expose-Headers"] = _EXPOSED
    if _SANE_ID.fullmatch(given := request.headers.get("X-Request-Id", "")):
        headers["X-Client-Request-Id"] = given
    if "warning" in request:
        headers["X-Octet-Warning"] = request["warning"]


def _has_key(request: web.Request, keys: Iterable[str]) -> bool:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        return False
    key = given.strip().encode("utf-8", "surrogateescape")
    matches = [hmac.compare_digest(key, known.encode()) for known in keys]
    return any(matches)  # after comparing with all of them


def _error_response(failure: Failure, error: Exception) -> web.Response:
    headers = failure.headers()
    if isinstance(error, web.HTTPMethodNotAllowed):
        headers["Allow"] = ", ".join(sorted(error.allowed_methods))
    if failure.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(
        status=failure.status, body=failure.body(), headers=headers, content_type="application/json"
    )


def _log_failure(request: web.Request, failure: Failure | None, error: BaseException | None) -> None:
    message = failure.message if failure else "unknown"
    status = failure.status if failure else 500
    level = logging.ERROR if error is not None else logging.WARNING if status >= 500 else logging.INFO
    line = "%s %s %d %s: %.300s"
    given = request.headers.get("X-Request-Id", "")
    request_id = f"{request['id']} (client's {given})" if _SANE_ID.fullmatch(given) else request["id"]
    _log.log(level, line, request.method, _route(request), status, request_id, message, exc_info=error)


def _report(request: web.Request, status: int, seconds: float, failure: Failure | None) -> None:
    prompts = request.get("prompts", ())
    request.app[SERVICES].engine.observe(
        RequestObserved(
            route=_route(request),
            status=failure.status if failure else status,
            seconds=seconds,
            error_type=(failure.code or failure.type) if failure else "",
            num_images=sum(prompt.num_images for prompt in prompts),
            num_videos=sum(prompt.num_videos for prompt in prompts),
            media_seconds=sum(prompt.media_seconds for prompt in prompts),
        )
    )


def _route(request: web.Request) -> str:
    """The pattern of the route, so that what clients invent never becomes a metric label."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unmatched"
