"""What the generating routes share: reading a body, and answering from a generation, streamed or whole."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from api.answer import Answer, Delta, StopRule
from api.generation import Generation, Work
from api.middleware import warn
from api.params import check_supported, read_stop_strings
from api.prompt import Prompt
from api.reasoning import Parts
from api.render import Extras, Renderer
from api.schema import BodyDecoder, GenerationRequest
from api.services import Services
from api.stop_strings import StopStrings
from api.stream import stream_answer
from api.tool_calls import ToolCallParser
from api.tools import NO_TOOLS, ToolUse
from engine.errors import RequestError
from engine.messages import SamplingParams

BODY_SECONDS = 300.0  # for the whole body to arrive


async def read_request(request: web.Request, decoder: BodyDecoder, services: Services) -> Any:
    """The decoded body of a generating route, refused early if it cannot be served at all."""
    services.engine.check_ready()
    try:
        body = await asyncio.wait_for(request.read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        message = f"The body did not arrive within {BODY_SECONDS:.0f} s."
        raise RequestError(message, status=408, code="body_timeout") from None
    parsed, unknown = decoder.decode(body)
    warn(request, unknown)
    services.check_model(parsed.model)
    check_supported(parsed)
    return parsed


def read_stop_rule(parsed: GenerationRequest, sampling: SamplingParams) -> StopRule | None:
    stops = read_stop_strings(parsed)
    if not stops:
        return None
    return StopRule(StopStrings(stops), bool(parsed.include_stop_str_in_output), sampling.min_tokens)


def read_extras(parsed: GenerationRequest, *, logprobs: bool) -> Extras:
    options = parsed.stream_options
    return Extras(
        usage=options is not None and bool(options.include_usage),
        continuous_usage=options is not None and bool(options.continuous_usage_stats),
        logprobs=logprobs,
        token_ids=bool(parsed.return_token_ids),
        timings=bool(parsed.timings),
    )


def make_work(
    prompt: Prompt,
    sampling: SamplingParams,
    stop_rule: StopRule | None,
    parts: Sequence[Parts],
    tools: ToolUse = NO_TOOLS,
) -> Work:
    """One choice of the prompt for each of `parts`, which tell reasoning from content."""
    return Work(prompt, sampling, [Answer(part, stop_rule, _call_parser(tools)) for part in parts])


def _call_parser(tools: ToolUse) -> ToolCallParser | None:
    return ToolCallParser(tools.offered, only_first=tools.only_one) if tools.is_on else None


async def answer(
    request: web.Request, services: Services, generation: Generation, renderer: Renderer, stream: bool | None
) -> web.StreamResponse:
    """Start the generation and write all of it; the engine drops what is left when this ends early."""
    generation.start(services.engine)
    with generation:
        if stream:
            return await stream_answer(request, generation, renderer)
        body = renderer.body(await collect(generation))
        return web.Response(body=body, content_type="application/json")


async def collect(generation: Generation) -> list[Delta]:
    """One complete delta for each choice, once all have ended."""
    gathered: list[list[Delta]] = [[] for _ in generation.answers]
    while not generation.is_finished:
        for choice, delta in (await generation.next()).items():
            gathered[choice].append(delta)
    return [_join(deltas) for deltas in gathered]


def _join(deltas: Sequence[Delta]) -> Delta:
    return Delta(
        reasoning="".join([delta.reasoning for delta in deltas]),
        content="".join([delta.content for delta in deltas]),
        tool_calls=[call for delta in deltas for call in delta.tool_calls],
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=[logprob for delta in deltas for logprob in delta.logprobs],
        finish_reason=deltas[-1].finish_reason,
    )
