"""A sample as an OpenAI request, and the text of a response: how samples meet a served model.

Pictures travel as PNG, clips as MP4 of high quality, both in data: URLs. What a server parsed (reasoning,
tool calls) is put back into the text that the checkers judge.
"""

from __future__ import annotations

import base64
import io
import json
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

from models.demo_training.sample import Clip, Message, Sample
from models.demo_training.skills.tools import call_text

MAX_TOKENS = 160


def chat_request(sample: Sample, model: str) -> dict[str, Any]:
    """Body of POST /v1/chat/completions, greedy."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [_wire_message(message) for message in sample.messages],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "chat_template_kwargs": {"enable_thinking": sample.thinks},
    }
    return body | ({"tools": sample.tools} if sample.tools else {})


def written_text(message: dict[str, Any]) -> str:
    """A response's message as the model wrote it, reasoning first."""
    text = message.get("content") or ""
    calls = [
        {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}
        for call in message.get("tool_calls") or []
    ]
    if calls:
        text = text.rstrip() + call_text(calls)
    reasoning = message.get("reasoning_content")
    return f"{reasoning}\n</think>\n{text}" if reasoning else text


def picture_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return data_url("image/png", buffer.getvalue())


def clip_url(clip: Clip) -> str:
    return data_url("video/mp4", encode_clip(clip))


def encode_clip(clip: Clip) -> bytes:
    """H.264 at a quality that shows no artefacts; odd sides lose their last row or column."""
    buffer = io.BytesIO()
    width, height = (side // 2 * 2 for side in clip.frames[0].size)
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(clip.fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "8", "preset": "veryfast"}
        for picture in clip.frames:
            frame = av.VideoFrame.from_ndarray(
                np.asarray(picture.crop((0, 0, width, height))), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _wire_message(message: Message) -> Message:
    wired = dict(message)
    if isinstance(message["content"], list):
        wired["content"] = [_wire_part(part) for part in message["content"]]
    if "tool_calls" in message:
        wired["tool_calls"] = [
            {**call, "id": f"call-{i}", "function": _wire_function(call["function"])}
            for i, call in enumerate(message["tool_calls"])
        ]
    if message["role"] == "tool":
        wired["tool_call_id"] = "call-0"
    return wired


def _wire_function(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def _wire_part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "image":
        return {"type": "image_url", "image_url": {"url": picture_url(part["image"])}}
    if part["type"] == "video":
        return {"type": "video_url", "video_url": {"url": clip_url(part["video"])}}
    return part
