"""The api's door to media: a URL and options in, a file of patches and its facts out."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aiohttp.abc import AbstractResolver

from api.media.fetch import MediaFetcher
from api.media.options import MediaPolicy
from api.media.pool import DecoderPool
from api.media.protocol import Decoded, DecodeJob, Refused
from api.media.refusal import MediaRefusal
from api.media.sources import MediaSources
from engine.channels import RunDirectory
from engine.config import ServerConfig
from engine.errors import RequestError


@dataclass(frozen=True)
class MediaPart:
    """One image or video as the client wrote it; `param` is its path in the request."""

    kind: Literal["image", "video"]
    url: str = field(repr=False)
    param: str
    kwargs: dict[str, Any] = field(default_factory=dict)  # other fields of its image_url or video_url


@dataclass(frozen=True)
class LoadedMedia:
    """`file` is a name in the run directory's media folder; it belongs to whoever got this object."""

    kind: Literal["image", "video"]
    content_hash: str
    grid: tuple[int, int, int]
    num_tokens: int
    file: str


class MediaLoader:
    """Fetches and decodes; `await start()` first, `await close()` last."""

    def __init__(self, config: ServerConfig, resolver: AbstractResolver | None = None) -> None:
        """Raises ConfigError when mm_processor_kwargs are wrong. `resolver` replaces DNS in tests."""
        self.policy = MediaPolicy(config.mm_processor_kwargs, config.model)
        self.folder = RunDirectory(config.run_directory).media
        self._max_bytes = config.max_media_bytes
        self._fetcher = MediaFetcher(
            max_bytes=config.max_media_bytes,
            timeout=config.media_timeout,
            allow_private=config.allow_private_media,
            resolver=resolver,
        )
        self._sources = MediaSources(
            self._fetcher, self.folder, config.allowed_media_path, config.max_media_bytes
        )
        self.pool = DecoderPool(config.model, config.media_workers)

    async def start(self) -> None:
        """Raises ConfigError when videos could not get their timestamps."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        await self.pool.start()

    async def load(
        self, part: MediaPart, request_kwargs: dict[str, Any] | None = None, max_tokens: int = 1 << 31
    ) -> LoadedMedia:
        """Raises RequestError with the part's param; nothing is left behind then, nor when cancelled."""
        options = self.policy.resolve(request_kwargs, part.kwargs, part.param)
        output = f"{secrets.token_hex(16)}.patches"
        try:
            async with self._sources.open(part.url) as source:
                job = DecodeJob(
                    kind=part.kind,
                    source=str(source.path),
                    transport=source.transport,
                    output=str(self.folder / output),
                    options=options,
                    max_tokens=max_tokens,
                    max_bytes=self._max_bytes,
                )
                reply = await self.pool.decode(job)
        except MediaRefusal as refusal:
            reply = Refused(str(refusal))
        if isinstance(reply, Decoded):
            return LoadedMedia(part.kind, reply.content_hash, reply.grid, reply.num_tokens, output)
        raise RequestError(
            f"The {part.kind} {reply.message}.",
            param=part.param,
            status=reply.status,
            retry_after=1 if reply.status == 503 else None,
        )

    def drop(self, file: str) -> None:
        """Delete a file that `load` made, if it is still there."""
        Path(self.folder / file).unlink(missing_ok=True)

    async def close(self) -> None:
        await self.pool.close()
        await self._fetcher.close()
