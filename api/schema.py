"""Request bodies as typed structs, and how a body becomes one.

Types only: ranges and what a field means are in params.py. A field that no struct knows is accepted and
reported, so that clients of other servers keep working; a field of the wrong type is an error with its path.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from engine.errors import RequestError

Role = Literal["system", "developer", "user", "assistant", "bot", "tool", "function"]


# messages -----------------------------------------------------------------------------------------


class TextPart(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class ImageUrl(msgspec.Struct, omit_defaults=True):
    """`url` is data:, http(s): or, under the allowed directory, file:."""

    url: str
    detail: str | None = None  # OpenAI's low/high/auto; the size rules of the model decide instead
    image_width: int | None = None  # resize to this before the model's own rules
    image_height: int | None = None


class ImagePart(msgspec.Struct, tag_field="type", tag="image_url"):
    image_url: ImageUrl | str


class VideoUrl(msgspec.Struct, omit_defaults=True):
    url: str
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    target_frames: int | None = None
    frames_sample: str | None = None


class VideoPart(msgspec.Struct, tag_field="type", tag="video_url"):
    video_url: VideoUrl | str


class RefusalPart(msgspec.Struct, tag_field="type", tag="refusal"):
    """Part of an earlier answer that a client sends back."""

    refusal: str


Part = TextPart | ImagePart | VideoPart | RefusalPart


class Message(msgspec.Struct, omit_defaults=True):
    role: Role
    content: str | list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None


# requests -----------------------------------------------------------------------------------------


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # usage in every chunk
    include_obfuscation: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What chat and text completions share. null means "not given" everywhere."""

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structural_tag: dict[str, Any] | str | None = None
    logit_bias: dict[str, float] | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    priority: int | None = None  # smaller runs earlier
    timeout: float | None = None  # seconds
    cache_salt: str | None = None
    timings: bool | None = None
    # Accepted from clients that send them to every server; they choose nothing here.
    collect_metrics: bool | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None


class ChatRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions"""

    messages: list[Message] = []
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prompt_token_ids: list[int] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    modalities: list[str] | None = None
    prompt_cache_key: str | None = None
    verbosity: str | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions"""

    prompt: str | list[str | int | list[int]] | None = None  # one kind of item per list, see params.py
    prompt_token_ids: list[int] | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


Request = TypeVar("Request", bound=GenerationRequest)

_raw_object = msgspec.json.Decoder(dict[str, msgspec.Raw])


class BodyDecoder:
    """Decodes one kind of request; made once per route."""

    def __init__(self, request_type: type[Request]) -> None:
        self._decoder = msgspec.json.Decoder(request_type)
        self._known = frozenset(field.encode_name for field in msgspec.structs.fields(request_type))

    def decode(self, body: bytes) -> tuple[Any, list[str]]:
        """The request and the names of its unknown fields; RequestError with the path of what is wrong."""
        try:
            request = self._decoder.decode(body)
            unknown = [name for name in _raw_object.decode(body) if name not in self._known]
        except msgspec.ValidationError as error:
            raise _type_error(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            raise RequestError(f"The body is not valid JSON: {reason}.", code="invalid_json") from None
        except RecursionError:
            raise RequestError("The body is nested too deeply.", code="invalid_json") from None
        return request, unknown


def _type_error(text: str) -> RequestError:
    """From msgspec's sentence, which ends in the place (``- at `$.stop[1]` ``), to ours with `param`."""
    what, _, place = text.partition(" - at `")
    path = place.rstrip("`").removeprefix("$").lstrip(".")
    missing = what.split("`")[1] if what.startswith("Object missing required field `") else ""
    param = ".".join(part for part in (path, missing) if part) or None
    return RequestError(f"{what} at {param or 'the top of the body'}.", param=param, code="invalid_type")
