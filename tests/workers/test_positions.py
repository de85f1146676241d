"""Positions and token types: the specification's examples, and any layout against a plain walk."""

from __future__ import annotations

import numpy as np

from engine.messages import MediaItem
from tests.checks import assert_same_bits, python_lines
from tests.conftest import Rand
from tests.workers.builders import Grid, Prompt
from tests.workers.reference import reference_positions
from workers.positions import Positions, token_types


def make_item(grid: Grid, offset: int) -> MediaItem:
    frames, rows, columns = grid
    num_tokens = max(frames // 2, 1) * rows * columns // 4
    kind = "video" if frames > 1 else "image"
    return MediaItem(kind, "", grid, offset, num_tokens, "")


def make_layout(parts: list[int | Grid]) -> tuple[int, list[MediaItem]]:
    """(number of tokens, media) of text runs and grids one after another, without markers."""
    length, media = 0, []
    for part in parts:
        if isinstance(part, int):
            length += part
        else:
            media.append(make_item(part, length))
            length += media[-1].num_tokens
    return length, media


def positions_of(length: int, media: list[MediaItem], first: int = 0, count: int | None = None) -> np.ndarray:
    out = np.full((3, length - first if count is None else count), -1, np.int32)
    Positions(length, media).slice_into(out, first)
    return out


def test_text_alone_counts_up_on_all_three_axes():
    assert_same_bits(positions_of(5, []), np.tile(np.arange(5, dtype=np.int32), (3, 1)))


def test_image_of_the_worked_example_has_the_published_positions():
    length, media = make_layout([4, (1, 4, 6), 2])
    expected = np.array(
        [
            [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 7, 8],
            [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 7, 8],
            [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8],
        ],
        np.int32,
    )
    assert_same_bits(positions_of(length, media), expected)
    assert Positions(length, media).delta == -3


def test_long_video_advances_the_counter_by_its_frames():
    length, media = make_layout([2, (12, 4, 4), 1])
    assert Positions(length, media).next_position == 2 + 6 + 1
    assert positions_of(length, media)[:, -1].tolist() == [8, 8, 8]


def test_short_video_advances_the_counter_by_its_larger_side():
    length, media = make_layout([2, (4, 4, 10), 1])
    assert positions_of(length, media)[:, -1].tolist() == [7, 7, 7]


def test_single_frame_video_counts_as_one_frame():
    item = MediaItem("video", "", (1, 2, 2), 1, 1, "")
    assert Positions(3, [item]).next_position == 3


def test_generated_tokens_continue_after_the_largest_position():
    length, media = make_layout([4, (1, 4, 6), 2])
    assert positions_of(length, media, first=length, count=3).tolist() == [[9, 10, 11]] * 3


def test_slice_across_the_end_of_the_known_tokens_joins_both_rules():
    length, media = make_layout([1, (1, 8, 8)])
    sliced = positions_of(length, media, first=length - 2, count=4)
    assert sliced[:, :2].tolist() == [[1, 1], [4, 4], [3, 4]]
    assert sliced[:, 2:].tolist() == [[5, 6]] * 3


def test_any_layout_matches_a_walk_token_by_token(rand: Rand):
    for _ in range(200):
        sides = rand.numpy.integers(1, 6, (6, 3)) * 2
        grids = [(1 if i % 2 else int(t), int(h), int(w)) for i, (t, h, w) in enumerate(sides)]
        parts: list[int | Grid] = [*rand.numpy.integers(0, 4, 5).tolist(), *grids]
        rand.python.shuffle(parts)
        length, media = make_layout(parts)
        expected = reference_positions(Prompt(media=media), length).reshape(-1, 3 * length)
        assert_same_bits(
            positions_of(length, media).reshape(1, -1), expected.astype(np.int32), f"{rand} {parts}"
        )


def test_every_slice_equals_the_same_part_of_the_whole(rand: Rand):
    length, media = make_layout([3, (1, 4, 4), (6, 2, 4), 2, (1, 2, 2)])
    whole = positions_of(length, media)
    for first in range(length):
        for count in range(1, length - first + 1):
            assert_same_bits(positions_of(length, media, first, count), whole[:, first : first + count])


def test_large_images_and_long_text_run_no_more_python_than_small_and_short():
    def lines(grid: Grid, num_text: int) -> int:
        layout = make_layout([1, grid] * 100 + [num_text])
        return python_lines(lambda: Positions(*layout))

    assert lines((1, 50, 50), 131072 - 100 * 626) == lines((1, 4, 4), 10)


def test_placeholders_and_markers_use_the_vision_experts():
    ids = np.array([5, 99, 100, 101, 7], np.int32)
    assert token_types(ids, image_patch_id=100, num_pools=2).tolist() == [0, 0, 1, 1, 0]


def test_model_with_one_pool_has_only_text_tokens():
    assert token_types(np.array([5, 200], np.int32), image_patch_id=100, num_pools=1).tolist() == [0, 0]
