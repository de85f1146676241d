"""Samples as the model sees them: prompts, labels, positions, token types and patches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from models.demo_training import config
from models.demo_training.collate import MicroBatch, by_length, collate
from models.demo_training.encode import Encoder, positions
from models.demo_training.sample import Clip, Sample, assistant, picture, system, text, user, video
from models.demo_training.skills import SKILLS
from tests.models.builders import draw

MEDIA = config.demo_model().media


@pytest.fixture(scope="module")
def encoder(tokenizer_folder) -> Encoder:
    return Encoder(tokenizer_folder)


def _sample(*messages, answer="Yes.", reasoning=None, tools=(), spelled="") -> Sample:
    return Sample("shapes", list(messages), answer, lambda _: True, reasoning, list(tools), spelled)


def _image(width=56, height=84) -> Image.Image:
    return Image.new("RGB", (width, height), (10, 120, 240))


def _written(encoder: Encoder, token_ids) -> str:
    """All tokens as text, runs of placeholders as one [P]."""
    names = encoder.tokenizer.markers
    text = encoder.tokenizer.decode(list(token_ids), keep=names)
    while "<|IMAGE_PLACEHOLDER|>" * 2 in text:
        text = text.replace("<|IMAGE_PLACEHOLDER|>" * 2, "<|IMAGE_PLACEHOLDER|>")
    return text.replace("<|IMAGE_PLACEHOLDER|>", "[P]")


OFF = "<think>\n\n</think>\n\n"
PROMPTS = {
    "text only": ([user("Hi")], f"<|begin_of_sentence|>User: Hi\nAssistant: {OFF}"),
    "system": ([system("SYS"), user("Hi")], f"<|begin_of_sentence|>SYS\nUser: Hi\nAssistant: {OFF}"),
    "history": (
        [user("A"), assistant("B"), user("C")],
        f"<|begin_of_sentence|>User: A\nAssistant: B<|end_of_sentence|>User: C\nAssistant: {OFF}",
    ),
    "image first": (
        [user(picture(_image()), text("Describe."))],
        f"<|begin_of_sentence|>User: Picture 1:<|IMAGE_START|>[P]<|IMAGE_END|>Describe.\nAssistant: {OFF}",
    ),
    "text first": (
        [user(text("Describe."), picture(_image()))],
        f"<|begin_of_sentence|>User: Describe.Picture 1:<|IMAGE_START|>[P]<|IMAGE_END|>\nAssistant: {OFF}",
    ),
    "image and video": (
        [user(picture(_image()), video(Clip((_image(),) * 4, 2.0)), text("Compare."))],
        "<|begin_of_sentence|>User: Picture 1:<|IMAGE_START|>[P]<|IMAGE_END|>"
        f"Video 1:<|VIDEO_START|>[P]<|VIDEO_END|>Compare.\nAssistant: {OFF}",
    ),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_are_the_strings_of_the_specification(encoder, case):
    messages, expected = PROMPTS[case]
    assert _written(encoder, encoder.encode(_sample(*messages), with_target=False).token_ids) == expected


def test_the_loss_is_on_the_answer_and_its_end_only(encoder):
    example = encoder.encode(_sample(user("Hi"), answer="Hello."))
    assert _written(encoder, example.token_ids[example.num_prompt :]) == "Hello.</s>"
    assert _written(encoder, example.token_ids[: example.num_prompt]).endswith("</think>\n\n")


def test_a_thinking_target_closes_its_reasoning(encoder):
    example = encoder.encode(_sample(user("Hi"), answer="Hello.", reasoning="Be kind."))
    assert _written(encoder, example.token_ids[: example.num_prompt]).endswith("\nAssistant: <think>")
    assert _written(encoder, example.token_ids[example.num_prompt :]) == "\nBe kind.\n</think>\nHello.</s>"


def test_reasoning_that_is_given_stands_before_the_answer_and_bears_no_loss(encoder):
    learnt = _sample(user("Hi"), answer="Hello.", reasoning="Be kind.")
    example, given = encoder.encode(learnt), encoder.encode(replace(learnt, is_given=True))
    assert given.token_ids.tolist() == example.token_ids.tolist()
    assert _written(encoder, given.token_ids[given.answers > 0]) == "Hello.</s>"


def test_a_history_with_reasoning_has_the_tokens_that_were_generated(encoder):
    asked = encoder.encode(_sample(user("Hi"), answer="Hello.", reasoning="Be kind."))
    earlier = assistant("Hello.") | {"reasoning_content": "Be kind."}
    later = encoder.encode(_sample(user("Hi"), earlier, user("Bye")))
    assert later.token_ids[: len(asked.token_ids) - 1].tolist() == asked.token_ids[:-1].tolist()


def test_words_read_from_pictures_are_trained_letter_by_letter(encoder):
    whole = encoder.encode(_sample(user("Hi"), answer="The circle."))
    spelled = encoder.encode(_sample(user("Hi"), answer="The circle.", spelled="circle"))
    letters = encoder.tokenizer.encode("c"), encoder.tokenizer.encode("i"), encoder.tokenizer.encode("r")
    assert [i for letter in letters for i in letter] == spelled.token_ids[-8:-5].tolist()
    assert len(spelled.token_ids) >= len(whole.token_ids) + 5
    assert _written(encoder, spelled.token_ids[spelled.num_prompt :]) == "The circle.</s>"


@pytest.mark.parametrize("skill", SKILLS)
def test_every_target_decodes_to_its_answer(encoder, skill):
    for index in range(8):
        sample = draw(skill, index)
        example = encoder.encode(sample)
        written = encoder.decode(example.token_ids[example.num_prompt :].tolist())
        assert written.split("</think>\n")[-1] == sample.answer


@pytest.mark.parametrize("skill", SKILLS)
def test_lengths_of_tokens_positions_types_and_patches_agree(encoder, skill):
    for index in range(6):
        example = encoder.encode(draw(skill, index))
        assert example.positions.shape == (3, len(example.token_ids))
        assert example.token_types.shape == example.token_ids.shape
        assert len(example.patches) == sum(t * h * w for t, h, w in example.grids)
        placeholders = int((example.token_ids == MEDIA.patch).sum())
        assert placeholders == sum(t * h * w // (4 if t == 1 else 8) for t, h, w in example.grids)
        assert all(t == 1 or t % 2 == 0 for t, _, _ in example.grids)
        assert example.token_ids.max() < config.demo_model().vocab_size


def test_positions_follow_the_worked_example_of_the_specification():
    token_ids = np.array([1, 1, 1, MEDIA.image_start, *[MEDIA.patch] * 6, MEDIA.image_end, 1])
    rows = positions(token_ids, [(1, 4, 6)], MEDIA.patch)
    assert rows[0].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 7, 8]
    assert rows[1].tolist() == [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 7, 8]
    assert rows[2].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8]


def test_positions_behind_a_long_clip_count_its_frames():
    token_ids = np.array([1, MEDIA.video_start, *[MEDIA.patch] * 8, MEDIA.video_end])
    assert positions(token_ids, [(16, 2, 2)], MEDIA.patch)[:, -1].tolist() == [10, 10, 10]


def test_markers_and_placeholders_use_vision_experts_and_nothing_else_does(encoder):
    example = encoder.encode(_sample(user(picture(_image()), text("Hi"))))
    vision = {MEDIA.patch, MEDIA.image_start, MEDIA.image_end}
    assert {int(i) for i in example.token_ids[example.token_types == 1]} == vision
    assert vision.isdisjoint(example.token_ids[example.token_types == 0].tolist())


def test_frames_carry_their_time_and_an_odd_clip_repeats_its_last_frame(encoder):
    frames = tuple(Image.new("RGB", (84, 84), (128, 128, 128)) for _ in range(5))
    example = encoder.encode(_sample(user(video(Clip(frames, 2.0)), text("When?"))))
    assert example.grids == [(6, 6, 6)]
    by_frame = example.patches.reshape(6, -1)
    assert (by_frame[5] == by_frame[4]).all()
    assert all((by_frame[i] != by_frame[i - 1]).any() for i in range(1, 5))  # only the stamps differ
    assert all(np.asarray(f).min() == 128 for f in frames)  # the sample's own frames stay clean


def test_micro_batches_keep_every_example_and_their_bounds(encoder):
    examples = [encoder.encode(draw(skill, i)) for skill in SKILLS for i in range(3)]
    groups = by_length(examples, max_tokens=1024, max_patches=2048)
    assert sorted(map(id, examples)) == sorted(id(e) for group in groups for e in group)
    for group in groups:
        longest = max(len(e.token_ids) for e in group)
        assert len(group) == 1 or len(group) * longest <= 1024
        assert len(group) == 1 or sum(len(e.patches) for e in group) <= 2048


def test_a_micro_batch_survives_its_way_through_a_pipe(encoder):
    batch = collate([encoder.encode(draw(skill, 1)) for skill in ("shapes", "chat", "motion")])
    again = MicroBatch.from_bytes(batch.to_bytes())
    for name, value in vars(batch).items():
        assert (getattr(again, name) == value).all() and getattr(again, name).dtype == value.dtype, name


def test_the_model_fits_its_bound():
    assert config.stored_bytes(config.demo_model()) < config.MAX_EXPORT_BYTES - 200_000
