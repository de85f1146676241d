"""How many images and video frames one core prepares in a second, and where the time goes.

Method      one process, one thread; each stage and the whole job (file in, patch file in /dev/shm out) run
            over and over for a fixed time; the median of their CPU time is reported, so that a busy machine
            tells nearly the same. The answer is checked first: the job's patches equal the stages' own.
            `pillow` is what resize_and_cut replaces: Pillow's resize and a strided copy, for comparison.
Bytes       a 1024x768 image becomes 1036x756: 2,349,648 bytes of patches, hashed and written once.
How to read images/s is 1 / job; the stages do not add up to it exactly, since a job also opens files.
Reference   Pillow + NumPy with float normalisation on the host: 47 images/s per core on a Zen 5.
Run         python -m tests.bench.bench_media [--save]
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from api.media.decode import run_job
from api.media.geometry import smart_resize
from api.media.images import read_image, resize
from api.media.options import MediaOptions
from api.media.patches import ContentHash, resize_to_patches, write_patches
from api.media.protocol import Decoded, DecodeJob
from api.media.timestamp import TimestampFont
from tests.api.media_builders import encode_image, make_video
from tests.bench.result_files import save, save_option

SIZES = ((640, 480), (1024, 768), (1920, 1080), (4000, 3000))


def make_photo(width: int, height: int, seed: int = 0) -> bytes:
    """A JPEG of quality 90 with smooth areas and some detail, about 0.25 bytes per pixel."""
    rand = np.random.default_rng(seed)
    coarse = rand.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = rand.normal(0, 3, (height, width, 1))
    return encode_image(
        Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)), "JPEG", quality=90
    )


def median_ms(work: Callable[[], Any], seconds: float = 1.0) -> float:
    work()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return statistics.median(times) * 1e3


def measure_image(width: int, height: int, folder: Path) -> dict[str, float]:
    content, options = make_photo(width, height), MediaOptions()
    rows, columns = smart_resize(height, width, options.image_min_pixels, options.image_max_pixels)
    image = read_image(io.BytesIO(content))
    pixels = resize(image, rows, columns)
    patches = np.empty((rows // 14 * (columns // 14), 588), np.uint8)
    run = _job(content, folder, "image", options)
    _check(run(), patches, pixels, folder)
    job = median_ms(run)
    return {
        "kilobytes": len(content) / 1e3,
        "decode_ms": median_ms(lambda: read_image(io.BytesIO(content))),
        "resize_and_cut_ms": median_ms(lambda: resize_to_patches(image, rows, columns, patches)),
        "pillow_ms": median_ms(lambda: write_patches(resize(image, rows, columns), patches)),
        "hash_ms": median_ms(lambda: ContentHash("image", (1, 1, 1)).update(patches)),
        "job_ms": job,
        "images_per_second": 1e3 / job,
    }


def measure_video(width: int, height: int, folder: Path) -> dict[str, float]:
    """20 seconds of h264 at 30 frames per second; 40 of its frames are used."""
    content, options = make_video(600, 30, (width, height), codec="libx264"), MediaOptions()
    reply: list[Decoded] = []
    job = median_ms(lambda: reply.append(_job(content, folder, "video", options)()), seconds=0.1)
    return {"job_ms": job, "frames": reply[0].grid[0], "ms_per_used_frame": job / reply[0].grid[0]}


def _job(content: bytes, folder: Path, kind: Any, options: MediaOptions) -> Callable[[], Decoded]:
    source, output, font = folder / "in", folder / "out", TimestampFont()
    source.write_bytes(content)
    job = DecodeJob(kind, str(source), "raw", str(output), options, 1 << 30, 1 << 30)

    def run() -> Decoded:
        output.unlink(missing_ok=True)
        reply = run_job(job, font)
        assert isinstance(reply, Decoded), reply
        return reply

    return run


def _check(reply: Decoded, patches: np.ndarray, pixels: np.ndarray, folder: Path) -> None:
    write_patches(pixels, patches)
    content = ContentHash("image", reply.grid)
    content.update(patches)
    assert content.hexdigest() == reply.content_hash
    assert (np.fromfile(folder / "out", np.uint8) == patches.reshape(-1)).all()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    save_option(parser)
    wants_save = parser.parse_args().save
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shared) as name:
        results: dict[str, dict[str, float]] = {}
        for width, height in SIZES:
            results[f"image {width}x{height}"] = measure_image(width, height, Path(name))
        for width, height in ((640, 360), (1920, 1080)):
            results[f"video {width}x{height}"] = measure_video(width, height, Path(name))
    for what, figures in results.items():
        print(f"{what:16} " + "  ".join(f"{name} {value:.1f}" for name, value in figures.items()))
    if wants_save:
        save("media", results)


if __name__ == "__main__":
    main()
