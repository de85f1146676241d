"""What the handlers of one api process share, found in the application under SERVICES."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from api.engine_client import EngineClient
from api.errors import EngineUnavailable
from api.guides import GuideMaker
from api.media.loader import MediaLoader
from api.params import Defaults, read_defaults
from api.prompt import PromptBuilder
from api.reasoning import ReasoningParser
from api.template import load_template
from api.tokenizer import Tokenizer, load_tokenizer
from engine.channels import RunDirectory
from engine.config import ServerConfig
from engine.errors import RequestError
from engine.grammar import write_vocabulary
from engine.model_config import ModelConfig, read_model_config


class Admission:
    """Counts the requests that generate; refuses more than `limit`, and all once draining."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_open = 0
        self.is_draining = False
        self._empty = asyncio.Event()
        self._empty.set()

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one place; RequestError 429 when all are taken."""
        if self.is_draining:
            raise EngineUnavailable("The server is shutting down.", retry_after=5)
        if self.num_open >= self.limit:
            raise RequestError(
                f"This server handles {self.limit} requests at once, and all places are taken. Try again.",
                status=429,
                code="too_many_requests",
                retry_after=1,
            )
        self.num_open += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.num_open -= 1
            if not self.num_open:
                self._empty.set()

    async def until_empty(self, seconds: float) -> bool:
        """Wait until no request is open, at most `seconds`; whether that happened."""
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True


@dataclass
class Services:
    """Made once by open_services; every field is ready to use."""

    config: ServerConfig
    model: ModelConfig
    tokenizer: Tokenizer
    prompts: PromptBuilder
    engine: EngineClient
    reasoning: ReasoningParser
    guides: GuideMaker
    defaults: Defaults
    admission: Admission
    started: int = field(default_factory=lambda: int(time.time()))  # unix seconds, `created` of the model

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self.config.max_model_len or self.model.max_position_embeddings

    @property
    def vocab_size(self) -> int:
        """Ids below it may stand in a request."""
        return min(self.tokenizer.vocab_size, self.model.vocab_size)

    @property
    def folder_name(self) -> str:
        """Of the checkpoint, or of the preset's file."""
        return Path(self.config.model).name.removesuffix(".json") or "octet"

    @property
    def model_name(self) -> str:
        """What answers call the model: --served-model-name, else what was typed, else its folder's name."""
        return self.config.served_model_name or self.config.display_name or self.folder_name

    def check_model(self, name: str | None) -> None:
        """RequestError 404 for another name than --served-model-name; without that flag any name is fine."""
        served = self.config.served_model_name
        if served and name is not None and name not in (served, self.folder_name):
            raise RequestError(
                f"There is no model {name[:200]!r} here; this server serves {served!r}.",
                param="model",
                status=404,
                code="model_not_found",
            )


SERVICES: web.AppKey[Services] = web.AppKey("services", Services)


def _checkpoint_folder(config: ServerConfig) -> Path:
    """Where the model's files lie; a preset is a single file among others."""
    path = Path(config.model)
    return path if path.is_dir() else path.parent


@contextlib.asynccontextmanager
async def open_services(config: ServerConfig, directory: RunDirectory) -> AsyncIterator[Services]:
    """Read tokenizer and template, start the decoding processes, connect to the engine; undo it at the end.

    Raises ConfigError when a flag or a file of the checkpoint is wrong.
    """
    folder = _checkpoint_folder(config)
    model = read_model_config(config.model, config.config_overrides)
    tokenizer_folder = Path(config.tokenizer or folder)
    tokenizer = load_tokenizer(tokenizer_folder, folder)
    template = load_template(config.chat_template, tokenizer_folder, model.family)
    guides = GuideMaker(tokenizer, model.eos_token_ids)
    write_vocabulary(directory.vocabulary, guides.vocabulary)
    media = MediaLoader(config)
    engine = EngineClient(directory)
    services = Services(
        config=config,
        model=model,
        tokenizer=tokenizer,
        prompts=PromptBuilder(config, model, tokenizer, template, media),
        engine=engine,
        reasoning=ReasoningParser(config.reasoning_parser, tokenizer, is_vision_model=model.family == "vl"),
        guides=guides,
        defaults=read_defaults(folder),
        admission=Admission(config.max_concurrency),
    )
    await media.start()
    try:
        engine.connect()
        try:
            yield services
        finally:
            engine.close()
    finally:
        await media.close()
