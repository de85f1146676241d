"""Smallest worlds for the api's tests: a byte-level tokenizer, a model, a whole api on a loopback port."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai
import openai.lib.streaming.chat  # the client would import it in its first call, on the loop under guard

from api.app import ApiServer
from api.engine_client import EngineClient
from api.guides import GuideMaker
from api.params import Defaults
from api.prompt import PromptBuilder
from api.reasoning import ReasoningParser
from api.services import Admission, Services
from api.template import load_template
from api.tokenizer import Tokenizer
from api.tokenizer_files import TokenizerFiles
from engine.channels import RunDirectory
from engine.config import ServerConfig
from engine.model_config import ModelConfig, VisionConfig
from tests.api.fakes import PATIENCE, FakeEngine, FakeMedia, Script

MARKERS = (
    "<|end_of_sentence|>",
    "<|begin_of_sentence|>",
    "<|IMAGE_PLACEHOLDER|>",
    "<|IMAGE_START|>",
    "<|IMAGE_END|>",
    "<|VIDEO_START|>",
    "<|VIDEO_END|>",
    "</s>",
)
THINK_MARKERS = ("<think>", "</think>")
TOOL_MARKERS = ("<tool_call>", "</tool_call>")


def make_tokenizer(*, think_tokens: bool = True, tool_tokens: bool = False) -> Tokenizer:
    """Token i < 256 is byte i; the markers follow."""
    names = MARKERS + (THINK_MARKERS if think_tokens else ()) + (TOOL_MARKERS if tool_tokens else ())
    markers = {name: 256 + index for index, name in enumerate(names)}
    pieces = [bytes([i]) for i in range(256)] + [name.encode() for name in names]
    return Tokenizer(TokenizerFiles(pieces, markers, lambda text: list(text.encode()), longest_piece=1))


def make_model(tokenizer: Tokenizer, *, context: int = 4096, **changes: Any) -> ModelConfig:
    """A vision-language model whose special ids are those of the tokenizer."""
    ids = tokenizer.markers
    fields: dict[str, Any] = {
        "family": "vl",
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 8,
        "head_dim": 8,
        "intermediate_size": 64,
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": context,
        "rope_theta": 500000.0,
        "time_frequencies": 2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "num_experts": 0,
        "moe_intermediate_sizes": (),
        "moe_layers": (),
        "moe_top_k": 0,
        "moe_norm_min": 1e-12,
        "num_shared_experts": 0,
        "dtype": "float32",
        "image_patch_id": ids["<|IMAGE_PLACEHOLDER|>"],
        "image_start_id": ids["<|IMAGE_START|>"],
        "image_end_id": ids["<|IMAGE_END|>"],
        "video_start_id": ids["<|VIDEO_START|>"],
        "video_end_id": ids["<|VIDEO_END|>"],
        "pad_token_id": 0,
        "bos_token_id": ids["<|begin_of_sentence|>"],
        "eos_token_ids": (ids["</s>"],),
        "vision": VisionConfig(depth=1, hidden_size=16, num_heads=2, intermediate_size=16),
    }
    return ModelConfig(**{**fields, **changes})


@dataclass
class Api:
    """A running api and the engine it talks to."""

    url: str
    engine: FakeEngine
    services: Services
    server: ApiServer
    http: aiohttp.ClientSession

    def client(self, **options: Any) -> openai.AsyncOpenAI:
        settings: dict[str, Any] = {
            "base_url": f"{self.url}/v1",
            "api_key": "none",
            "max_retries": 0,
            "timeout": PATIENCE,
        }
        return openai.AsyncOpenAI(**{**settings, **options})

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any, Any]:
        """Status, decoded JSON and headers."""
        async with self.http.post(self.url + path, json=body, **options) as answer:
            return answer.status, await answer.json(), answer.headers

    async def chat(self, content: str = "Hi", **fields: Any) -> tuple[int, Any, Any]:
        body = {"messages": [{"role": "user", "content": content}], **fields}
        return await self.post("/v1/chat/completions", body)

    async def complete(self, prompt: Any = "Hi", **fields: Any) -> tuple[int, Any, Any]:
        return await self.post("/v1/completions", {"prompt": prompt, **fields})

    async def get(self, path: str, **options: Any) -> tuple[int, Any, Any]:
        async with self.http.get(self.url + path, **options) as answer:
            return answer.status, await answer.json(), answer.headers

    def assert_nothing_open(self) -> None:
        """Count the books: no sequence, no slot, no media file is left."""
        assert self.services.engine.num_open == 0
        assert self.services.admission.num_open == 0
        assert self.engine.live == {}


@contextlib.asynccontextmanager
async def running_api(
    script: Script | None = None,
    *,
    think_tokens: bool = True,
    tool_tokens: bool = False,
    context: int = 4096,
    defaults: Defaults | None = None,
    ready: bool = True,
    **settings: Any,
) -> AsyncIterator[Api]:
    """The real application on a free loopback port, with a FakeEngine behind it."""
    root = Path(tempfile.mkdtemp(prefix="octet-api-test-"))  # short: ipc paths are bounded to 107 bytes
    config = ServerConfig(
        **{"model": "/models/tiny", "host": "127.0.0.1", "port": 0, "run_directory": str(root), **settings}
    )
    directory = RunDirectory(root)
    engine = FakeEngine(directory, script)
    if not ready:
        await engine.set_state("starting", "loading weights")
    tokenizer = make_tokenizer(think_tokens=think_tokens, tool_tokens=tool_tokens)
    services = _make_services(config, directory, tokenizer, context, defaults)
    services.engine.connect()
    server = ApiServer(services)
    port = await server.start()
    try:
        if ready:
            await services.engine.until_state("ready")
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as http:
            yield Api(f"http://127.0.0.1:{port}", engine, services, server, http)
    finally:
        await server.close()
        services.engine.close()
        await engine.close()
        shutil.rmtree(root)


def _make_services(
    config: ServerConfig,
    directory: RunDirectory,
    tokenizer: Tokenizer,
    context: int,
    defaults: Defaults | None,
) -> Services:
    model = make_model(tokenizer, context=context)
    template = load_template("", directory.root, model.family)
    media: Any = FakeMedia(directory.media)
    return Services(
        config=config,
        model=model,
        tokenizer=tokenizer,
        prompts=PromptBuilder(config, model, tokenizer, template, media),
        engine=EngineClient(directory),
        reasoning=ReasoningParser(config.reasoning_parser, tokenizer, is_vision_model=True),
        guides=GuideMaker(tokenizer, model.eos_token_ids),
        defaults=defaults or Defaults(),
        admission=Admission(config.max_concurrency),
    )
