"""What a client sees when something fails: one OpenAI-shaped object, with or without a stream around it.

`describe` turns any exception into a Failure; middleware.py makes a response of it, stream.py an SSE chunk.
The caller's mistakes keep their sentence. Ours keep theirs only if they were raised on purpose; anything
else becomes a generic sentence, and the details go to the log alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

import msgspec
from aiohttp import web

from engine.errors import EngineError, RequestError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_SENTENCES = {
    404: ("There is no such route on this server.", "not_found"),
    405: ("This route does not take that method.", "method_not_allowed"),
    413: ("The body is larger than this server accepts.", "body_too_large"),
}


class EngineUnavailable(EngineError):
    """The engine is not there to answer: starting, failed or leaving."""

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds


class ClientGone(Exception):
    """The connection ended before the answer did; nobody is left to tell."""


@dataclass(frozen=True)
class Failure:
    """One failed request as its client sees it."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None
    is_ours: bool = False  # unexpected: log it with a traceback

    @property
    def type(self) -> str:
        if self.status >= 500:
            return "server_error"
        return _TYPES.get(self.status, "invalid_request_error")

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def describe(error: BaseException, request_id: str) -> Failure:
    """The failure that `error` is for the client of request `request_id`."""
    if isinstance(error, RequestError):
        return Failure(error.status, error.message, error.param, error.code, error.retry_after)
    if isinstance(error, EngineUnavailable):
        return Failure(503, str(error), code="engine_unavailable", retry_after=error.retry_after)
    if isinstance(error, EngineError):
        return Failure(500, str(error), code="engine_error")
    if isinstance(error, web.HTTPException) and error.status < 500:
        sentence, code = _SENTENCES.get(error.status, (f"{HTTPStatus(error.status).phrase}.", "http_error"))
        return Failure(error.status, sentence, code=code)
    message = f"The server failed to handle this request. The operator finds details under {request_id}."
    return Failure(500, message, code="internal_error", is_ours=True)
