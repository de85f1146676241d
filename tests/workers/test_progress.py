"""How long a rank says it may be silent: long enough for honest work, no longer."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Rand
from tests.workers.builders import make_prompt, make_raw_weights, make_tiny_config
from tests.workers.ranks import Driver, Ranks


def test_rank_beats_once_per_layer_and_block(rand: Rand, media_folder: Path):
    config = make_tiny_config()
    beats: list[float] = []
    ranks = Ranks(config, make_raw_weights(config, rand), media_folder, on_progress=beats.append)
    driver = Driver(ranks)
    text = driver.add(make_prompt(rand, config, media_folder, [5]))
    driver.generate([text], 1)
    assert len(beats) == config.num_layers + 1, "the layers and the logits"
    beats.clear()
    image = driver.add(make_prompt(rand, config, media_folder, [1, (1, 4, 4)]))
    driver.generate([image], 1)
    assert config.vision is not None
    assert len(beats) == config.num_layers + 1 + config.vision.depth + 1, "and the blocks and the resampler"


def test_allowance_grows_with_tokens_and_context(rand: Rand, media_folder: Path):
    config = make_tiny_config()
    beats: list[float] = []
    raw = make_raw_weights(config, rand)
    driver = Driver(Ranks(config, raw, media_folder, num_blocks=600, on_progress=beats.append))
    seq_id = driver.add(make_prompt(rand, config, media_folder, [2001]))
    allowed = []
    for count in (1, 1000, 1000):
        beats.clear()
        driver.step({seq_id: count})
        allowed.append(max(beats))
    assert allowed[0] < 0.001 < allowed[1] < allowed[2], allowed
