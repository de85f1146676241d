"""Where the processes meet: the run directory, and typed ZeroMQ sockets inside it.

Every socket is ipc:// in a private 0700 directory that also holds media files and shared pages, so
removing that one directory removes everything a server could leave behind. Each socket owns one
encoder or decoder. No socket here blocks for ever: receives are awaited or polled.

    api.sock        ROUTER (engine) <- DEALER (api)      ToEngine
    tokens.sock     XPUB (engine)   -> SUB (api)         ToApi, topic = api id
    plan-{r}.sock   PUSH (engine)   -> PULL (rank r)     ToWorker
    results.sock    SUB (engine)    <- XPUB (each rank)  FromWorker
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import zmq

Message = TypeVar("Message")


class RunDirectory:
    """Names of everything that lives in one server's private directory."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.json"
        self.media = self.root / "media"  # uint8 patches, one file per media item
        self.status_page = self.root / "status"  # heartbeats, see status_page.py
        self.vocabulary = self.root / "vocabulary"  # of the api's tokenizer, see grammar.py
        self.collective = self.root / "collective"  # shared memory of the CPU ranks

    @property
    def api_address(self) -> str:
        return f"ipc://{self.root}/api.sock"

    @property
    def tokens_address(self) -> str:
        return f"ipc://{self.root}/tokens.sock"

    @property
    def results_address(self) -> str:
        return f"ipc://{self.root}/results.sock"

    def plan_address(self, rank: int) -> str:
        return f"ipc://{self.root}/plan-{rank}.sock"


def open_socket(context: Any, kind: int, address: str, *, bind: bool, identity: bytes = b"") -> Any:
    """A socket without high-water marks (nothing is dropped) that does not linger at close.

    `identity` is how a ROUTER at the other end addresses this socket.
    """
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    if identity:
        socket.setsockopt(zmq.IDENTITY, identity)
    if bind:
        socket.bind(address)
    else:
        socket.connect(address)
    return socket


class Codec(Generic[Message]):
    """One MessagePack encoder and decoder for a union of message structs; made once, kept."""

    def __init__(self, message_type: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(message_type)

    def encode(self, message: Message) -> bytes:
        return self._encoder.encode(message)

    def decode(self, data: bytes) -> Message:
        """Raises msgspec.ValidationError, whose text names the path, on a malformed message."""
        return self._decoder.decode(data)  # type: ignore[no-any-return]
