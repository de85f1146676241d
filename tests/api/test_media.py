"""From URLs to patch files through real decoding processes: who may be asked, what is left behind."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver
from aiohttp.test_utils import TestServer

from api.media.addresses import is_public
from api.media.loader import LoadedMedia, MediaLoader, MediaPart
from api.media.options import MediaPolicy
from api.media.pool import WALL_SECONDS
from engine.errors import ConfigError, RequestError
from tests.api.media_builders import (
    data_url,
    encode_image,
    make_image,
    make_loader,
    make_video,
    serve,
    until,
    with_loader,
)

PNG = encode_image(make_image(60, 40))
PARAM = "messages[0].content[1].image_url"


def image(url: str) -> MediaPart:
    return MediaPart("image", url, PARAM)


def refusal_of(folder: Path, url: str, resolver: Any = None, **settings: Any) -> RequestError:
    """The RequestError that loading `url` ends with."""

    async def use(loader: MediaLoader) -> RequestError:
        with pytest.raises(RequestError) as caught:
            await loader.load(image(url))
        return caught.value

    return with_loader(folder, use, resolver, **settings)


# data: URLs ---------------------------------------------------------------------------------------


def test_a_data_url_becomes_a_file_of_patches(tmp_path: Path) -> None:
    loaded = with_loader(tmp_path, lambda loader: loader.load(image(data_url(PNG))))
    assert (loaded.kind, loaded.grid, loaded.num_tokens) == ("image", (1, 4, 6), 6)
    path = tmp_path / "run" / "media" / loaded.file
    assert path.stat().st_size == 24 * 588
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "url",
    [
        data_url(PNG, "video/mp4"),
        data_url(PNG, "text/plain;charset=utf-8"),
        "DATA:;BASE64," + base64.b64encode(PNG).decode(),
        "data:image/png;base64," + base64.encodebytes(PNG).decode(),
        "data:image/png;base64," + base64.b64encode(PNG).decode().replace("+", "%2B").replace("=", "%3D"),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
    ],
)
def test_only_the_content_of_a_data_url_decides(tmp_path: Path, url: str) -> None:
    assert with_loader(tmp_path, lambda loader: loader.load(image(url))).grid == (1, 4, 6)


@pytest.mark.parametrize(
    "url, reason",
    [
        ("data:image/png;base64", "without a comma"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,####", "not valid base64"),
        ("data:image/png;base64,AAA", "not valid base64"),
        ("data:image/png;base64,AAAA", "supported format"),
        ("data:image/png;base64,ÄÄÄÄ", "outside ASCII"),
        ("data:image/png;base64," + "A" * 5000, "more than 3000 bytes"),
        ("data:," + "A" * 5000, "more than 3000 bytes"),
        ("ftp://example.com/a.png", "not of the form"),
        ("just text", "not of the form"),
        ("", "not of the form"),
    ],
)
def test_a_bad_url_is_a_400_with_its_place(tmp_path: Path, url: str, reason: str) -> None:
    error = refusal_of(tmp_path, url, max_media_bytes=3000)
    assert (error.status, error.param) == (400, PARAM)
    assert error.message.startswith("The image ") and reason in error.message


def test_many_images_are_decoded_at_once(tmp_path: Path) -> None:
    parts = [image(data_url(encode_image(make_image(60 + index, 40)))) for index in range(12)]

    async def use(loader: MediaLoader) -> list[LoadedMedia]:
        return list(await asyncio.gather(*map(loader.load, parts)))

    loaded = with_loader(tmp_path, use, media_workers=2)
    assert len({item.file for item in loaded}) == 12


# file: URLs ---------------------------------------------------------------------------------------


def test_a_file_in_the_allowed_folder_is_read_and_kept(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed folder"
    allowed.mkdir()
    (allowed / "a b.png").write_bytes(PNG)
    url = (allowed / "a b.png").as_uri()
    loaded = with_loader(tmp_path, lambda loader: loader.load(image(url)), allowed_media_path=str(allowed))
    assert loaded.grid == (1, 4, 6) and (allowed / "a b.png").read_bytes() == PNG


def test_files_outside_the_allowed_folder_are_refused_alike(tmp_path: Path) -> None:
    allowed, secret = tmp_path / "allowed", tmp_path / "secret.png"
    allowed.mkdir()
    secret.write_bytes(PNG)
    (allowed / "link.png").symlink_to(secret)
    (allowed / "folder").symlink_to(tmp_path)
    os.mkfifo(allowed / "pipe")
    (tmp_path / "allowed-not").mkdir()
    (tmp_path / "allowed-not" / "a.png").write_bytes(PNG)
    urls = [
        secret.as_uri(),
        f"file://{allowed}/../secret.png",
        f"file://{allowed}/%2e%2e/secret.png",
        f"file://{allowed}/link.png",
        f"file://{allowed}/folder/secret.png",
        f"file://{allowed}/missing.png",
        f"file://{allowed}/pipe",
        f"file://{allowed}",
        f"file://{tmp_path}/allowed-not/a.png",
        f"file://example.com{allowed}/a.png",
        f"file://{allowed}/a%00.png",
        "file:///etc/passwd",
        "FILE:///dev/zero",
    ]

    async def use(loader: MediaLoader) -> set[str]:
        messages = set()
        for url in urls:
            with pytest.raises(RequestError) as caught:
                await loader.load(image(url))
            messages.add(caught.value.message)
        return messages

    # One sentence for all: it does not tell which files exist.
    messages = with_loader(tmp_path, use, allowed_media_path=str(allowed))
    assert messages == {"The image is a file: URL that is not a readable file in the allowed folder."}


def test_no_file_is_read_unless_the_operator_allows_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    assert "--allowed-media-path is not set" in refusal_of(tmp_path, (tmp_path / "a.png").as_uri()).message


# http ---------------------------------------------------------------------------------------------


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


# decoding processes -------------------------------------------------------------------------------


def children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent and b"api.media_worker" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def test_a_decoder_that_dies_costs_one_request(tmp_path: Path) -> None:
    video = data_url(make_video(60, 10, (640, 480)), "video/mp4")

    async def use(loader: MediaLoader) -> LoadedMedia:
        before = set(children(os.getpid()))
        doomed = asyncio.create_task(loader.load(MediaPart("video", video, PARAM)))
        started = await until(lambda: set(children(os.getpid())) - before)
        os.kill(started.pop(), signal.SIGSEGV)
        with pytest.raises(RequestError, match="decode"):
            await doomed
        return await loader.load(MediaPart("video", video, PARAM))

    assert with_loader(tmp_path, use).grid[0] == 16


def test_a_dead_image_decoder_is_replaced(tmp_path: Path) -> None:
    async def use(loader: MediaLoader) -> LoadedMedia:
        await loader.start()
        (first,) = children(os.getpid())
        os.kill(first, signal.SIGKILL)
        loaded: LoadedMedia | None = None
        for _ in range(2):  # the first may meet the death itself
            try:
                loaded = await loader.load(image(data_url(PNG)))
                break
            except RequestError as error:
                assert error.status == 400
        assert loaded is not None and children(os.getpid()) != [first]
        return loaded

    with_loader(tmp_path, use)
    assert children(os.getpid()) == []


def test_a_job_that_takes_too_long_is_a_400(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WALL_SECONDS, "video", 0.0)

    async def use(loader: MediaLoader) -> str:
        with pytest.raises(RequestError) as caught:
            await loader.load(MediaPart("video", data_url(make_video(5)), PARAM))
        return caught.value.message

    assert "took too long" in with_loader(tmp_path, use)


def test_more_waiting_jobs_than_allowed_are_a_429(tmp_path: Path) -> None:
    async def use(loader: MediaLoader) -> list[Any]:
        loader.pool._max_waiting = 1
        tasks = [asyncio.create_task(loader.load(image(data_url(PNG)))) for _ in range(6)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = with_loader(tmp_path, use)
    statuses = {getattr(result, "status", 200) for result in results}
    assert statuses == {200, 429}


def test_a_cancelled_load_leaves_nothing_behind(tmp_path: Path) -> None:
    content = data_url(make_video(120, 10, (640, 480)), "video/mp4")

    async def use(loader: MediaLoader) -> None:
        task = asyncio.create_task(loader.load(MediaPart("video", content, PARAM)))
        await until(lambda: any(path.name.endswith(".patches") for path in loader.folder.iterdir()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with_loader(tmp_path, use)


def test_a_missing_font_stops_the_server_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "Roboto-Regular.ttf").write_bytes(b"no font")

    async def run() -> None:
        loader = make_loader(tmp_path, model=str(tmp_path))
        try:
            await loader.start()
        finally:
            await loader.close()

    with pytest.raises(ConfigError, match="font"):
        asyncio.run(run())


# options ------------------------------------------------------------------------------------------


def test_wishes_are_clamped_to_the_servers_ceilings() -> None:
    policy = MediaPolicy({"video_max_frames": 64, "video_min_frames": 4})
    wishes = {"image_max_pixels": 10**9, "video_max_pixels": 10**9, "video_max_frames": 10**6}
    options = policy.resolve(wishes, {}, PARAM)
    assert options.image_max_pixels == 16384 * 784
    assert options.video_max_pixels == 1196 * 784
    assert options.video_max_frames == 64
    assert policy.resolve(None, {"max_frames": 32, "fps": 1}, PARAM).video_max_frames == 32


@pytest.mark.parametrize(
    "wishes, item, reason",
    [
        ({"video_fps": "2"}, {}, "video_fps"),
        ({"unknown": 1}, {}, "unknown"),
        ({}, {"fps": -1.0}, "video_fps"),
        ({}, {"target_frames": 20, "fps": 2.0}, "not both"),
        ({}, {"target_frames": 5}, "between 16 and 180"),
        ({}, {"target_frames": 200}, "between 16 and 180"),
        ({}, {"min_frames": 0}, "video_min_frames"),
        ({}, {"min_frames": 100, "max_frames": 50}, "video_min_frames"),
        ({}, {"frames_sample": "all"}, "frames_sample"),
        ({"image_min_pixels": 10**8}, {}, "image_min_pixels"),
        ({"image_max_pixels": 0}, {}, "image_min_pixels"),
        ({}, {"image_width": 100}, "together"),
        ({}, {"image_width": 10**6, "image_height": 10}, "between"),
        ({"video_fps": float("nan")}, {}, "video_fps"),
    ],
)
def test_a_wrong_option_is_named(wishes: dict[str, Any], item: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        MediaPolicy({}).resolve(wishes, item, PARAM)


def test_wrong_server_options_stop_the_server() -> None:
    for kwargs in (
        {"video_fps": "fast"},
        {"nonsense": 1},
        {"video_min_frames": 999},
        {"spatial_conv_size": 3},
    ):
        with pytest.raises(ConfigError, match="mm-processor-kwargs"):
            MediaPolicy(kwargs)
    assert MediaPolicy({"spatial_conv_size": 2, "video_fps": 1}).defaults.video_fps == 1


@pytest.mark.parametrize(
    "content",
    [
        '{"min_pixels": 6272, "max_pixels": 12845056}',
        '{"size": {"shortest_edge": 6272, "longest_edge": 12845056}}',
    ],
)
def test_the_checkpoint_may_set_the_pixel_bounds_and_the_operator_overrides_them(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    defaults = MediaPolicy({}, str(tmp_path)).defaults
    assert (defaults.image_min_pixels, defaults.image_max_pixels) == (6272, 12845056)
    assert MediaPolicy({"image_max_pixels": 784000}, str(tmp_path)).defaults.image_max_pixels == 784000
    (tmp_path / "preprocessor_config.json").write_text("[")
    with pytest.raises(ConfigError, match="cannot be read"):
        MediaPolicy({}, str(tmp_path))
