"""The three kinds of failure, by who has to act.

(1) `RequestError`: the caller asked for something impossible; it becomes a 4xx and always reaches the client.
(2) No room right now is not an error: functions named `try_*` return None and the next step tries again.
(3) `EngineError`: our mistake or a dead worker; it is logged once and ends the process.
"""

from __future__ import annotations


class OctetError(Exception):
    """Base of every error that Octet raises on purpose."""


class RequestError(OctetError):
    """The request cannot be served as written; `message` says what is wrong and what to do.

    param   path of the offending field, as in `messages[0].content[1].image_url`
    status  HTTP status, 400 unless the cause has a better one (404, 413, 429)
    code    a short machine-readable word for OpenAI's `error.code`
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code
        self.retry_after = retry_after  # seconds; sent as Retry-After with 429 and 503


class ConfigError(OctetError):
    """A flag, config file or checkpoint is wrong; the server does not start. One clear sentence."""


class EngineError(OctetError):
    """Octet itself or one of its processes failed; open requests get a 5xx and the server stops."""
