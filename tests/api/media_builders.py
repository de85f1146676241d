"""Encoded images and videos, decoding jobs and loaders for the tests of media and prompts."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from PIL import Image

from api.media.decode import run_job
from api.media.loader import LoadedMedia, MediaLoader, MediaPart
from api.media.options import MediaOptions
from api.media.protocol import Decoded, DecodeJob, Refused
from api.media.timestamp import TimestampFont
from engine.config import ServerConfig
from engine.errors import RequestError

T = TypeVar("T")


def make_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A smooth gradient, different in every channel and direction."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x + y) * 255 // (width + height)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8)).convert(mode)


def encode_image(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(content: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def make_video(
    num_frames: int,
    fps: int = 10,
    size: tuple[int, int] = (64, 48),
    container: str = "mp4",
    codec: str = "mpeg4",
    rotation: int = 0,
) -> bytes:
    """Frame i is grey of level 16 + 2 * i; `size` is (width, height)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if codec == "mpeg4":
            stream.bit_rate = 4_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        for index in range(num_frames):
            pixels = np.full((size[1], size[0], 3), min(255, 16 + 2 * index), np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def decode(
    content: bytes, folder: Path, kind: str = "image", max_tokens: int = 1 << 20, **options: Any
) -> tuple[Decoded | Refused, np.ndarray | None]:
    """Run one job in this process; the patches are [rows, 588], or None when it was refused."""
    source, output = folder / "source", folder / "output"
    source.write_bytes(content)
    output.unlink(missing_ok=True)
    job = DecodeJob(
        kind=kind,  # type: ignore[arg-type]
        source=str(source),
        transport="raw",
        output=str(output),
        options=MediaOptions(**options),
        max_tokens=max_tokens,
        max_bytes=1 << 30,
    )
    reply = run_job(job, TimestampFont())
    if isinstance(reply, Refused):
        assert not output.exists(), "a refused job left its output behind"
        return reply, None
    return reply, np.fromfile(output, np.uint8).reshape(-1, 588)


def make_loader(folder: Path, resolver: Any = None, **settings: Any) -> MediaLoader:
    config = {"run_directory": str(folder / "run"), "media_workers": 1, **settings}
    return MediaLoader(ServerConfig(**config), resolver)


def with_loader(
    folder: Path, use: Callable[[MediaLoader], Awaitable[Any]], resolver: Any = None, **settings: Any
) -> Any:
    """Run `use` with a loader, then check that it left nothing behind but what `use` returned.

    Decoding processes start when they are needed, so a test without decoding starts none.
    """

    async def run() -> Any:
        loader = make_loader(folder, resolver, **settings)
        loader.folder.mkdir(parents=True, exist_ok=True)
        try:
            result = await use(loader)
        finally:
            await loader.close()
        results = result if isinstance(result, list) else [result]
        kept = {item.file for item in results if isinstance(item, LoadedMedia)}
        assert {path.name for path in loader.folder.iterdir()} == kept
        return result

    return asyncio.run(run())


async def until(condition: Callable[[], T]) -> T:
    """Wait for something that only shows from outside, such as a process or a file."""
    while not (value := condition()):  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    return value


async def serve(app: web.Application) -> TestServer:
    server = TestServer(app, host="127.0.0.1")
    await server.start_server()
    return server


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
