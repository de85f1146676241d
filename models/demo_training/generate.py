"""Greedy answers for many prompts at once, with a KV cache: what training evaluates with.

Prompts of a batch are padded at the left, so that all of them continue at the same column; positions are
given for every token, so padding changes none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from models.demo_training.collate import MicroBatch, collate
from models.demo_training.encode import Example
from models.demo_training.forward import Normaliser, padded_embeddings, to_device
from models.demo_training.model import Model


@torch.no_grad()
def greedy(
    model: Model, normalise: Normaliser, prompts: list[Example], max_tokens: int, end_ids: tuple[int, ...]
) -> list[list[int]]:
    """New token ids per prompt, without the end token. Prompts are examples without target."""
    device = next(model.parameters()).device
    batch = to_device(_left_padded(collate(prompts)), device)
    lengths = [len(p.token_ids) for p in prompts]
    mask = torch.as_tensor(_is_real(lengths)).to(device)
    next_positions = torch.tensor([p.next_position for p in prompts], device=device)
    text_config: Any = model.config.text_config
    forbidden = torch.arange(model.config.image_token_id, text_config.vocab_size, device=device)
    cache = DynamicCache(config=text_config)
    states = _run(
        model, padded_embeddings(model, normalise, batch), batch.positions, batch.token_types, mask, cache
    )
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for _ in range(max_tokens):
        logits = model.lm_head(states[:, -1]).float().index_fill(1, forbidden, -torch.inf)
        chosen = logits.argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            if token in end_ids:
                open_rows.discard(row)
            elif row in open_rows:
                answers[row].append(token)
        if not open_rows:
            break
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        embeddings = model.model.language_model.embed_tokens(chosen[:, None])
        states = _run(model, embeddings, next_positions.expand(3, -1)[..., None], None, mask, cache)
        next_positions = next_positions + 1
    return answers


def _run(
    model: Model,
    embeddings: torch.Tensor,
    positions: torch.Tensor,
    token_types: torch.Tensor | None,
    mask: torch.Tensor,
    cache: DynamicCache,
) -> torch.Tensor:
    return model.model.language_model(
        inputs_embeds=embeddings,
        position_ids=positions,
        moe_mm_token_type_ids=token_types,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


def _is_real(lengths: list[int]) -> np.ndarray:
    columns = np.arange(max(lengths))
    return (columns >= max(lengths) - np.array(lengths)[:, None]).astype(np.int64)


def _left_padded(batch: MicroBatch) -> MicroBatch:
    """Rotate every row so that its padding comes first."""
    width = batch.token_ids.shape[1]
    source = (np.arange(width) - (width - batch.lengths[:, None])) % width
    take = np.take_along_axis
    return MicroBatch(
        take(batch.token_ids, source, 1),
        batch.lengths,
        batch.answers,
        batch.branches,
        batch.sought,
        take(batch.positions, np.broadcast_to(source, batch.positions.shape), 2),
        take(batch.token_types, source, 1),
        batch.patches,
        batch.patch_labels,
        batch.grids,
        batch.skills,
    )
