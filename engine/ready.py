"""Asks the public port until it says ready, then prints the one line that a newcomer needs."""

from __future__ import annotations

import asyncio
import logging

from engine.config import ServerConfig
from engine.progress import count_ranks, seconds_since

_INTERVAL = 0.1  # seconds between questions
_PATIENCE = 5.0  # seconds for one answer
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}

log = logging.getLogger(__name__)


async def announce_when_ready(config: ServerConfig, began: float) -> None:
    """Returns after the line is printed."""
    while not await is_ready(reachable_host(config), config.port):  # noqa: ASYNC110 (another process's news)
        await asyncio.sleep(_INTERVAL)
    log.info("ready after %s: %s", seconds_since(began), ready_line(config))


def ready_line(config: ServerConfig) -> str:
    host = reachable_host(config)
    address = f"http://{f'[{host}]' if ':' in host else host}:{config.port}"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if config.api_keys else ""
    question = '{"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32}'
    what = f"{config.display_name} in {config.quantization} on {count_ranks(config.tensor_parallel_size)}"
    json = "-H 'Content-Type: application/json'"
    return f"{what}; try: curl {address}/v1/chat/completions{key} {json} -d '{question}'"


def reachable_host(config: ServerConfig) -> str:
    """An address under which this machine reaches a server that listens on `config.host`."""
    return _EVERYWHERE.get(config.host, config.host)


async def is_ready(host: str, port: int) -> bool:
    """Whether GET /ready says 200; any trouble is a no."""
    asking = asyncio.create_task(_get_ready(host, port))
    try:
        # Not wait_for: before Python 3.12 it can swallow a cancellation that comes with the answer.
        done, _ = await asyncio.wait([asking], timeout=_PATIENCE)
        return bool(done) and asking.result().split()[1:2] == [b"200"]
    finally:
        asking.cancel()


async def _get_ready(host: str, port: int) -> bytes:
    """The status line, empty when there is none."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return b""
    try:
        writer.write(f"GET /ready HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return await reader.readline()
    except (OSError, ValueError):
        return b""
    finally:
        writer.close()
