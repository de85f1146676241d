"""One decoding job: unwrap, decode, resize, cut, hash, write. Runs in the decoder process."""

from __future__ import annotations

import base64
import binascii
import errno
import os
import time
from contextlib import suppress
from io import BytesIO
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from PIL import Image

from api.media.geometry import num_image_tokens, num_video_tokens, smart_resize
from api.media.images import read_image
from api.media.options import MediaOptions
from api.media.patch_file import PatchFile
from api.media.protocol import Decoded, DecodeJob, Refused
from api.media.refusal import MediaRefusal
from api.media.sampling import choose_frames, timestamps
from api.media.timestamp import TimestampFont


def run_job(job: DecodeJob, font: TimestampFont, threads: int = 1) -> Decoded | Refused:
    """Never raises for bad input. The output file exists only if the answer is Decoded."""
    started = time.perf_counter()
    try:
        with _open_source(job) as file:
            patches = (
                _decode_image(job, file) if job.kind == "image" else _decode_video(job, file, font, threads)
            )
    except MediaRefusal as refusal:
        _remove(job.output)
        return Refused(str(refusal))
    except MemoryError:
        _remove(job.output)
        return Refused("needs more memory than one item may take; send a smaller one")
    except OSError as error:
        _remove(job.output)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return Refused("does not fit into the server's media space now; try again later", 503)
        return Refused("cannot be read")
    return Decoded(
        patches.content_hash, patches.grid, _num_tokens(job, patches.grid), time.perf_counter() - started
    )


def _decode_image(job: DecodeJob, file: BinaryIO) -> PatchFile:
    image = read_image(file)
    options = job.options
    if options.image_width and options.image_height:
        image = image.resize((options.image_width, options.image_height), Image.Resampling.BICUBIC)
    height, width = smart_resize(
        image.height, image.width, options.image_min_pixels, options.image_max_pixels
    )
    _check_tokens(job, num_image_tokens(height // 14, width // 14))
    patches = PatchFile(job.output, "image", 1, height, width)
    try:
        patches.add(image)
    finally:
        patches.close()
    return patches


def _decode_video(job: DecodeJob, file: BinaryIO, font: TimestampFont, threads: int) -> PatchFile:
    from api.media.video import Video  # loads FFmpeg, which processes that see only images do without

    video = Video(file, threads)
    try:
        facts = video.facts()
        indices = choose_frames(facts, job.options)
        if not indices:
            raise MediaRefusal("has no frames")
        frames = zip(video.frames(indices), timestamps(indices, facts), strict=True)
        return _write_frames(job, frames, len(indices), font)
    finally:
        video.close()


def _write_frames(job: DecodeJob, frames: zip, count: int, font: TimestampFont) -> PatchFile:
    """Stamp, resize and append every frame; the last one twice if their number is odd."""
    patches: PatchFile | None = None
    size = (0, 0)
    try:
        for image, seconds in frames:
            if patches is None:
                size = _frame_size(image, job.options)
                even = count + count % 2
                _check_tokens(job, num_video_tokens(even, size[0] // 14, size[1] // 14))
                patches = PatchFile(job.output, "video", even, *size)
            font.draw(image, seconds)
            patches.add(image)
        if patches is None:
            raise MediaRefusal("has no frames")
        if count % 2:
            patches.repeat()
    finally:
        if patches is not None:
            patches.close()
    return patches


def _frame_size(image: Image.Image, options: MediaOptions) -> tuple[int, int]:
    return smart_resize(image.height, image.width, options.video_min_pixels, options.video_max_pixels)


def _num_tokens(job: DecodeJob, grid: tuple[int, int, int]) -> int:
    return num_image_tokens(*grid[1:]) if job.kind == "image" else num_video_tokens(*grid)


def _check_tokens(job: DecodeJob, num_tokens: int) -> None:
    if num_tokens > job.max_tokens:
        wish = "image_max_pixels" if job.kind == "image" else "max_frames or video_max_pixels"
        raise MediaRefusal(
            f"needs {num_tokens} tokens, but the context has room for {job.max_tokens}; lower {wish}"
        )


def _open_source(job: DecodeJob) -> BinaryIO:
    if job.transport == "raw":
        return open(job.source, "rb")
    with open(job.source, "rb") as file:
        content = _unwrap(file.read(), job.transport)
    if not content:
        raise MediaRefusal("is empty")
    if len(content) > job.max_bytes:
        raise MediaRefusal(f"has more than {job.max_bytes} bytes")
    return BytesIO(content)


def _unwrap(wrapped: bytes, transport: str) -> bytes:
    if transport == "percent" or b"%" in wrapped:
        wrapped = unquote_to_bytes(wrapped)
        if transport == "percent":
            return wrapped
    try:
        return base64.b64decode(b"".join(wrapped.split()), validate=True)
    except (binascii.Error, ValueError):
        raise MediaRefusal("is not valid base64") from None


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
