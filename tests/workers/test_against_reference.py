"""The model on the ops against the model in plain NumPy, fp32 within 1e-4 of log-probabilities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.messages import SamplingParams
from engine.model_config import ModelConfig
from tests.checks import assert_close
from tests.conftest import Rand
from tests.workers.builders import (
    Grid,
    make_dense_config,
    make_prompt,
    make_raw_weights,
    make_text_config,
    make_tiny_config,
)
from tests.workers.ranks import Driver, Ranks
from tests.workers.reference import reference_logits

NUM_TOP = 200  # log-probabilities compared per token
TOLERANCE = 1e-4
SAMPLING = SamplingParams(max_tokens=100, temperature=0.0, num_logprobs=NUM_TOP)

MODELS = {
    "vision-language": make_tiny_config(),
    "shared experts, tied head": make_tiny_config(num_shared_experts=2, tie_word_embeddings=True),
    "grouped kv heads": make_tiny_config(num_kv_heads=2),
    "text with experts": make_text_config(num_shared_experts=1),
    "text without experts": make_dense_config(num_kv_heads=4),
}
PROMPTS: dict[str, list[int | Grid]] = {
    "text": [9],
    "one image": [4, (1, 4, 6), 3],
    "two images of different size": [2, (1, 4, 4), (1, 2, 8), 3],
    "short video": [2, (4, 6, 4), 3],
    "long video": [1, (10, 2, 4), 2],
    "image and video": [3, (1, 4, 6), 2, (4, 4, 4), 2],
}


@pytest.mark.parametrize("parts", PROMPTS.values(), ids=PROMPTS.keys())
def test_vision_language_model_matches_the_reference(rand: Rand, media_folder: Path, parts: list[int | Grid]):
    check_against_reference(rand, media_folder, MODELS["vision-language"], parts)


@pytest.mark.parametrize("model", ["shared experts, tied head", "grouped kv heads"])
def test_variants_of_the_architecture_match_the_reference(rand: Rand, media_folder: Path, model: str):
    check_against_reference(rand, media_folder, MODELS[model], PROMPTS["image and video"])


@pytest.mark.parametrize("model", ["text with experts", "text without experts"])
def test_text_models_run_through_the_same_code(rand: Rand, media_folder: Path, model: str):
    check_against_reference(rand, media_folder, MODELS[model], [11])


def test_bfloat16_stays_close_to_the_reference(rand: Rand, media_folder: Path):
    """Every token takes all experts, so that a rounding moves a weight but never switches an expert."""
    config = make_tiny_config(dtype="bfloat16", moe_top_k=4)
    assert config.moe_top_k == config.num_experts
    check_against_reference(rand, media_folder, config, PROMPTS["image and video"], tolerance=0.15)


def check_against_reference(
    rand: Rand, folder: Path, config: ModelConfig, parts: list[int | Grid], tolerance: float = TOLERANCE
) -> None:
    """Prefill and three decode steps; every step is compared with a full recomputation."""
    raw = make_raw_weights(config, rand)
    prompt = make_prompt(rand, config, folder, parts)
    driver = Driver(Ranks(config, raw, folder))
    seq_id = driver.add(prompt, SAMPLING)
    driver.generate([seq_id], 4)
    logits = reference_logits(raw, config, prompt, driver.tokens(seq_id)[:-1])
    expected = allowed_logprobs(config, logits[len(prompt.token_ids) - 1 :])
    for index, token in enumerate(driver.outputs[seq_id]):
        assert token.logprobs is not None
        top = token.logprobs.top_ids
        where = f"{rand} token {index}"
        assert_close(np.array(token.logprobs.top_logprobs), expected[index, top], tolerance, where)
        assert len(set(top)) == NUM_TOP and token.token_id == top[0]


def allowed_logprobs(config: ModelConfig, logits: np.ndarray) -> np.ndarray:
    """Log-softmax over the ids that may be generated."""
    logits = logits.copy()
    if config.vision is not None:
        logits[:, config.image_patch_id : config.video_end_id + 1] = -np.inf
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
