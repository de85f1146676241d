"""Client messages in the form that chat templates expect, and the media they mention, in prompt order.

Knows OpenAI's spellings: roles with older names, content as a string or as parts, arguments of tool calls as
JSON text. Fields that no template uses (`name`, ids) are dropped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec

from api.media.loader import MediaPart
from engine.errors import RequestError

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
}


class Conversation(msgspec.Struct, frozen=True):
    """messages hold only strings, and lists of text and media parts where a user sent media."""

    messages: list[dict[str, Any]]
    media: list[MediaPart]


def read_conversation(messages: Sequence[Any]) -> Conversation:
    """`messages` are dicts or structs of the schema. Raises RequestError with the path of what is wrong."""
    conversation = Conversation([], [])
    for index, message in enumerate(msgspec.to_builtins(list(messages))):
        conversation.messages.append(_read_message(message, f"messages[{index}]", conversation.media))
    return conversation


def _read_message(message: Any, path: str, media: list[MediaPart]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError("Each message must be an object.", param=path)
    role = _ROLES.get(message.get("role"))  # type: ignore[arg-type]
    if role is None:
        known = ", ".join(_ROLES)
        raise RequestError(f"The role must be one of {known}.", param=f"{path}.role")
    num_media = len(media)
    content = _read_content(message.get("content"), f"{path}.content", media)
    if len(media) > num_media and role != "user":
        raise RequestError("Images and videos may only be in user messages.", param=f"{path}.content")
    read: dict[str, Any] = {"role": role, "content": content or message.get("refusal") or ""}
    if role == "assistant":
        _check_string(message.get("reasoning_content"), f"{path}.reasoning_content")
        if message.get("reasoning_content"):
            read["reasoning_content"] = message["reasoning_content"]
        if message.get("tool_calls"):
            read["tool_calls"] = _read_tool_calls(message["tool_calls"], f"{path}.tool_calls")
    return read


def _read_content(content: Any, path: str, media: list[MediaPart]) -> str | list[dict[str, str]]:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise RequestError("The content must be a string or a list of parts.", param=path)
    parts = [_read_part(part, f"{path}[{index}]", media) for index, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)  # templates of text models know only strings
    return parts


def _read_part(part: Any, path: str, media: list[MediaPart]) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "refusal"):
        _check_string(part.get(kind), f"{path}.{kind}", required=True)
        return {"type": "text", "text": part[kind]}
    if kind == "image_url":
        media.append(_media_part("image", part.get(kind), f"{path}.{kind}"))
        return {"type": kind}
    if kind == "video_url":
        media.append(_media_part("video", part.get(kind), f"{path}.{kind}"))
        return {"type": kind}
    raise RequestError("A part must be of type text, image_url or video_url.", param=f"{path}.type")


def _media_part(kind: Any, value: Any, path: str) -> MediaPart:
    if isinstance(value, str):
        return MediaPart(kind, value, path)
    if not isinstance(value, dict) or not isinstance(value.get("url"), str):
        raise RequestError('Give {"url": "..."} with a data:, http(s): or file: URL.', param=path)
    kwargs = {name: item for name, item in value.items() if name not in ("url", "detail")}
    return MediaPart(kind, value["url"], path, kwargs)


def _read_tool_calls(calls: Any, path: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RequestError("tool_calls must be a list.", param=path)
    return [_read_tool_call(call, f"{path}[{index}]") for index, call in enumerate(calls)]


def _read_tool_call(call: Any, path: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError("A tool call needs a function with a name.", param=f"{path}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # What is no JSON stays as it is: the model wrote it so, and its history may show it.
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments) if arguments else {}
    function = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    return {"type": "function", "function": function}


def _check_string(value: Any, path: str, required: bool = False) -> None:
    if not isinstance(value, str) and (required or value is not None):
        raise RequestError("This must be a string.", param=path)
