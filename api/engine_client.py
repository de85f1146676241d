"""The api's end of the sockets to the engine.

Sends what clients ask and hands each output to the request it belongs to. Runs on the event loop's thread
alone; nothing here waits for the engine except `OpenRequest.next` and `ping`. What outputs mean is in
generation.py.
"""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from api.errors import EngineUnavailable
from engine.channels import Codec, RunDirectory, open_socket
from engine.errors import EngineError, RequestError
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
)

_log = logging.getLogger("octet.api")

MESSAGES_PER_TURN = 64  # then the event loop serves others before the socket is read on


class OpenRequest:
    """The sequences of one HTTP request, as a mailbox of their outputs.

    Use it as a context manager: leaving it aborts every sequence that has not finished.
    """

    def __init__(self, client: EngineClient, requests: list[AddRequest]) -> None:
        self.index_of = {request.request_id: index for index, request in enumerate(requests)}
        self._client = client
        self._live = set(self.index_of)
        self._outputs: list[RequestOutput] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> OpenRequest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for request_id in list(self._live):
            self.abort(request_id)

    async def next(self) -> list[RequestOutput]:
        """Everything that arrived since the last call, joined to one output per sequence.

        Waits until there is something or `wake` was called; the list is empty then. Raises RequestError or
        EngineError when the engine refused or lost the request.
        """
        if not self._outputs:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            if self._error is not None and not self._outputs:
                raise self._error
        outputs, self._outputs = self._outputs, []
        return outputs if len(outputs) < 2 else _join_by_sequence(outputs)

    def wake(self) -> None:
        """Let `next` return, with nothing if there is nothing."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def abort(self, request_id: str) -> None:
        """Stop one sequence; its later outputs are ignored."""
        if request_id in self._live:
            self._live.discard(request_id)
            self._client.forget(request_id)
            self._client.send(AbortRequest(request_id))

    def deliver(self, output: RequestOutput) -> None:
        self._outputs.append(output)
        if self._waiter is not None:
            self.wake()

    def deliver_last(self, output: RequestOutput) -> None:
        """The output with which a sequence ends, well or not."""
        self._live.discard(output.request_id)
        if output.finish_reason in ("error", "abort"):
            self.fail(_refusal(output))
        else:
            self.deliver(output)

    def fail(self, error: Exception) -> None:
        """Raise `error` from `next` once what arrived before it was taken."""
        self._error = self._error or error
        self.wake()


class EngineClient:
    """Both sockets of one api process."""

    def __init__(self, directory: RunDirectory, api_id: str = "api-0") -> None:
        self.state = EngineState("starting", "waiting for the engine")
        self._directory = directory
        self._api_id = api_id.encode()
        self._open: dict[str, OpenRequest] = {}
        self._pings: dict[int, asyncio.Future[Pong]] = {}
        self._next_ping = 0
        self._next_sequence: int | None = None  # None until the first EngineState
        self._state_waiters: list[tuple[frozenset[str], asyncio.Future[None]]] = []
        self._to_engine: Codec[ToEngine] = Codec(ToEngine)
        self._from_engine: Codec[ToApi] = Codec(ToApi)

    def connect(self) -> None:
        """Open the sockets and begin to read; call it on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._requests: Any = open_socket(
            self._context, zmq.DEALER, self._directory.api_address, bind=False, identity=self._api_id
        )
        self._tokens: Any = open_socket(self._context, zmq.SUB, self._directory.tokens_address, bind=False)
        self._monitor: Any = self._tokens.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._tokens.setsockopt(zmq.SUBSCRIBE, self._api_id + b" ")
        for socket, read in ((self._tokens, self._read_tokens), (self._monitor, self._read_monitor)):
            self._loop.add_reader(socket.getsockopt(zmq.FD), read)
            self._loop.call_soon(read)  # the descriptor only signals what comes after it is watched

    def close(self) -> None:
        """Fail what is open and close the sockets."""
        self.fail_all(EngineUnavailable("The server is shutting down."))
        for socket in (self._tokens, self._monitor):
            self._loop.remove_reader(socket.getsockopt(zmq.FD))
        self._tokens.disable_monitor()
        self._monitor.close()
        self._tokens.close()
        self._requests.close(linger=200)  # milliseconds: the last aborts should leave
        self._context.term()

    # requests

    def open(self, requests: list[AddRequest]) -> OpenRequest:
        """Send the sequences of one HTTP request; the engine owns their media files from here on."""
        self.check_ready()
        opened = OpenRequest(self, requests)
        for request in requests:
            self._open[request.request_id] = opened
            self.send(request)
        return opened

    def check_ready(self) -> None:
        """Raise EngineUnavailable unless the engine takes requests."""
        if self.state.state != "ready":
            raise EngineUnavailable(_why_not_ready(self.state), retry_after=5)

    def send(self, message: ToEngine) -> None:
        self._requests.send(self._to_engine.encode(message), zmq.NOBLOCK)

    def forget(self, request_id: str) -> None:
        """Ignore what still comes for this sequence."""
        self._open.pop(request_id, None)

    def observe(self, observed: RequestObserved) -> None:
        """Tell the engine, which owns the metrics, how an HTTP request went."""
        if self.state.state == "ready":
            self.send(observed)

    @property
    def num_open(self) -> int:
        """Sequences that the engine works on for us."""
        return len(self._open)

    def fail_all(self, error: Exception) -> None:
        """End every open request with `error`; the engine is told to drop them."""
        opened, self._open = self._open, {}
        for request_id in opened:
            self.send(AbortRequest(request_id))
        for request in set(opened.values()):
            request.fail(error)

    # health

    async def ping(self, timeout: float) -> Pong:
        """A round trip through every rank; an unhealthy Pong when none comes back in `timeout` seconds."""
        ping_id, self._next_ping = self._next_ping, self._next_ping + 1
        answer = self._pings[ping_id] = self._loop.create_future()
        self.send(Ping(ping_id))
        try:
            return await asyncio.wait_for(answer, timeout)
        except asyncio.TimeoutError:
            return Pong(ping_id, False, f"the engine did not answer within {timeout:g} s")
        finally:
            del self._pings[ping_id]

    async def until_state(self, *states: str) -> EngineState:
        """Wait until the engine is in one of `states`."""
        if self.state.state not in states:
            waiter = self._loop.create_future()
            self._state_waiters.append((frozenset(states), waiter))
            await waiter
        return self.state

    # what the engine sends

    def _read_tokens(self) -> None:
        """Take what is there. The descriptor is edge-triggered, so read on until there is nothing."""
        for _ in range(MESSAGES_PER_TURN):
            try:
                frames = self._tokens.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(frames[-1])
        self._loop.call_soon(self._read_tokens)

    def _read_monitor(self) -> None:
        while self._monitor.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            recv_monitor_message(self._monitor, zmq.NOBLOCK)
            self._read_tokens()  # what the engine still sent comes first
            if self.state.state not in ("failed", "stopping"):
                self._dispatch(EngineState("failed", "the engine process is gone"))

    def _take(self, payload: bytes) -> None:
        try:
            message = self._from_engine.decode(payload)
        except msgspec.DecodeError:
            _log.exception("a message of the engine cannot be decoded")
            self.fail_all(
                EngineError("Output of the engine was damaged on its way; the request was aborted.")
            )
            return
        self._dispatch(message)

    def _dispatch(self, message: ToApi) -> None:
        if isinstance(message, TokenBatch):
            self._take_batch(message)
        elif isinstance(message, EngineState):
            self._take_state(message)
        elif (waiter := self._pings.get(message.ping_id)) is not None and not waiter.done():
            waiter.set_result(message)

    def _take_batch(self, batch: TokenBatch) -> None:
        if self._next_sequence is not None and batch.sequence != self._next_sequence:
            _log.error("token batch %d came, not %d: outputs are lost", batch.sequence, self._next_sequence)
            self.fail_all(EngineError("Output of the engine was lost on its way; the request was aborted."))
        self._next_sequence = batch.sequence + 1
        opened = self._open
        # The busiest loop of the process: once per generated token.
        for request_id, token_id in zip(batch.decoded, batch.token_ids, strict=True):
            request = opened.get(request_id)
            if request is not None:  # else aborted while this was on its way
                request.deliver(RequestOutput(request_id, [token_id]))
        for output in batch.outputs:
            request = opened.get(output.request_id)
            if request is None:
                continue
            if output.finish_reason is None:
                request.deliver(output)
            else:
                del opened[output.request_id]
                request.deliver_last(output)

    def _take_state(self, state: EngineState) -> None:
        if self._next_sequence is None:
            self._next_sequence = state.sequence
        self.state = state
        if state.state == "failed":
            self.fail_all(EngineUnavailable(_why_not_ready(state)))
        ready = [waiter for states, waiter in self._state_waiters if state.state in states]
        self._state_waiters = [(states, w) for states, w in self._state_waiters if w not in ready]
        for waiter in ready:
            if not waiter.done():
                waiter.set_result(None)


def _join_by_sequence(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """In order of first appearance; no output comes after the last one of its sequence."""
    groups: dict[str, list[RequestOutput]] = {}
    for output in outputs:
        groups.setdefault(output.request_id, []).append(output)
    return [_join(group) if len(group) > 1 else group[0] for group in groups.values()]


def _join(outputs: list[RequestOutput]) -> RequestOutput:
    return RequestOutput(
        outputs[0].request_id,
        [token_id for output in outputs for token_id in output.token_ids],
        [logprob for output in outputs for logprob in output.logprobs],
        outputs[-1].finish_reason,
        outputs[-1].stop_token_id,
        num_cached_tokens=outputs[0].num_cached_tokens,
        queue_seconds=outputs[0].queue_seconds,
        timings=outputs[-1].timings,
    )


def _why_not_ready(state: EngineState) -> str:
    sentence = {
        "starting": "The model is still loading",
        "stopping": "The server is shutting down",
        "failed": "The engine failed",
    }.get(state.state, "The engine is not ready")
    return f"{sentence}: {state.detail}." if state.detail else f"{sentence}."


def _refusal(output: RequestOutput) -> Exception:
    """The error that ends a request whose sequence the engine did not finish."""
    message = output.error or "The engine aborted the request."
    if output.error_status == 504:
        return RequestError(_as_sentence(message), param="timeout", status=504, code="timeout")
    if output.error_status < 500:
        retry_after = 1 if output.error_status == 429 else None
        return RequestError(message, status=output.error_status, retry_after=retry_after)
    if output.error_status == 503 or output.finish_reason == "abort":
        return EngineUnavailable(message)
    return EngineError(message)


def _as_sentence(message: str) -> str:
    return f"{message[:1].upper()}{message[1:].rstrip('.')}."
