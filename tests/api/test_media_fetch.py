"""Downloads from a loopback site: limits, redirects, and the addresses that nobody is asked for."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver
from aiohttp.test_utils import TestServer

from api.media.addresses import is_public
from api.media.loader import LoadedMedia, MediaLoader
from engine.errors import RequestError
from tests.api.media_builders import (
    encode_image,
    image,
    make_image,
    refusal_of,
    serve,
    with_loader,
)

PNG = encode_image(make_image(60, 40))


def make_site() -> web.Application:
    """Good, bad and endless answers, and redirects: /to?n=3 goes on to /to?n=2 and so on to /png."""

    async def png(request: web.Request) -> web.Response:
        return web.Response(body=PNG, content_type="text/html")

    async def redirect(request: web.Request) -> web.Response:
        n = int(request.query["n"])
        raise web.HTTPFound("/png" if n <= 1 else f"/to?n={n - 1}")

    async def elsewhere(request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": request.query["url"]})

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(10_000))

    async def silent(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    async def squeezed(request: web.Request) -> web.Response:
        return web.Response(body=PNG, headers={"Content-Encoding": "gzip"})

    app = web.Application()
    for handler in (png, elsewhere, endless, silent, squeezed):
        app.router.add_get(f"/{handler.__name__}", handler)
    app.router.add_get("/to", redirect)
    return app


def with_site(folder: Path, use: Any, resolver: Any = None, **settings: Any) -> Any:
    async def both(loader: MediaLoader) -> Any:
        server = await serve(make_site())
        try:
            return await use(loader, server)
        finally:
            await server.close()

    return with_loader(folder, both, resolver, **settings)


@pytest.mark.parametrize("path", ["/png", "/to?n=1", "/to?n=5"])
def test_an_image_is_downloaded_through_up_to_five_redirects(tmp_path: Path, path: str) -> None:
    async def use(loader: MediaLoader, server: TestServer) -> LoadedMedia:
        return await loader.load(image(str(server.make_url(path))))

    assert with_site(tmp_path, use, allow_private_media=True).grid == (1, 4, 6)


@pytest.mark.parametrize(
    "path, reason",
    [
        ("/to?n=6", "more than 5 redirects"),
        ("/missing", "status 404"),
        ("/endless", "more than 100000 bytes"),
        ("/silent", "within 0.5 seconds"),
        ("/squeezed", "compressed"),
        ("/elsewhere?url=file:///etc/passwd", "only http and https"),
        ("/elsewhere?url=data:image/png;base64,AAAA", "only http and https"),
        ("/elsewhere?url=http://user:pw@127.0.0.1/", "user name"),
        ("/elsewhere?url=", "not valid"),
    ],
)
def test_a_download_that_goes_wrong_is_a_400(tmp_path: Path, path: str, reason: str) -> None:
    async def use(loader: MediaLoader, server: TestServer) -> RequestError:
        with pytest.raises(RequestError) as caught:
            await loader.load(image(str(server.make_url(path))))
        return caught.value

    settings = {"allow_private_media": True, "media_timeout": 0.5, "max_media_bytes": 100_000}
    error = with_site(tmp_path, use, **settings)
    assert error.status == 400 and reason in error.message
    assert "127.0.0.1" not in error.message


def test_a_host_that_does_not_answer_is_a_400(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        error = refusal_of(tmp_path, f"http://127.0.0.1:{port}/a.png", allow_private_media=True)
    assert "no connection" in error.message and str(port) not in error.message


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "localhost",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[fe80::1%25lo]",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "[fd00::1]",
        "[ff02::1]",
        "127.0.0.1.",
    ],
)
def test_private_addresses_are_refused_in_every_spelling(tmp_path: Path, host: str) -> None:
    async def use(loader: MediaLoader, server: TestServer) -> RequestError:
        with pytest.raises(RequestError) as caught:
            await loader.load(image(f"http://{host}:{server.port}/png"))
        return caught.value

    message = with_site(tmp_path, use).message
    assert "private or reserved" in message or "no connection" in message or "not valid" in message, message


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1\\@example.com/", "http://a b/", "http://", "http://[::1/", "http://x:99999/"]
)
def test_urls_that_parsers_read_differently_are_refused(tmp_path: Path, url: str) -> None:
    assert refusal_of(tmp_path, url).status == 400


class Names(AbstractResolver):
    """Answers from a list, one answer after the other for each name."""

    def __init__(self, **answers: list[str]) -> None:
        self.answers = {name.replace("_", "."): list(found) for name, found in answers.items()}
        self.num_asked = 0

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> Any:
        self.num_asked += 1
        address = self.answers[host].pop(0)
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": socket.AF_INET,
                "proto": 0,
                "flags": 0,
            }
        ]

    async def close(self) -> None:
        pass


def test_a_name_that_resolves_to_a_private_address_is_refused(tmp_path: Path) -> None:
    names = Names(evil_test=["127.0.0.1", "10.0.0.1", "::ffff:192.168.0.1"])
    for _ in range(3):
        assert "private or reserved" in refusal_of(tmp_path, "http://evil.test/a.png", names).message


def test_a_name_is_resolved_once_per_connection(tmp_path: Path) -> None:
    # A second answer would be the loopback server; nobody may ask for it.
    names = Names(rebind_test=["203.0.113.1", "127.0.0.1"])
    error = refusal_of(tmp_path, "http://rebind.test/png", names, media_timeout=0.3)
    assert names.num_asked == 1 and "png" not in error.message


def test_every_redirect_is_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only the first hop is public here: the loopback server stands in for the internet.
    checked: list[str] = []

    def only_the_first(address: str) -> bool:
        checked.append(address)
        return len(checked) <= 2  # once by the resolver or the URL, once at the socket

    monkeypatch.setattr("api.media.fetch.is_public", only_the_first)

    async def use(loader: MediaLoader, server: TestServer) -> RequestError:
        inner = f"http://127.0.0.1:{server.port}/png"
        with pytest.raises(RequestError) as caught:
            await loader.load(image(f"http://127.0.0.1:{server.port}/elsewhere?url={inner}"))
        return caught.value

    assert "private or reserved" in with_site(tmp_path, use).message
    assert len(checked) == 3


def test_only_addresses_of_the_open_internet_are_public() -> None:
    public = ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
    assert [address for address in public if not is_public(address)] == []
    private = [
        "240.0.0.1",
        "255.255.255.255",
        "198.18.0.1",
        "::",
        "2001:db8::1",
        "2001:0:7f00:1::",
        "fec0::1",
    ]
    assert [address for address in [*private, "", "name", "1.2.3"] if is_public(address)] == []
