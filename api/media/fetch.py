"""Downloads http(s) media into a file, under limits of time, bytes and redirects, from public addresses only.

A name is resolved once per hop and the connection goes to the address that was checked: the check sits in
the resolver and once more where the socket is made, so neither a second DNS answer nor a spelling
of an address that only the C library understands gets around it.
"""

from __future__ import annotations

import asyncio
import re
import socket
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from api.media.addresses import is_numeric_host, is_public
from api.media.refusal import MediaRefusal

MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 1 << 18
_UNSAFE = re.compile(r"[\x00-\x20\x7f\\]")
_PRIVATE = "is at a private or reserved address, from which this server does not fetch"


class PrivateAddress(OSError):
    """The host is, or resolves to, an address that is not public."""


class MediaFetcher:
    """One session for all downloads; proxies and cookies are not used."""

    def __init__(
        self, *, max_bytes: int, timeout: float, allow_private: bool, resolver: AbstractResolver | None = None
    ) -> None:
        """timeout in seconds, for one download with all its redirects."""
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._allow_private = allow_private
        self._resolver = resolver
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(64)

    async def fetch(self, url: str, path: Path) -> None:
        """Write the body of `url` to `path`, a new file; partial if MediaRefusal is raised."""
        async with self._slots:
            try:
                await asyncio.wait_for(self._follow(url, path), self._timeout)
            except (asyncio.TimeoutError, TimeoutError):
                raise MediaRefusal(f"could not be downloaded within {self._timeout:g} seconds") from None
            except aiohttp.ClientConnectorError as error:
                if isinstance(error.os_error, PrivateAddress):
                    raise MediaRefusal(_PRIVATE) from None
                raise MediaRefusal("could not be downloaded: no connection to the host") from None
            except (aiohttp.ClientError, ValueError, UnicodeError):
                raise MediaRefusal(
                    "could not be downloaded: the host broke off or answered wrongly"
                ) from None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _follow(self, url: str, path: Path) -> None:
        target = self._checked(url)
        for _ in range(MAX_REDIRECTS + 1):
            async with self._open_session().get(target, allow_redirects=False) as response:
                if response.status not in _REDIRECTS:
                    await self._save(response, path)
                    return
                location = response.headers.get("Location", "")
                target = self._checked(str(response.url.join(self._parsed(location))))
        raise MediaRefusal(f"could not be downloaded: more than {MAX_REDIRECTS} redirects")

    async def _save(self, response: aiohttp.ClientResponse, path: Path) -> None:
        if response.status != 200:
            raise MediaRefusal(f"could not be downloaded: the host answered with status {response.status}")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise MediaRefusal("could not be downloaded: the host sent it compressed without being asked")
        too_large = MediaRefusal(f"has more than {self._max_bytes} bytes")
        if (response.content_length or 0) > self._max_bytes:
            raise too_large
        size = 0
        with path.open("xb") as file:
            async for chunk in response.content.iter_chunked(_CHUNK):
                size += len(chunk)
                if size > self._max_bytes:
                    raise too_large
                file.write(chunk)

    def _checked(self, url: str) -> URL:
        parsed = self._parsed(url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise MediaRefusal("could not be downloaded: only http and https URLs with a host are followed")
        if parsed.user is not None or parsed.password is not None:
            raise MediaRefusal("could not be downloaded: its URL carries a user name")
        if is_numeric_host(parsed.host) and not self._allow_private and not is_public(parsed.host):
            raise MediaRefusal(_PRIVATE)
        return parsed

    @staticmethod
    def _parsed(url: str) -> URL:
        if not url or _UNSAFE.search(url):
            raise MediaRefusal("could not be downloaded: its URL is not valid")
        try:
            return URL(url)
        except ValueError:
            raise MediaRefusal("could not be downloaded: its URL is not valid") from None

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            resolver = self._resolver or aiohttp.ThreadedResolver()
            connector = aiohttp.TCPConnector(
                resolver=resolver if self._allow_private else _PublicResolver(resolver),
                socket_factory=None if self._allow_private else _open_public_socket,
                use_dns_cache=False,
                limit_per_host=16,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": "octet", "Accept-Encoding": "identity"},
                auto_decompress=False,
                trust_env=False,
                timeout=aiohttp.ClientTimeout(total=self._timeout),
            )
        return self._session


class _PublicResolver(AbstractResolver):
    """Hands on only public addresses of a name."""

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        public = [result for result in found if is_public(result["host"])]
        if found and not public:
            raise PrivateAddress("not a public address")
        return public

    async def close(self) -> None:
        await self._inner.close()


def _open_public_socket(address_info: Any) -> socket.socket:
    family, kind, protocol, _, address = address_info
    if not is_public(str(address[0])):
        raise PrivateAddress("not a public address")
    return socket.socket(family=family, type=kind, proto=protocol)
