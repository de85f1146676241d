"""The sizes that the server is made for, through a real model as small as one can be.

131,072 tokens are 8.6 billion pairs for attention, which is where the first test's time goes: about 20 s on
two quiet cores. So its model has one layer with one head, and the prompt is computed whole only once.
"""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from engine.messages import SamplingParams
from tests.conftest import Rand
from tests.e2e.in_process import InProcessEngine
from tests.workers.builders import (
    Prompt,
    make_dense_config,
    make_prompt,
    make_raw_weights,
    make_tiny_config,
)

CONTEXT = 131_072
BLOCK = 64
SAMPLING = SamplingParams(max_tokens=4, temperature=0.0, num_logprobs=2, ignore_eos=True)
CHUNK = 8192


def test_prompt_of_128k_tokens_is_served_cached_evicted_and_brought_back(rand: Rand, tmp_path: Path):
    model = make_dense_config(
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        hidden_size=16,
        intermediate_size=16,
        max_position_embeddings=CONTEXT,
    )
    engine = InProcessEngine(
        model,
        make_raw_weights(model, rand),
        tmp_path,
        num_blocks=CONTEXT // BLOCK + 8,
        num_host_blocks=32,
        overlap=True,
        block_size=BLOCK,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=256,
        target_itl_ms=0.0,
    )
    prompt = make_prompt(rand, model, tmp_path, [CONTEXT - 4])
    first = ask(engine, "first", prompt)
    assert engine.num_steps >= CONTEXT // CHUNK
    assert ask(engine, "cached", prompt) == first
    assert engine.outputs["cached"][0].num_cached_tokens == CONTEXT - BLOCK

    num_evicted = engine.scheduler.kv.cache.num_evictions
    ask(engine, "other", make_prompt(rand, model, tmp_path, [30 * BLOCK]))
    assert engine.scheduler.kv.cache.num_evictions > num_evicted + 20
    assert ask(engine, "brought back", prompt) == first
    assert engine.scheduler.kv.swap.num_returned > 20
    assert engine.outputs["brought back"][0].num_cached_tokens > CONTEXT - 12 * BLOCK


def ask(engine: InProcessEngine, name: str, prompt: Prompt, max_tokens: int = 4) -> list:
    engine.ask(name, prompt, replace(SAMPLING, max_tokens=max_tokens))
    engine.run_until_idle()
    return engine.bits(name)


def test_256_sequences_run_at_once(rand: Rand, tmp_path: Path):
    model = make_tiny_config(num_layers=1, moe_layers=())
    raw, most = make_raw_weights(model, rand), []
    prompts = [make_prompt(rand, model, tmp_path, [5 + i % 7]) for i in range(300)]
    engine = InProcessEngine(
        model, raw, tmp_path, num_blocks=3000, overlap=True, max_num_seqs=256, max_num_batched_tokens=512
    )
    for index, prompt in enumerate(prompts):
        engine.ask(f"request {index}", prompt, replace(SAMPLING, max_tokens=12))
    while engine.step():
        most.append(engine.scheduler.num_running)
    assert max(most) == 256
    alone = InProcessEngine(model, raw, tmp_path)
    for index in (0, 137, 299):
        assert ask(alone, f"request {index}", prompts[index], 12) == engine.bits(f"request {index}"), rand


def test_hundred_images_and_hundred_videos_in_one_prompt(rand: Rand, tmp_path: Path):
    model = make_tiny_config(num_layers=1, moe_layers=())
    raw = make_raw_weights(model, rand)
    album = [part for _ in range(100) for part in ((1, 2, 2), 1, (4, 2, 2), 1)]
    prompt = make_prompt(rand, model, tmp_path, album)
    engine = InProcessEngine(
        model, raw, tmp_path, overlap=True, max_num_batched_tokens=96, max_encoder_tokens_per_step=20
    )
    in_pieces = ask(engine, "album", prompt)
    assert engine.num_encoded_patches == 100 * 4 + 100 * 16
    assert engine.num_steps > len(prompt.token_ids) // 96
    whole = InProcessEngine(
        model, raw, tmp_path, max_num_batched_tokens=2048, max_encoder_tokens_per_step=4096
    )
    assert ask(whole, "album", prompt) == in_pieces, rand
