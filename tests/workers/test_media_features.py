"""Media cut into units, shared over ranks, encoded once, and forgotten when they are computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import workers.media_features
from engine.errors import EngineError
from engine.messages import Chunk, MediaItem, NewSequence, StepPlan
from engine.model_config import ModelConfig
from tests.checks import assert_close, assert_same_bits
from tests.conftest import Rand
from tests.workers.builders import (
    Prompt,
    RawWeights,
    make_prompt,
    make_raw_weights,
    make_text_config,
    make_tiny_config,
    place_weights,
)
from tests.workers.ranks import GREEDY, Driver, Ranks, RankThreads
from tests.workers.reference import reference_features
from workers.device.paddle import PaddleCpu
from workers.media_features import MediaFeatures, assign_ranks, cut_into_units, packs
from workers.model.encoder import Encoder
from workers.model.ernie_vl import ErnieVl
from workers.sequences import Sequences


def make_item(grid: tuple[int, int, int], offset: int = 0) -> MediaItem:
    num_tokens = max(grid[0] // 2, 1) * grid[1] * grid[2] // 4
    return MediaItem("video" if grid[0] > 1 else "image", "", grid, offset, num_tokens, "")


def make_world(rand: Rand, folder: Path) -> tuple[ModelConfig, RawWeights, Prompt]:
    config = make_tiny_config()
    prompt = make_prompt(rand, config, folder, [1, (1, 4, 6), (1, 2, 2), (6, 4, 4), (1, 8, 2), 1])
    return config, make_raw_weights(config, rand), prompt


def encode_whole_prompt(
    config: ModelConfig, raw: RawWeights, folder: Path, prompt: Prompt, world: int
) -> list[list[np.ndarray]]:
    """Per rank, the features of each unit of the prompt."""

    def on_rank(device: PaddleCpu) -> list[np.ndarray]:
        runnable = ErnieVl(config, place_weights(raw, config, device), device, "float32")
        media = MediaFeatures(device, config, runnable, "float32", folder)
        sequences = Sequences()
        new = NewSequence(0, prompt.token_ids, len(prompt.token_ids), GREEDY, prompt.media)
        plan = StepPlan(0, [Chunk(0, len(prompt.token_ids), [0], True)], [new])
        sequences.apply(plan)
        rows, _ = media.rows_for(plan.chunks, sequences)
        return [device.download(part.features) for part in rows]

    return RankThreads(world).run(on_rank)


def test_features_match_the_reference(rand: Rand, media_folder: Path):
    config, raw, prompt = make_world(rand, media_folder)
    (features,) = encode_whole_prompt(config, raw, media_folder, prompt, world=1)
    for item, patches, actual in zip(prompt.media, prompt.patches, features, strict=True):
        expected = reference_features(raw, config, patches, item.grid)
        assert_close(actual, expected, 1e-4, f"{rand} {item.kind} {item.grid}")


@pytest.mark.parametrize(("patches_per_unit", "patches_per_call"), [(1, 1), (32, 64), (4096, 8192)])
def test_features_are_the_same_bits_however_the_work_is_split(
    rand: Rand,
    media_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    patches_per_unit: int,
    patches_per_call: int,
):
    config, raw, prompt = make_world(rand, media_folder)
    (expected,) = encode_whole_prompt(config, raw, media_folder, prompt, world=1)
    monkeypatch.setattr(workers.media_features, "PATCHES_PER_UNIT", patches_per_unit)
    monkeypatch.setattr(workers.media_features, "PATCHES_PER_CALL", patches_per_call)
    for rank, features in enumerate(encode_whole_prompt(config, raw, media_folder, prompt, world=4)):
        assert_same_bits(np.concatenate(features), np.concatenate(expected), f"{rand} rank {rank}")


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("smallest", [1, 24, 96])
def test_features_are_the_same_bits_when_all_ranks_share_an_item(
    rand: Rand, media_folder: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int, smallest: int
):
    """Items of 24, 4, 96 and 16 patches; four ranks cannot share two of the tower's heads."""
    config, raw, prompt = make_world(rand, media_folder)
    (expected,) = encode_whole_prompt(config, raw, media_folder, prompt, world=1)
    monkeypatch.setattr(workers.media_features, "PATCHES_TOGETHER", smallest)
    for rank, features in enumerate(encode_whole_prompt(config, raw, media_folder, prompt, num_ranks)):
        assert_same_bits(np.concatenate(features), np.concatenate(expected), f"{rand} rank {rank}")


def test_ranks_share_rows_and_heads_of_a_large_item(
    rand: Rand, media_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each rank multiplies half of the rows in every feed-forward layer."""
    config, raw, _ = make_world(rand, media_folder)
    prompt = make_prompt(rand, config, media_folder, [(1, 6, 10)])
    rows: list[int] = []
    feed_forward = Encoder._feed_forward
    monkeypatch.setattr(
        Encoder,
        "_feed_forward",
        lambda self, block, normed, x: (rows.append(x.shape[0]), feed_forward(self, block, normed, x))[1],
    )
    monkeypatch.setattr(workers.media_features, "PATCHES_TOGETHER", 60)
    encode_whole_prompt(config, raw, media_folder, prompt, world=2)
    assert rows == [30] * (2 * config.vision.depth)  # type: ignore[union-attr]


def test_item_is_encoded_once_however_many_chunks_touch_it(rand: Rand, media_folder: Path):
    config, raw, prompt = make_world(rand, media_folder)
    driver = Driver(Ranks(config, raw, media_folder))
    seq_id = driver.add(prompt)
    encoded = []
    while driver.num_uncomputed(seq_id) > 1:
        encoded.append(driver.step({seq_id: 2}).num_encoded_patches)
    assert sum(encoded) == sum(len(patches) for patches in prompt.patches)
    assert encoded[0] == 0, "the first chunk has only text and a marker"
    assert encoded[1] == 24, "the second chunk touches the first image alone"


def test_cached_items_are_not_encoded(rand: Rand, media_folder: Path):
    config, raw, prompt = make_world(rand, media_folder)
    driver = Driver(Ranks(config, raw, media_folder))
    first = driver.add(prompt)
    driver.generate([first], 1)
    second = driver.add_with_cached_blocks(prompt, source=first, num_blocks=3)  # 12 tokens: both images
    assert driver.step({second: 4}).num_encoded_patches == 96


def test_long_video_is_cut_into_runs_of_frame_pairs():
    units = cut_into_units(make_item((180, 52, 92), offset=7))
    assert sum(unit.num_frames for unit in units) == 180
    assert all(unit.num_frames == 2 for unit in units), "4784 patches per frame: one pair at a time"
    assert [unit.start for unit in units[:3]] == [7, 7 + 1196, 7 + 2 * 1196]
    assert units[-1].end == 7 + 90 * 1196


def test_small_frames_share_a_unit():
    units = cut_into_units(make_item((180, 16, 16)))
    assert [unit.num_frames for unit in units] == [16] * 11 + [4]
    assert [unit.num_patches for unit in units[:1]] == [4096]


def test_image_is_one_unit_whatever_its_size():
    (unit,) = cut_into_units(make_item((1, 136, 180)))
    assert (unit.num_patches, unit.num_tokens) == (24480, 6120)


def test_work_is_spread_by_patches():
    units = [*cut_into_units(make_item((1, 100, 100))), *cut_into_units(make_item((20, 40, 40)))]
    owners = assign_ranks(units, world=4)
    assert owners[0] == 0
    assert owners[1:] == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]


def test_small_units_are_packed_into_one_call():
    units = [unit for _ in range(100) for unit in cut_into_units(make_item((1, 34, 46)))]
    sizes = [sum(unit.num_patches for unit in pack) for pack in packs(units)]
    assert len(sizes) == 20 and max(sizes) <= workers.media_features.PATCHES_PER_CALL
    assert sum(sizes) == 100 * 34 * 46


def test_missing_file_is_named(rand: Rand, media_folder: Path):
    config, raw, prompt = make_world(rand, media_folder)
    (media_folder / prompt.media[0].file).unlink()
    driver = Driver(Ranks(config, raw, media_folder))
    with pytest.raises(EngineError, match=f"image at .*{prompt.media[0].file}"):
        driver.step({driver.add(prompt): 4})


def test_media_for_a_text_model_are_refused(rand: Rand, media_folder: Path):
    prompt = make_prompt(rand, make_tiny_config(), media_folder, [1, (1, 2, 2)])
    config = make_text_config()
    driver = Driver(Ranks(config, make_raw_weights(config, rand), media_folder))
    with pytest.raises(EngineError, match="media reached a text model"):
        driver.step({driver.add(prompt): 4})
