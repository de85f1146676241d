"""Grammars through whole steps of a random model: what it may not say it never says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.grammar import HEADER, Vocabulary, write_vocabulary
from engine.messages import Guide, SamplingParams
from engine.model_config import ModelConfig
from tests.conftest import Rand
from tests.workers.builders import Prompt, make_dense_config, make_prompt, make_raw_weights
from tests.workers.ranks import Driver, Ranks

# Bytes, then markers, then longer pieces and one that stands for nothing.
END, OTHER_END, END_OF_THINKING = 256, 257, 258
PIECES = [bytes([i]) for i in range(256)] + [
    b"</s>", b"<|end|>", b"</think>", b'{"', b'name":', b"\n\n", b"yes", b" no", b"",
]  # fmt: skip
FREE = SamplingParams(max_tokens=1 << 20, temperature=1.5, seed=7, num_logprobs=0)
SHORT_OBJECT = {
    "type": "object",
    "properties": {
        "name": {"enum": ["yes", "no", "none"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}  # fmt: skip


def json_grammar(schema: dict[str, Any]) -> str:
    return f"{HEADER}start: answer\nanswer: %json {json.dumps(schema)}\n"


def guided(grammar: str, after: str = "", **changes: Any) -> SamplingParams:
    return msgspec.structs.replace(FREE, guide=Guide(grammar, after), **changes)


class World:
    def __init__(self, rand: Rand, folder: Path, world: int = 1) -> None:
        self.config: ModelConfig = make_dense_config(num_layers=1, eos_token_ids=(END, OTHER_END))
        assert self.config.vocab_size > len(PIECES)
        self.prompt: Prompt = make_prompt(rand, self.config, folder, [6])
        write_vocabulary(
            folder / "vocabulary", Vocabulary(PIECES, [END, OTHER_END, END_OF_THINKING], [END, OTHER_END])
        )
        ranks = Ranks(
            self.config,
            make_raw_weights(self.config, rand),
            folder,
            world=world,
            vocabulary_file=folder / "vocabulary",
        )
        self.driver = Driver(ranks)

    def add(self, sampling: SamplingParams) -> int:
        return self.driver.add(self.prompt, sampling)

    def until_end(self, seq_id: int, most: int = 400) -> tuple[str, list[int]]:
        """Text and ids before the end token; a sequence that never ends fails."""
        ids = self.driver.tokens(seq_id)
        while not {END, OTHER_END} & set(ids):
            assert len(ids) < most, f"{len(ids)} tokens without an end: {text_of(ids)[:300]!r}"
            self.driver.generate([seq_id], 1)
            ids = self.driver.tokens(seq_id)
        end = next(i for i, token_id in enumerate(ids) if token_id in (END, OTHER_END))
        return text_of(ids[:end]), ids[:end]


def text_of(ids: list[int]) -> str:
    return b"".join(PIECES[i] for i in ids).decode("utf-8", "backslashreplace")


@pytest.fixture
def world(rand: Rand, media_folder: Path) -> World:
    return World(rand, media_folder)


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.0}, {"top_k": 3, "top_p": 0.5}, {"min_tokens": 300}]
)
def test_a_guided_answer_matches_its_schema_and_then_ends(world: World, changes: dict[str, Any]):
    text, _ = world.until_end(world.add(guided(json_grammar(SHORT_OBJECT), **changes)))
    value = json.loads(text)
    assert list(value) == ["name", "count"]
    assert value["name"] in ("yes", "no", "none") and 0 <= value["count"] <= 99, value


def test_a_guide_changes_nothing_for_the_other_rows(world: World):
    alone, beside = world.add(FREE), world.add(FREE)
    world.driver.generate([alone], 12)
    strict = world.add(guided(json_grammar(SHORT_OBJECT)))
    world.driver.generate([strict, beside], 12)
    assert world.driver.bits(beside) == world.driver.bits(alone)


def test_a_preempted_answer_goes_on_where_it_was_in_its_grammar(world: World):
    params = guided(json_grammar(SHORT_OBJECT))
    calm, preempted = world.add(params), world.add(params)
    expected, ids = world.until_end(calm)
    for _ in range(len(ids) // 2):
        world.driver.generate([preempted], 1)
        world.driver.preempt(preempted)
    assert world.until_end(preempted)[0] == expected


def test_ranks_of_a_group_choose_the_same_guided_tokens(rand: Rand, media_folder: Path):
    world = World(rand, media_folder, world=2)
    json.loads(world.until_end(world.add(guided(json_grammar(SHORT_OBJECT))))[0])  # Ranks.run compares


def test_the_grammar_begins_behind_the_reasoning_and_no_end_comes_before(world: World):
    params = guided(json_grammar(SHORT_OBJECT), after="</think>")
    free, strict = world.add(FREE), world.add(params)
    world.driver.generate([free, strict], 30)
    thought = world.driver.tokens(strict)
    assert not {END, OTHER_END} & set(
        thought[: thought.index(END_OF_THINKING)] if END_OF_THINKING in thought else thought
    )
    closed = world.driver.add(world.prompt, params, generated=[*b"hm", END_OF_THINKING])
    text, _ = world.until_end(closed)
    assert set(json.loads(text)) == {"name", "count"}, text
    assert len(text) - len(text.lstrip("\n")) <= 5, text


def test_a_closing_tag_in_pieces_is_found_too(world: World):
    params = guided(f'{HEADER}start: "yes"', after="</think>")
    closed = world.driver.add(world.prompt, params, generated=list(b"x</think>\n"))
    assert world.until_end(closed)[0].lstrip("\n") == "yes"


def test_forced_text_may_be_written_in_any_tokens(world: World):
    greedy = guided(f'{HEADER}start: "yes"', temperature=2.0)
    spellings = {
        tuple(world.until_end(world.add(msgspec.structs.replace(greedy, seed=seed)))[1]) for seed in range(12)
    }
    assert {text_of(list(ids)) for ids in spellings} == {"yes"}
    assert len(spellings) > 1, "the token of the whole word was never chosen, or always"


def test_special_tokens_come_where_a_grammar_names_them(world: World):
    _, ids = world.until_end(world.add(guided(f'{HEADER}start: "a" <[{END_OF_THINKING}]> "b"')))
    assert ids == [ord("a"), END_OF_THINKING, ord("b")]


def test_a_grammar_that_does_not_compile_here_ends_the_answer_and_nothing_else(world: World):
    free, broken = world.add(FREE), world.add(guided("start: nowhere"))
    world.driver.generate([free, broken], 3)
    assert world.driver.tokens(broken)[0] in (END, OTHER_END)
    assert len(world.driver.tokens(free)) == 3


def test_steps_behind_the_end_do_no_harm(world: World):
    strict = world.add(guided(f'{HEADER}start: "a"'))
    world.driver.generate([strict], 4)  # an engine that plans ahead asks for more before it knows
    assert world.driver.tokens(strict)[0] == ord("a")
    assert set(world.driver.tokens(strict)[1:]) <= {END, OTHER_END}
