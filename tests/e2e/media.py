"""A real JPEG and a real MP4, drawn and encoded here, as data: URLs."""

from __future__ import annotations

import base64
import io

import av
import numpy as np
from PIL import Image, ImageDraw


def jpeg_bytes(width: int = 160, height: int = 120, seed: int = 0) -> bytes:
    """Coloured shapes over a gradient, so that no two patches look alike."""
    rows, columns = np.mgrid[0:height, 0:width]
    gradient = np.stack(
        [rows * 255 // height, columns * 255 // width, (rows + columns + seed * 40) % 256], axis=-1
    )
    image = Image.fromarray(gradient.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((20 + seed * 7, 20, 70 + seed * 7, 70), fill=(220, 30, 30))
    draw.rectangle((width // 2, height // 2, width - 10, height - 10), fill=(30, 60, 200))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def mp4_bytes(seconds: int = 2, width: int = 96, height: int = 64, fps: int = 8) -> bytes:
    """A square that moves from left to right."""
    encoded = io.BytesIO()
    with av.open(encoded, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(seconds * fps):
            frame = np.full((height, width, 3), 235, np.uint8)
            left = index * (width - 20) // (seconds * fps)
            frame[20:40, left : left + 20] = (200, 20, 20)
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return encoded.getvalue()


def data_url(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def image_part(seed: int = 0, width: int = 160, height: int = 120) -> dict[str, object]:
    return {
        "type": "image_url",
        "image_url": {"url": data_url(jpeg_bytes(width, height, seed), "image/jpeg")},
    }


def video_part() -> dict[str, object]:
    return {"type": "video_url", "video_url": {"url": data_url(mp4_bytes(), "video/mp4")}}
