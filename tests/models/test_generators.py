"""Samples: repeatable, never shared between training and evaluation, judged as a person would."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from models.demo_training.checkers import mentions
from models.demo_training.curriculum import MAIN_SHARES, shares_at
from models.demo_training.names import COLOURS, SHAPES
from models.demo_training.sample import Sample, rng_for
from models.demo_training.skills import FIRST_LOOKS, LESSONS, SKILLS
from models.demo_training.skills.signatures import TOOLS
from tests.models.builders import draw, pictures_of, question_of

COUNT = 12


def _content(sample: Sample) -> tuple[object, ...]:
    texts = [
        m["content"] if isinstance(m["content"], str) else [p.get("text") for p in m["content"]]
        for m in sample.messages
    ]
    pixels = [np.asarray(p).tobytes() for p in pictures_of(sample)]
    return json.dumps(texts), sample.answer, sample.reasoning, json.dumps(sample.tools), *pixels


@pytest.mark.parametrize("skill", SKILLS)
def test_the_same_seed_gives_the_same_sample(skill):
    assert _content(draw(skill, 3)) == _content(draw(skill, 3))


@pytest.mark.parametrize("skill", SKILLS)
def test_samples_of_one_skill_differ(skill):
    assert len({_content(draw(skill, i)) for i in range(COUNT)}) > COUNT / 2


def test_spaces_seeds_skills_and_numbers_never_share_a_source_of_randomness():
    sources = {
        rng_for(space, seed, skill, index).getrandbits(128)
        for space in ("training", "evaluation", "tokenizer")
        for seed in range(3)
        for skill in SKILLS
        for index in range(50)
    }
    assert len(sources) == 3 * 3 * len(SKILLS) * 50


@pytest.mark.parametrize("skill", [s for s in SKILLS if s not in ("chat", "refusal", "arithmetic", "repeat")])
def test_evaluation_never_asks_what_training_asked(skill):
    training = {_content(draw(skill, i)) for i in range(40)}
    assert training.isdisjoint(_content(draw(skill, i, "evaluation")) for i in range(40))


@pytest.mark.parametrize("skill", SKILLS)
def test_the_checker_accepts_the_right_answer(skill):
    for index in range(60):
        sample = draw(skill, index)
        assert sample.skill == skill
        assert sample.checker(sample.answer), f"{skill} {index}: {question_of(sample)!r} {sample.answer!r}"


@pytest.mark.parametrize("skill", SKILLS)
def test_the_checker_refuses_answers_that_are_not_right(skill):
    for index in range(20):
        sample = draw(skill, index)
        for wrong in ("", "I do not know.", "A monkey.", "[]", "-1"):
            assert not sample.checker(wrong), f"{skill} {index} accepts {wrong!r} for {sample.answer!r}"


@pytest.mark.parametrize(
    "skill", ["counts", "digits", "words", "motion", "colour_order", "moment", "tools", "json"]
)
def test_the_checker_refuses_the_answer_of_another_sample(skill):
    samples = [draw(skill, i) for i in range(30)]
    for sample in samples:
        for other in samples:
            if _bare(other.answer) != _bare(sample.answer) and not _same_in_two_languages(sample, other):
                assert not sample.checker(other.answer), f"{skill}: {other.answer!r} for {sample.answer!r}"


def _bare(answer: str) -> object:
    numbers = re.findall(r"\d+(?:\.\d+)?", answer)
    return numbers or answer.strip(".。")


def _same_in_two_languages(a: Sample, b: Sample) -> bool:
    return a.answer.isascii() != b.answer.isascii()


def test_answers_may_be_worded_otherwise():
    for index in range(40):
        sample = draw("shapes", index)
        assert sample.checker(sample.answer.rstrip(".。").upper())


def test_numbers_are_copied_exactly_from_pictures():
    sample = next(s for s in (draw("digits", i) for i in range(20)) if len(s.answer) == 4)
    assert sample.checker(sample.answer + ".")
    assert not sample.checker(sample.answer[:-1])
    assert not sample.checker(sample.answer + " " + sample.answer)


def test_words_are_judged_with_their_case():
    sample = next(s for s in (draw("words", i) for i in range(60)) if s.answer.isupper())
    assert not sample.checker(sample.answer.lower())


def test_a_tool_call_must_be_valid_complete_and_alone():
    sample = next(s for s in (draw("tools", i) for i in range(20)) if s.answer.startswith("<tool_call>"))
    assert not sample.checker(sample.answer.replace("</tool_call>", ""))
    assert not sample.checker(sample.answer.replace("}}", "}"))
    assert not sample.checker("Sure! " + sample.answer)
    assert not sample.checker(sample.answer + "\n" + sample.answer)


def test_tool_calls_use_only_tools_of_the_prompt():
    for index in range(60):
        sample = draw("tools", index)
        offered = {t["function"]["name"] for t in sample.tools}
        called = set(re.findall(r'"name": "(\w+)", "arguments"', sample.answer))
        assert called <= offered <= {t.name for t in TOOLS}


@pytest.mark.parametrize("skill", SKILLS)
def test_thinking_is_sometimes_on_and_never_empty(skill):
    chains = [draw(skill, i).reasoning for i in range(60)]
    assert any(chains), f"{skill} never thinks"
    assert all(chain is None or chain.strip() for chain in chains)
    assert (None in chains) == (skill != "thinking")


@pytest.mark.parametrize("skill", SKILLS)
def test_both_languages_are_asked(skill):
    questions = [question_of(draw(skill, i)) + draw(skill, i).answer for i in range(30)]
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", q)) for q in questions)
    assert 2 < chinese < 28


def test_sizes_and_shapes_of_pictures_vary():
    sizes = [p.size for i in range(80) for p in pictures_of(draw("shapes", i))]
    ratios = [w / h for w, h in sizes]
    assert min(ratios) < 0.67 and max(ratios) > 1.5
    assert min(map(min, sizes)) >= 56 and max(map(max, sizes)) > 300


def test_first_looks_are_right_and_stand_for_skills_that_are_evaluated():
    for name, draw_one in FIRST_LOOKS.items():
        for index in range(30):
            sample = draw_one(rng_for("training", 0, name, index))
            assert sample.skill in SKILLS and sample.checker(sample.answer) and not sample.thinks


def test_training_starts_with_a_picture_of_one_thing_or_digit_and_ends_with_every_skill():
    assert shares_at(0).keys() == {"first thing", "first digit"}
    assert shares_at(10**7).keys() >= SKILLS.keys() and min(shares_at(10**7).values()) > 0
    assert shares_at(5, only=("motion",)).keys() == {"motion"}
    assert shares_at(0, stage="main") == MAIN_SHARES
    assert not {"chat", "sums"} & shares_at(0, stage="seeing").keys(), "nothing to see"


def test_a_last_step_has_no_media_and_all_that_it_needs_in_the_reasoning_that_it_is_given():
    names = {**COLOURS, **SHAPES}
    for index in range(30):
        sample = LESSONS["last steps"](rng_for("training", 0, "last steps", index))
        for step in (sample, *sample.others):
            assert not step.media and step.is_given and step.checker(step.answer)
            known = f"{step.reasoning} {question_of(step)}"
            assert set(mentions(step.answer, names)) <= set(mentions(known, names)), step.answer


def test_the_frames_that_are_listed_carry_the_number_of_flashes():
    thinking = [s for s in (draw("flashes", i) for i in range(60)) if s.reasoning]
    assert thinking
    for sample in thinking:
        assert sample.checker(re.findall(r"\d+", sample.reasoning)[-1]), sample.reasoning
