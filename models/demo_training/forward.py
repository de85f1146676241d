"""From a micro-batch to logits and loss, through transformers' modules.

Its top-level forward is left out: it separates pictures from videos and would recompute positions by
another rule (specification 3.4 and 4.6). Here features of all media go in prompt order to the placeholders,
and positions and token types are the encoder's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from models.demo_training.collate import MicroBatch
from models.demo_training.config import preprocessor_config
from models.demo_training.fast_vision import patch_coordinates
from models.demo_training.model import Model

_PER_CHANNEL = 14 * 14


class Normaliser:
    """uint8 patches to the floats that the tower was specified for: (u8 / 255 - mean) / std per channel."""

    def __init__(self, device: torch.device) -> None:
        settings = preprocessor_config()
        mean, std = (
            torch.tensor(settings[key], device=device).repeat_interleave(_PER_CHANNEL)
            for key in ("image_mean", "image_std")
        )
        self._scale, self._shift = 1 / (255 * std), mean / std

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        return patches.float() * self._scale - self._shift


@dataclass
class DeviceBatch:
    """A micro-batch on the device; grids stay on the CPU, where their loops run."""

    token_ids: torch.Tensor  # [B, L] int64
    positions: torch.Tensor  # [3, B, L]
    token_types: torch.Tensor  # [B, L]
    patches: torch.Tensor  # [P, 588] uint8
    coordinates: torch.Tensor | None  # [P, 2]
    grids: torch.Tensor  # [N, 3], CPU
    is_target: torch.Tensor  # [B, L] bool: this token bears loss
    is_known: torch.Tensor  # [B, L] bool: no padding
    num_targets: torch.Tensor  # [B]


def to_device(batch: MicroBatch, device: torch.device) -> DeviceBatch:
    def move(array: object) -> torch.Tensor:
        tensor = torch.as_tensor(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    index = torch.arange(batch.token_ids.shape[1])
    lengths, num_prompt = torch.as_tensor(batch.lengths)[:, None], torch.as_tensor(batch.num_prompt)[:, None]
    grids = torch.as_tensor(batch.grids).long()
    return DeviceBatch(
        move(batch.token_ids).long(),
        move(batch.positions).long(),
        move(batch.token_types).int(),
        move(batch.patches),
        move(patch_coordinates(grids.tolist())) if len(grids) else None,
        grids,
        move((index >= num_prompt) & (index < lengths)),
        move(index < lengths),
        move(batch.num_targets),
    )


def embed(model: Model, normalise: Normaliser, batch: DeviceBatch) -> torch.Tensor:
    """[B, L, H] word embeddings with the features of all media in their places."""
    embeddings = model.model.language_model.embed_tokens(batch.token_ids)
    if not len(batch.grids):
        return embeddings
    features = media_features(model, normalise(batch.patches), batch)
    places = batch.token_ids == model.config.image_token_id
    return embeddings.masked_scatter(places.unsqueeze(-1), features.to(embeddings.dtype))


def media_features(model: Model, pixels: torch.Tensor, batch: DeviceBatch) -> torch.Tensor:
    """[tokens, H] of all media in order."""
    tower, resampler = model.model.vision_tower, model.model.resampler_model
    seen = tower(pixels, batch.grids, position_ids=batch.coordinates).last_hidden_state
    return resampler(seen, batch.grids)


def hidden_states(model: Model, normalise: Normaliser, batch: DeviceBatch) -> torch.Tensor:
    """[B, L, H] after the last norm. No attention mask: padding is at the right of causal attention."""
    return model.model.language_model(
        inputs_embeds=embed(model, normalise, batch),
        position_ids=batch.positions,
        moe_mm_token_type_ids=batch.token_types,
        use_cache=False,
    ).last_hidden_state


def sample_losses(
    model: Model, normalise: Normaliser, batch: DeviceBatch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per sample [B]: sum of its targets' losses, their number, whether each is the likeliest token."""
    states = hidden_states(model, normalise, batch)
    before_target = batch.is_target.roll(
        -1, dims=1
    )  # the first token is never a target, so nothing wraps round
    logits = model.lm_head(states[before_target]).float()
    labels = batch.token_ids[batch.is_target]
    losses = cross_entropy(logits, labels, reduction="none")
    owner = torch.arange(len(batch.num_targets), device=labels.device).repeat_interleave(batch.num_targets)
    wrong = (logits.argmax(-1) != labels).float()
    sums = torch.zeros(len(batch.num_targets), device=labels.device).index_add(0, owner, losses)
    mistakes = torch.zeros_like(sums).index_add(0, owner, wrong)
    return sums, batch.num_targets, mistakes == 0
