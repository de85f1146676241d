"""The engine's end of the sockets to the api processes.

Requests come in on a ROUTER; tokens and states go out on an XPUB, whose subscriptions say which api
processes live. What requests mean is the step loop's business (loop.py), which implements `Guest`.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, Protocol

import msgspec
import zmq

from engine.channels import Codec, RunDirectory, open_socket
from engine.messages import AddRequest, EngineState, Ping, Pong, RequestOutput, ToApi, ToEngine, TokenBatch
from engine.outbox import Client, StepOutputs
from engine.readers import SocketReader

_LAST_WORD_MS = 2000  # how long a closing socket may take to deliver what was sent
_SUBSCRIBED, _UNSUBSCRIBED = 1, 0

log = logging.getLogger(__name__)


class Guest(Protocol):
    """Who receives what the api processes say."""

    def on_request(self, client: Client, message: ToEngine) -> None: ...
    def on_client_left(self, client: Client) -> None: ...


class ApiGateway:
    """Both sockets, and the sequence numbers of the token batches of each api process."""

    def __init__(self, context: Any, run: RunDirectory) -> None:
        self._requests = open_socket(context, zmq.ROUTER, run.api_address, bind=True)
        self._tokens = open_socket(context, zmq.XPUB, run.tokens_address, bind=True)
        self._tokens.setsockopt(zmq.XPUB_VERBOSE, 1)  # an api that comes back under its old name is news, too
        self._incoming: Codec[ToEngine] = Codec(ToEngine)
        self._outgoing: Codec[ToApi] = Codec(ToApi)
        self._next_sequence: dict[Client, int] = {}  # of the api processes that ever subscribed
        self._subscribed: set[Client] = set()
        self._state = EngineState("starting")
        self._guest: Guest | None = None

    def open(self) -> None:
        """Begin to read, on the running event loop; states are sent from now on."""
        self._readers = [
            SocketReader(self._requests, self._on_request),
            SocketReader(self._tokens, self._on_subscription),
        ]

    def serve(self, guest: Guest) -> None:
        """From now on requests go to `guest`; those that came earlier were turned away."""
        self._guest = guest

    def publish(self, step: StepOutputs) -> None:
        """Send the outputs of one step to their api process."""
        sequence = self._next_sequence.get(step.client, 0)
        self._next_sequence[step.client] = sequence + 1
        self._send(step.client, TokenBatch(sequence, step.outputs, step.decoded, step.token_ids))

    def answer(self, client: Client, pong: Pong) -> None:
        self._send(client, pong)

    def announce(
        self,
        state: Literal["starting", "ready", "failed", "stopping"],
        detail: str = "",
        num_blocks: int = 0,
        block_size: int = 0,
    ) -> None:
        """Tell every api process, and those that come later, how the engine is."""
        self._state = EngineState(state, detail, 0, num_blocks, block_size)
        for client in self._subscribed:
            self._send_state(client)

    def close(self) -> None:
        """What was sent still gets out."""
        for reader in self._readers:
            reader.close()
        self._tokens.close(linger=_LAST_WORD_MS)
        self._requests.close()

    def _send(self, client: Client, message: ToApi) -> None:
        self._tokens.send_multipart((client + b" ", self._outgoing.encode(message)))
        if self._tokens.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            self._readers[1].drain_soon()  # the send may have swallowed the signal

    def _send_state(self, client: Client) -> None:
        sequence = self._next_sequence.setdefault(client, 0)
        self._send(client, msgspec.structs.replace(self._state, sequence=sequence))

    def _on_subscription(self, frames: list[bytes]) -> None:
        """One byte says subscribed or not, then comes the topic: the api's name and a space."""
        kind, client = frames[0][0], frames[0][1:].removesuffix(b" ")
        if kind == _SUBSCRIBED:
            self._subscribed.add(client)
            self._send_state(client)
        elif kind == _UNSUBSCRIBED and client in self._subscribed:
            self._subscribed.discard(client)
            if self._guest:
                self._guest.on_client_left(client)

    def _on_request(self, frames: list[bytes]) -> None:
        client, payload = frames[0], frames[-1]
        try:
            message = self._incoming.decode(payload)
        except msgspec.DecodeError as error:
            log.warning("dropped a malformed message of %s: %s", client.decode(errors="replace"), error)
            return
        if self._guest is None:
            self._turn_away(client, message)
            return
        try:
            self._guest.on_request(client, message)
        except Exception:
            log.exception("the engine could not take a message of %s", client.decode(errors="replace"))

    def _turn_away(self, client: Client, message: ToEngine) -> None:
        """Nobody serves yet: whoever waits for an answer gets one."""
        why = self._state.detail or "the engine is starting"
        if isinstance(message, Ping):
            self.answer(client, Pong(message.ping_id, False, why))
        elif isinstance(message, AddRequest):
            output = RequestOutput(message.request_id, finish_reason="error", error=why, error_status=503)
            self.publish(StepOutputs(client, outputs=[output]))
