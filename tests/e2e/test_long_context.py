"""131,072 tokens through a real model, as small as one can be: in chunks, cached, evicted, brought back.

Attention over so many tokens is 8.6 billion pairs, which is where this test's time goes: about 20 s on two
quiet cores. So the model has one layer with one head, and the prompt is computed whole only once.
"""

from __future__ import annotations

from pathlib import Path

from engine.messages import SamplingParams
from tests.conftest import Rand
from tests.e2e.in_process import InProcessEngine
from tests.workers.builders import Prompt, make_dense_config, make_prompt, make_raw_weights

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


def ask(engine: InProcessEngine, name: str, prompt: Prompt) -> list:
    engine.ask(name, prompt, SAMPLING)
    engine.run_until_idle()
    return engine.bits(name)
