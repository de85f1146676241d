"""From URLs to patch files through real decoding processes: who may be asked, what is left behind."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from api.media.loader import LoadedMedia, MediaLoader, MediaPart
from api.media.pool import WALL_SECONDS
from engine.errors import ConfigError, RequestError
from tests.api.media_builders import (
    PARAM,
    data_url,
    encode_image,
    image,
    make_image,
    make_loader,
    make_video,
    refusal_of,
    until,
    with_loader,
)

PNG = encode_image(make_image(60, 40))

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
