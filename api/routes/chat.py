"""POST /v1/chat/completions"""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from api.generation import Generation
from api.guides import read_form
from api.params import (
    fit_to_context,
    read_num_choices,
    read_sampling,
    read_scheduling,
    read_thinking,
    with_guide,
)
from api.prompt import Prompt
from api.render import ChatRenderer
from api.routes.common import answer, make_work, read_extras, read_request, read_stop_rule
from api.schema import BodyDecoder, ChatRequest
from api.services import SERVICES, Services
from api.tools import ToolUse, read_tools
from api.trace import TRACE

_decoder = BodyDecoder(ChatRequest)


async def create(request: web.Request) -> web.StreamResponse:
    services = request.app[SERVICES]
    arrival = time.monotonic()
    with services.admission.slot():
        chat: ChatRequest = await read_request(request, _decoder, services)
        generation = await _prepare(request, services, chat, arrival)
        extras = read_extras(chat, logprobs=bool(chat.logprobs))
        renderer = ChatRenderer(generation, services.tokenizer, extras)
        return await answer(request, services, generation, renderer, chat.stream)


async def _prepare(request: web.Request, services: Services, chat: ChatRequest, arrival: float) -> Generation:
    """Check everything that can be checked before the prompt is built; then build it."""
    sampling = read_sampling(chat, services.defaults, services.vocab_size)
    scheduling = read_scheduling(chat, request[TRACE].api_key)
    n, stop_rule = read_num_choices(chat), read_stop_rule(chat, sampling)
    form, tools = read_form(chat), read_tools(chat)
    prompt = await _build_prompt(services, chat, tools)
    request[TRACE].prompts = [prompt]
    param = "messages" if chat.prompt_token_ids is None else "prompt_token_ids"
    try:
        sampling = fit_to_context(sampling, len(prompt.token_ids), services.max_model_len, param)
        guide = await services.guides.make(form, tools, thinking_open=prompt.thinking_open)
    except BaseException:
        prompt.release()
        raise
    parts = [services.reasoning.parts(thinking_open=prompt.thinking_open) for _ in range(n)]
    work = make_work(prompt, with_guide(sampling, guide), stop_rule, parts, tools)
    return Generation("chatcmpl", services.model_name, [work], arrival, scheduling)


async def _build_prompt(services: Services, chat: ChatRequest, tools: ToolUse) -> Prompt:
    options = {"mm_processor_kwargs": chat.mm_processor_kwargs}
    if chat.prompt_token_ids is not None:
        return await services.prompts.build_tokens(chat.prompt_token_ids, chat.messages, options)
    shown = tools.for_prompt
    return await services.prompts.build_chat(chat.messages, shown, _template_kwargs(chat), options)


def _template_kwargs(chat: ChatRequest) -> dict[str, Any]:
    """The client's template variables, with the one spelling of enable_thinking that templates read."""
    kwargs = dict(chat.chat_template_kwargs or {})
    thinking = read_thinking(chat)
    if thinking is not None:
        kwargs["enable_thinking"] = thinking
    return kwargs
