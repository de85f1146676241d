"""One HTTP request while the engine works on it: its choices, their ends, the final counts.

Routes make a Generation from a prompt and checked parameters; stream.py and responses.py take deltas from it
until it is finished. It is a context manager, so however a handler ends, the engine is told.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

import msgspec

from api.answer import Answer, Delta
from api.engine_client import EngineClient, OpenRequest
from api.params import Scheduling, with_seed_of_choice
from api.prompt import Prompt
from api.timings import Stopwatch
from engine.messages import AddRequest, MediaItem, SamplingParams


class PromptDetails(msgspec.Struct):
    cached_tokens: int
    image_tokens: int
    video_tokens: int


class CompletionDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    """OpenAI's usage object; the prompt of several choices counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


@dataclass
class Work:
    """One prompt and how to sample from it; `n` choices of it are generated."""

    prompt: Prompt
    sampling: SamplingParams
    answers: list[Answer] = field(default_factory=list)


class Generation:
    """Choices are numbered over all prompts: choice i belongs to prompt i // n."""

    def __init__(
        self, kind: str, model: str, works: Sequence[Work], arrival: float, scheduling: Scheduling
    ) -> None:
        """`kind` is the prefix of the id, "chatcmpl" or "cmpl"; `arrival` is time.monotonic()."""
        self.key = secrets.token_hex(12)  # ours alone: nothing a client sends is used as a key
        self.id = f"{kind}-{self.key}"
        self.model = model
        self.created = int(time.time())
        self.works = works
        self.answers = [answer for work in works for answer in work.answers]
        self._num_unfinished = len(self.answers)
        self._arrival = arrival
        self._scheduling = scheduling
        self.stopwatch = Stopwatch(arrival, sum(work.prompt.media_seconds for work in works))
        self._opened: OpenRequest | None = None
        self._shared: list[Prompt] = []  # of the choices behind the first

    def start(self, engine: EngineClient) -> None:
        """Send every sequence. If that fails, the prompts' media files are deleted."""
        try:
            self._opened = engine.open(self._requests())
            self.stopwatch.sent()
        except BaseException:
            for prompt in [work.prompt for work in self.works] + self._shared:
                prompt.release()
            raise

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._opened is not None:
            self._opened.__exit__(kind, error, trace)

    async def next(self) -> dict[int, Delta]:
        """The deltas, by choice, of all outputs that are there; empty after `wake`. See OpenRequest.next."""
        assert self._opened is not None, "start() comes first"
        deltas: dict[int, Delta] = {}
        outputs = await self._opened.next()
        self.stopwatch.saw(outputs)
        for output in outputs:
            choice = self._opened.index_of[output.request_id]
            answer = self.answers[choice]
            if answer.is_finished:
                continue
            answer.add(output, deltas.setdefault(choice, Delta()))
            if answer.is_finished:
                self._num_unfinished -= 1
                self.stopwatch.ended(output)
                self._opened.abort(output.request_id)
        return deltas

    def wake(self) -> None:
        if self._opened is not None:
            self._opened.wake()

    @property
    def is_finished(self) -> bool:
        return not self._num_unfinished

    def prompt_of(self, choice: int) -> Prompt:
        return self.works[choice // len(self.works[0].answers)].prompt

    def usage(self) -> Usage:
        """The counts so far."""
        prompts = [work.prompt for work in self.works]
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        num_completion_tokens = sum(answer.num_tokens for answer in self.answers)
        return Usage(
            num_prompt_tokens,
            num_completion_tokens,
            num_prompt_tokens + num_completion_tokens,
            PromptDetails(
                cached_tokens=sum(work.answers[0].num_cached_tokens for work in self.works),
                image_tokens=sum(prompt.num_image_tokens for prompt in prompts),
                video_tokens=sum(prompt.num_video_tokens for prompt in prompts),
            ),
            CompletionDetails(sum(answer.num_reasoning_tokens for answer in self.answers)),
        )

    def _share(self, prompt: Prompt, request_id: str) -> Prompt:
        """The prompt for one more choice: its media files under second names, not copied."""
        shared = Prompt(prompt.token_ids, [], prompt.media_seconds, prompt.thinking_open, prompt.media_folder)
        self._shared.append(shared)
        for index, item in enumerate(prompt.media):
            assert prompt.media_folder is not None, "a prompt with media knows its folder"
            name = f"{request_id}-{index}"
            os.link(prompt.media_folder / item.file, prompt.media_folder / name)
            shared.media.append(msgspec.structs.replace(item, file=name))
        return shared

    def _requests(self) -> list[AddRequest]:
        """One for each choice, with media files of its own: the engine deletes them by name."""
        requests: list[AddRequest] = []
        scheduling = self._scheduling
        for work in self.works:
            for choice in range(len(work.answers)):
                request_id = f"{self.key}-{len(requests)}"
                prompt = self._share(work.prompt, request_id) if choice else work.prompt
                requests.append(
                    AddRequest(
                        request_id=request_id,
                        prompt_token_ids=prompt.token_ids,
                        sampling=with_seed_of_choice(work.sampling, choice),
                        media=[_salted(item, scheduling.cache_salt) for item in prompt.media],
                        arrival=self._arrival,
                        priority=scheduling.priority,
                        tenant=scheduling.tenant,
                        cache_salt=scheduling.cache_salt,
                        timeout=scheduling.timeout,
                    )
                )
        return requests


def _salted(item: MediaItem, salt: str) -> MediaItem:
    """With a salt its content is another one, so that the ranks' image cache tells nobody who else has it."""
    if not salt:
        return item
    content_hash = hashlib.sha256(f"{item.content_hash} {salt}".encode()).hexdigest()
    return msgspec.structs.replace(item, content_hash=content_hash)
