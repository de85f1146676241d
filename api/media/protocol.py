"""What the api and its decoding processes say to each other: length-prefixed MessagePack over pipes.

api     -> decoder   DecodeJob, one at a time
decoder -> api       DecoderReady once, then Decoded or Refused for each job
"""

from __future__ import annotations

from typing import BinaryIO, Literal

import msgspec

from api.media.options import MediaOptions

_LENGTH_BYTES = 4
MAX_FRAME = 1 << 20


class DecodeJob(msgspec.Struct, frozen=True):
    """Decode `source` and write its patches to `output`, a new file."""

    kind: Literal["image", "video"]
    source: str  # path
    transport: Literal["raw", "base64", "percent"]  # how the file's content is wrapped
    output: str  # path
    options: MediaOptions
    max_tokens: int  # refuse before decoding pixels when more placeholders would be needed
    max_bytes: int  # of the unwrapped content


class DecoderReady(msgspec.Struct, frozen=True, tag="ready"):
    error: str = ""  # why the process cannot work; it ends after saying so


class Decoded(msgspec.Struct, frozen=True, tag="decoded"):
    """The patches are written: [frames*rows*columns, 588] uint8."""

    content_hash: str
    grid: tuple[int, int, int]
    num_tokens: int
    seconds: float


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """`message` completes "The image ..."; status 503 when it is the server that has no room."""

    message: str
    status: int = 400


Reply = DecoderReady | Decoded | Refused


def pack(message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def unpack_job(body: bytes) -> DecodeJob:
    return msgspec.msgpack.decode(body, type=DecodeJob)


def unpack_reply(body: bytes) -> Reply:
    """Raises msgspec.ValidationError or DecodeError: a decoder is not trusted after bad input."""
    return msgspec.msgpack.decode(body, type=Reply)  # type: ignore[arg-type]


def frame_length(header: bytes) -> int:
    """Raises ValueError for a frame that no peer of ours sends."""
    length = int.from_bytes(header, "big")
    if length > MAX_FRAME:
        raise ValueError(f"a frame of {length} bytes")
    return length


def read_frame(pipe: BinaryIO) -> bytes | None:
    """The next frame's body; None when the other side closed the pipe."""
    header = pipe.read(_LENGTH_BYTES)
    if len(header) < _LENGTH_BYTES:
        return None
    length = frame_length(header)
    body = pipe.read(length)
    return body if len(body) == length else None
