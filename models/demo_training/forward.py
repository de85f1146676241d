"""From a micro-batch to logits and loss, through transformers' modules.

Its top-level forward is left out: it separates pictures from videos and would recompute positions by
another rule (specification 3.4 and 4.6). Here features of all media go in prompt order to the placeholders,
and positions and token types are the encoder's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from models.demo_training.collate import MicroBatch
from models.demo_training.config import preprocessor_config
from models.demo_training.fast_vision import plan_vision
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
class DeviceMedia:
    """Pictures and clips on the device, patches sorted for the tower; what loops need is on the CPU."""

    patches: torch.Tensor  # [P, 588] uint8
    coordinates: torch.Tensor  # [P, 2]
    back: torch.Tensor  # [P] to prompt order
    bounds: torch.Tensor  # [segments + 1] int32, CPU
    grids: torch.Tensor  # [N, 3], CPU


@dataclass
class DeviceBatch:
    """A micro-batch on the device."""

    token_ids: torch.Tensor  # [B, L] int64
    positions: torch.Tensor  # [3, B, L]
    token_types: torch.Tensor  # [B, L]
    media: DeviceMedia | None  # None without any
    is_target: torch.Tensor  # [B, L] bool: this token bears loss
    is_known: torch.Tensor  # [B, L] bool: no padding
    num_targets: torch.Tensor  # [B]


def to_device(batch: MicroBatch, device: torch.device) -> DeviceBatch:
    index = torch.arange(batch.token_ids.shape[1])
    lengths, num_prompt = torch.as_tensor(batch.lengths)[:, None], torch.as_tensor(batch.num_prompt)[:, None]
    return DeviceBatch(
        _move(batch.token_ids, device).long(),
        _move(batch.positions, device).long(),
        _move(batch.token_types, device).int(),
        _media_to_device(batch, device) if len(batch.grids) else None,
        _move((index >= num_prompt) & (index < lengths), device),
        _move(index < lengths, device),
        _move(batch.num_targets, device),
    )


def _media_to_device(batch: MicroBatch, device: torch.device) -> DeviceMedia:
    plan = plan_vision([tuple(grid) for grid in batch.grids.tolist()])
    return DeviceMedia(
        _move(batch.patches[plan.order], device),
        _move(plan.coordinates, device),
        _move(plan.back, device),
        torch.from_numpy(plan.bounds),
        torch.as_tensor(batch.grids).long(),
    )


def _move(array: object, device: torch.device) -> torch.Tensor:
    tensor = torch.as_tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def embed(model: Model, normalise: Normaliser, batch: DeviceBatch) -> torch.Tensor:
    """[B, L, H] word embeddings with the features of all media in their places."""
    embeddings = model.model.language_model.embed_tokens(batch.token_ids)
    if batch.media is None:
        return embeddings
    features = media_features(model, normalise, batch.media)
    places = batch.token_ids == model.config.image_token_id
    return embeddings.masked_scatter(places.unsqueeze(-1), features.to(embeddings.dtype))


def media_features(model: Model, normalise: Normaliser, media: DeviceMedia) -> torch.Tensor:
    """[tokens, H] of all media in prompt order."""
    tower: Any = model.model.vision_tower
    seen = tower(
        normalise(media.patches), media.grids, position_ids=media.coordinates, cu_seqlens=media.bounds
    ).last_hidden_state
    features: torch.Tensor = model.model.resampler_model(seen[media.back], media.grids)
    return features


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
