"""Plays conversations against a server and notes what a client sees: when each token came, and the text."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.bench.serving_load import FLOOD, Conversation

_PATIENCE = aiohttp.ClientTimeout(total=3600, sock_connect=30)


@dataclass
class Record:
    """One request as its client saw it; times are seconds after the start of the run."""

    conversation: str
    tenant: str
    turn: int
    sent: float
    arrivals: list[float] = field(default_factory=list)  # of chunks with text
    ended: float = 0.0
    text: str = ""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def first_token(self) -> float:
        """Seconds from sending to the first text."""
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


class Client:
    """Speaks to one server; `play` runs a whole load and returns its records."""

    def __init__(self, address: str, api_key: str = "") -> None:
        self._url = f"{address}/v1/chat/completions"
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._records: list[Record] = []

    async def play(self, load: Sequence[Conversation], num_clients: int) -> list[Record]:
        """Closed loop: `num_clients` each take the next conversation when theirs has ended; 0: an open loop,
        in which each begins at its time whatever the others do. The flood always begins at its time.
        """
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=_PATIENCE, connector=connector) as self._http:
            self._started = time.perf_counter()
            timed = [one for one in load if one.tenant == FLOOD or not num_clients]
            remaining = iter([one for one in load if one.tenant != FLOOD and num_clients])
            await asyncio.gather(
                *[self._at_its_time(conversation) for conversation in timed],
                *[self._work_through(remaining) for _ in range(num_clients)],
            )
        return self._records

    async def _work_through(self, remaining: Iterator[Conversation]) -> None:
        for conversation in remaining:
            await self._converse(conversation)

    async def _at_its_time(self, conversation: Conversation) -> None:
        await asyncio.sleep(conversation.begins - self._now())
        await self._converse(conversation)

    async def _converse(self, conversation: Conversation) -> None:
        """Turn after turn; each answer becomes part of the next prompt."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": conversation.system}]
        for number, turn in enumerate(conversation.turns):
            messages.append({"role": "user", "content": turn.content})
            record = Record(conversation.name, conversation.tenant, number, self._now())
            self._records.append(record)
            try:
                await self._ask(record, messages, turn.num_tokens)
            except (aiohttp.ClientError, asyncio.TimeoutError, RuntimeError, json.JSONDecodeError) as error:
                record.error = f"{type(error).__name__}: {error}"[:300]
                return
            finally:
                record.ended = self._now()
            messages.append({"role": "assistant", "content": record.text})

    async def _ask(self, record: Record, messages: list[dict[str, Any]], num_tokens: int) -> None:
        body = {
            "messages": messages,
            "max_tokens": num_tokens,
            "ignore_eos": True,  # every run generates the same number of tokens
            "temperature": 0,
            "enable_thinking": False,
            "user": record.tenant,
            "stream": True,
            "stream_options": {"include_usage": True},
            "timings": True,
        }
        async with self._http.post(self._url, json=body, headers=self._headers) as answer:
            if answer.status != 200:
                raise RuntimeError(f"{answer.status} {(await answer.text())[:200]}")
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    self._take(record, json.loads(line[6:]))
        if record.num_output_tokens != num_tokens:
            raise RuntimeError(f"asked for {num_tokens} tokens, got {record.num_output_tokens}")

    def _take(self, record: Record, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            raise RuntimeError(chunk["error"]["message"])
        if usage := chunk.get("usage"):
            record.num_prompt_tokens = usage["prompt_tokens"]
            record.num_output_tokens = usage["completion_tokens"]
            record.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        record.timings = chunk.get("timings") or record.timings
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if text := (delta.get("reasoning_content") or "") + (delta.get("content") or ""):
                record.text += text
                record.arrivals.append(self._now())

    def _now(self) -> float:
        return time.perf_counter() - self._started
