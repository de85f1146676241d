"""How much of images and videos one step encodes: a chunk ends before what is too much; one item may be."""

from __future__ import annotations

from engine.messages import MediaItem
from tests.engine.builders import make_scheduler


def image(offset: int, num_tokens: int = 6) -> MediaItem:
    return MediaItem("image", f"picture {offset}", (1, 4, num_tokens), offset, num_tokens, "file")


def steps(media: list[MediaItem], prompt_len: int = 24, **config) -> list[int]:
    world = make_scheduler(max_num_batched_tokens=64, **config)
    request = world.add(prompt_len=prompt_len, max_tokens=1, media=media)
    sizes = []
    while planned := world.step():
        sizes.append(planned[request])
    assert len(world.tokens(request)) == 1
    return sizes


def test_chunk_ends_before_the_image_that_is_too_much():
    assert steps([image(2), image(10)], max_encoder_tokens_per_step=8) == [10, 14]
    assert steps([image(2), image(10)], max_encoder_tokens_per_step=12) == [24]


def test_one_image_may_be_larger_than_the_budget():
    assert steps([image(2), image(10)], max_encoder_tokens_per_step=1) == [10, 14]


def test_image_that_was_encoded_in_an_earlier_step_costs_nothing_more():
    assert steps([image(2, 18), image(22, 2)], max_num_seqs=1, max_encoder_tokens_per_step=18) == [22, 2]


def test_video_is_cut_where_the_budget_ends():
    video = MediaItem("video", "clip", (4, 4, 8), 4, 16, "file")
    assert steps([video], max_encoder_tokens_per_step=6) == [10, 6, 8]


def test_a_second_request_waits_for_the_encoder_while_text_goes_on():
    world = make_scheduler(max_num_batched_tokens=64, max_encoder_tokens_per_step=6)
    first = world.add(prompt_len=10, max_tokens=1, media=[image(0)])
    second = world.add(prompt=list(range(30, 40)), max_tokens=1, media=[image(0)])
    text = world.add(prompt=list(range(50, 60)), max_tokens=1)
    assert world.step() == {first: 10, text: 10}
    assert world.step() == {second: 10}


def test_image_out_of_the_prefix_cache_needs_no_encoder():
    world = make_scheduler(max_num_batched_tokens=64, max_encoder_tokens_per_step=6)
    prompt = list(range(30, 54))
    world.add(prompt=prompt, max_tokens=1, media=[image(2), image(10)])
    world.run_until_idle()
    again = world.add(prompt=[*prompt[:20], 7, 7, 7, 7], max_tokens=1, media=[image(2), image(10)])
    assert world.step() == {again: 4}
