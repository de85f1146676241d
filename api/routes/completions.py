"""POST /v1/completions"""

from __future__ import annotations

import asyncio
import functools
import time

from aiohttp import web

from api.generation import Generation
from api.guides import read_form
from api.params import fit_to_context, read_num_choices, read_sampling, read_scheduling, with_guide
from api.reasoning import ContentOnly
from api.render import TextRenderer
from api.routes.common import answer, make_work, read_extras, read_request, read_stop_rule
from api.schema import BodyDecoder, CompletionRequest
from api.services import SERVICES, Services
from api.trace import TRACE
from engine.errors import RequestError

BUILD_IN_PLACE = 8192  # characters or tokens; encoding more would hold up the event loop

_decoder = BodyDecoder(CompletionRequest)


async def create(request: web.Request) -> web.StreamResponse:
    services = request.app[SERVICES]
    arrival = time.monotonic()
    with services.admission.slot():
        completion: CompletionRequest = await read_request(request, _decoder, services)
        generation = await _prepare(request, services, completion, arrival)
        extras = read_extras(completion, logprobs=completion.logprobs is not None)
        renderer = TextRenderer(generation, services.tokenizer, extras, echo=bool(completion.echo))
        return await answer(request, services, generation, renderer, completion.stream)


async def _prepare(
    request: web.Request, services: Services, completion: CompletionRequest, arrival: float
) -> Generation:
    sampling = read_sampling(completion, services.defaults, services.vocab_size)
    scheduling = read_scheduling(completion, request[TRACE].api_key)
    named = _named_prompts(completion)
    n, stop_rule = read_num_choices(completion, len(named)), read_stop_rule(completion, sampling)
    works = []
    sampling = with_guide(sampling, await services.guides.make(read_form(completion)))
    for param, text_or_ids in named:
        build = functools.partial(services.prompts.build_text, text_or_ids, param)
        prompt = build() if len(text_or_ids) < BUILD_IN_PLACE else await asyncio.to_thread(build)
        if not prompt.token_ids:
            raise RequestError("The prompt is empty; it needs at least one token.", param=param)
        fitted = fit_to_context(sampling, len(prompt.token_ids), services.max_model_len, param)
        parts = [ContentOnly(services.tokenizer) for _ in range(n)]
        works.append(make_work(prompt, fitted, stop_rule, parts))
    request[TRACE].prompts = [work.prompt for work in works]
    return Generation("cmpl", services.model_name, works, arrival, scheduling)


def _named_prompts(completion: CompletionRequest) -> list[tuple[str, str | list[int]]]:
    """Each prompt with the path it came from: a text, a list of texts, token ids, or a list of those."""
    if completion.prompt_token_ids is not None:
        return [("prompt_token_ids", completion.prompt_token_ids)]
    prompt = completion.prompt
    if prompt is None:
        raise RequestError("prompt is missing.", param="prompt")
    if isinstance(prompt, str):
        return [("prompt", prompt)]
    if all(isinstance(item, int) for item in prompt):
        return [("prompt", prompt)]  # type: ignore[list-item]
    kind = type(prompt[0])
    for index, item in enumerate(prompt):
        if type(item) is not kind:
            raise RequestError(
                "A list of prompts must be all texts, all token ids, or all lists of token ids.",
                param=f"prompt[{index}]",
                code="invalid_type",
            )
    return [(f"prompt[{index}]", item) for index, item in enumerate(prompt)]  # type: ignore[misc]
