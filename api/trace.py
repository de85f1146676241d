"""What one HTTP request is known by, from its first middleware to its log line and its metrics."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from aiohttp import web

from api.errors import Failure
from api.prompt import Prompt


@dataclass
class Trace:
    """Filled by whoever learns something; read when the request ends."""

    id: str = field(default_factory=lambda: f"req-{secrets.token_hex(12)}")
    warning: str = ""  # goes into the X-Octet-Warning header
    prompts: list[Prompt] = field(default_factory=list)
    stream_seconds: float = 0.0  # that a stream waited until its client took the text
    api_key: str = ""  # the one that let it in; empty when the server has none
    failure: Failure | None = None  # sent to the client, as a response or inside a stream
    exception: BaseException | None = None  # the cause, when it is ours and its traceback belongs in the log


TRACE: web.RequestKey[Trace] = web.RequestKey("trace", Trace)
