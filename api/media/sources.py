"""What a media URL stands for, and its content as a file that a decoder can open.

data: URLs and downloads are written to a file of ours, deleted after decoding; file: URLs are opened where
they are, if they lie under the folder that the operator allows.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from api.media.fetch import MediaFetcher
from api.media.refusal import MediaRefusal

_WRITE_IN_PLACE = 1 << 18  # characters; a longer text is written in a thread


class Source(NamedTuple):
    path: Path
    transport: Literal["raw", "base64", "percent"]  # the decoder unwraps it, off the event loop


class MediaSources:
    """Opens URLs under the server's rules."""

    def __init__(self, fetcher: MediaFetcher, folder: Path, allowed_path: str, max_bytes: int) -> None:
        self._fetcher = fetcher
        self._folder = folder  # where our files go
        self._allowed = Path(allowed_path).resolve() if allowed_path else None
        self._max_bytes = max_bytes

    @asynccontextmanager
    async def open(self, url: str) -> AsyncIterator[Source]:
        """Raises MediaRefusal when the URL may not or cannot be read."""
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "file":
            yield Source(self._allowed_file(url), "raw")
            return
        path = self._folder / f"in-{secrets.token_hex(16)}"
        try:
            if scheme == "data":
                yield Source(path, await self._save_data_url(url, path))
            elif scheme in ("http", "https"):
                await self._fetcher.fetch(url, path)
                yield Source(path, "raw")
            else:
                raise MediaRefusal("has a URL that is not of the form data:, http:, https: or file:")
        finally:
            path.unlink(missing_ok=True)

    async def _save_data_url(self, url: str, path: Path) -> Literal["base64", "percent"]:
        comma = url.find(",", 0, 1024)
        if comma < 0:
            raise MediaRefusal("has a data: URL without a comma before its content")
        transport: Literal["base64", "percent"] = "percent"
        if url[:comma].lower().endswith(";base64"):
            transport = "base64"
        size = len(url) - comma - 1
        if (size * 3 // 4 if transport == "base64" else size) > self._max_bytes + 2:
            raise MediaRefusal(f"has more than {self._max_bytes} bytes")
        if size > _WRITE_IN_PLACE:
            await asyncio.to_thread(_write_content, path, url, comma + 1)
        else:
            _write_content(path, url, comma + 1)
        return transport

    def _allowed_file(self, url: str) -> Path:
        """Symbolic links are followed first, then the real place is checked."""
        if self._allowed is None:
            raise MediaRefusal("is a file: URL; this server reads none (--allowed-media-path is not set)")
        outside = MediaRefusal("is a file: URL that is not a readable file in the allowed folder")
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or "\0" in unquote(parts.path):
            raise outside
        try:
            path = Path(unquote(parts.path)).resolve(strict=True)
            if not path.is_relative_to(self._allowed) or not path.is_file():
                raise outside
            size = path.stat().st_size
        except (OSError, RuntimeError, ValueError):
            raise outside from None
        if size > self._max_bytes:
            raise MediaRefusal(f"has more than {self._max_bytes} bytes")
        return path


def _write_content(path: Path, url: str, start: int) -> None:
    try:
        content = url[start:].encode("ascii")
    except UnicodeEncodeError:
        raise MediaRefusal("has a data: URL with characters outside ASCII") from None
    path.write_bytes(content)
