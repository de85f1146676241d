"""An engine that speaks the real sockets and says what the test wants, and media without decoding."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from api.media.loader import LoadedMedia, MediaPart
from engine.channels import Codec, RunDirectory, open_socket
from engine.messages import (
    AbortRequest,
    AddRequest,
    EngineState,
    Ping,
    Pong,
    RequestObserved,
    RequestOutput,
    ToApi,
    ToEngine,
    TokenBatch,
    TokenLogprobs,
)

Script = Callable[[AddRequest], Iterator[RequestOutput]]
Kind = TypeVar("Kind", AbortRequest, AddRequest, Ping, RequestObserved)
PATIENCE = 20.0  # seconds until a test that waits for a message fails


class FakeEngine:
    """ROUTER and XPUB of the engine. With a script it answers each AddRequest, one batch per output;
    without one the test calls `send`.
    """

    def __init__(self, directory: RunDirectory, script: Script | None = None) -> None:
        self.script = script
        self.is_healthy = True
        self.answers_pings = True
        self.num_pings = 0
        self.live: dict[str, AddRequest] = {}  # sequences that have neither finished nor been aborted
        self.added: list[AddRequest] = []
        self.aborted: list[str] = []
        self.observed: list[RequestObserved] = []
        self.sequence = 0
        self._state = EngineState("ready", num_blocks=100, block_size=64)
        self._context = zmq.asyncio.Context()
        self._requests = open_socket(self._context, zmq.ROUTER, directory.api_address, bind=True)
        self._tokens = open_socket(self._context, zmq.XPUB, directory.tokens_address, bind=True)
        self._topic = b""
        self._from_api: Codec[ToEngine] = Codec(ToEngine)
        self._to_api: Codec[ToApi] = Codec(ToApi)
        self._changed = asyncio.Condition()
        self._tasks = [asyncio.create_task(self._subscriptions()), asyncio.create_task(self._receive())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._requests.close()
        self._tokens.close()
        self._context.term()

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for a message after which `condition` holds."""

        async def wait() -> None:
            async with self._changed:
                await self._changed.wait_for(condition)

        try:
            await asyncio.wait_for(wait(), PATIENCE)
        except asyncio.TimeoutError:
            raise AssertionError(f"the engine never saw {what}") from None

    async def next_request(self) -> AddRequest:
        """The newest sequence, once there is one."""
        await self.until(lambda: self.live, "a request")
        return next(reversed(self.live.values()))

    async def send(self, request_id: str, token_ids: list[int] = [], **fields: Any) -> None:  # noqa: B006
        await self.send_batch([RequestOutput(request_id, list(token_ids), **fields)])

    async def send_batch(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                self.live.pop(output.request_id, None)
        single = [one for one in outputs if len(one.token_ids) == 1]
        plain = [one for one in single if one == RequestOutput(one.request_id, one.token_ids)]
        rest = [one for one in outputs if one not in plain]
        ids, tokens = [one.request_id for one in plain], [one.token_ids[0] for one in plain]
        await self._publish(TokenBatch(self.sequence, rest, ids, tokens))
        self.sequence += 1

    async def set_state(self, state: str, detail: str = "") -> None:
        self._state = EngineState(state, detail)  # type: ignore[arg-type]
        await self._publish_state()

    async def _publish_state(self) -> None:
        if self._topic:
            state = self._state
            await self._publish(EngineState(state.state, state.detail, self.sequence))

    async def _publish(self, message: ToApi) -> None:
        await self.send_bytes(self._to_api.encode(message))

    async def send_bytes(self, payload: bytes) -> None:
        await self._tokens.send_multipart([self._topic, payload])

    async def _subscriptions(self) -> None:
        while True:
            frame = await self._tokens.recv()
            if frame[0] == 1:
                self._topic = frame[1:]
                await self._publish_state()

    async def _receive(self) -> None:
        while True:
            identity, payload = await self._requests.recv_multipart()
            assert identity + b" " == self._topic, (identity, self._topic)
            await self._handle(self._from_api.decode(payload))
            async with self._changed:
                self._changed.notify_all()

    async def _handle(self, message: ToEngine) -> None:
        if isinstance(message, AddRequest):
            self.added.append(message)
            self.live[message.request_id] = message
            if self.script is not None:
                self._tasks.append(asyncio.create_task(self._play(self.script(message))))
        elif isinstance(message, AbortRequest):
            self.aborted.append(message.request_id)
            self.live.pop(message.request_id, None)
        elif isinstance(message, Ping):
            self.num_pings += 1
            if self.answers_pings:
                detail = "" if self.is_healthy else "rank 3 is silent"
                await self._publish(Pong(message.ping_id, self.is_healthy, detail))
        else:
            self.observed.append(message)

    async def _play(self, outputs: Iterator[RequestOutput]) -> None:
        for output in outputs:
            if output.request_id not in self.live:
                return  # aborted
            await self.send_batch([output])
            await asyncio.sleep(0)


class FakeMedia:
    """Every image takes four tokens; its file holds its URL."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._count = 0

    async def load(
        self, part: MediaPart, request_kwargs: dict[str, Any] | None = None, max_tokens: int = 1 << 31
    ) -> LoadedMedia:
        self._count += 1
        name = f"media-{self._count}"
        (self.folder / name).write_text(part.url)
        return LoadedMedia(part.kind, f"{self._count:064x}", (1, 4, 4), 4, name)

    def drop(self, file: str) -> None:
        (self.folder / file).unlink(missing_ok=True)


def say(*texts: str, finish_reason: str | None = "stop", logprobs: bool = False, cached: int = 0) -> Script:
    """A script: one output per text, its token ids being the UTF-8 bytes; the last one has the reason."""

    def script(request: AddRequest) -> Iterator[RequestOutput]:
        for index, text in enumerate(texts):
            token_ids = list(text.encode())
            yield RequestOutput(
                request.request_id,
                token_ids,
                [TokenLogprobs(-0.5, [i, 65], [-0.5, -1.5]) for i in token_ids] if logprobs else [],
                finish_reason if index == len(texts) - 1 else None,  # type: ignore[arg-type]
                num_cached_tokens=cached,
            )

    return script
