"""From a micro-batch to logits and loss, through transformers' modules.

Its top-level forward is left out: it separates pictures from videos and would recompute positions by
another rule (specification 3.4 and 4.6). Here features of all media go in prompt order to the placeholders,
and positions and token types are the encoder's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from models.demo_training.collate import MicroBatch
from models.demo_training.config import demo_model
from models.demo_training.fast_decoder import Packing, Watcher, decode, pack
from models.demo_training.fast_vision import plan_vision, see
from models.demo_training.model import Model
from models.demo_training.pixels import Normaliser


@dataclass
class DeviceMedia:
    """Pictures and clips on the device, patches sorted for the tower; what loops need is on the CPU."""

    patches: torch.Tensor  # [P, 588] uint8
    labels: torch.Tensor  # [P, NUM_COLUMNS] uint8, see labels.py
    coordinates: torch.Tensor  # [P, 2]
    back: torch.Tensor  # [P] to prompt order
    bounds: torch.Tensor  # [segments + 1] int32, CPU
    grids: torch.Tensor  # [N, 3], CPU


@dataclass
class DeviceBatch:
    """A micro-batch on the device. A answers bear loss, with M tokens in all."""

    token_ids: torch.Tensor  # [B, L] int64
    positions: torch.Tensor  # [3, B, L]
    token_types: torch.Tensor  # [B, L]
    media: DeviceMedia | None  # None without any
    packing: Packing
    labels: torch.Tensor  # [M] int64
    owners: torch.Tensor  # [M] int64, the answer of each label
    num_labels: torch.Tensor  # [A] of each answer


def to_device(batch: MicroBatch, device: torch.device) -> DeviceBatch:
    answers = batch.answers.reshape(-1).astype(np.int64)
    bearing = np.flatnonzero(answers)
    rows = bearing // batch.answers.shape[1]
    _, owners, counts = np.unique(rows * 256 + answers[bearing], return_inverse=True, return_counts=True)
    packing = pack(batch, demo_model().media.patch)
    return DeviceBatch(
        _move(batch.token_ids, device).long(),
        _move(batch.positions, device).long(),
        _move(batch.token_types, device).int(),
        media_to_device(batch, device) if len(batch.grids) else None,
        Packing(
            _move(packing.place, device),
            _move(packing.source, device),
            packing.num_words,
            packing.num_embedded,
            _move(packing.last, device),
            packing.size,
            _move(packing.hidden, device),
        ),
        _move(batch.token_ids.reshape(-1)[bearing], device).long(),
        _move(owners.astype(np.int64), device),
        _move(counts.astype(np.int64), device),
    )


def media_to_device(batch: MicroBatch, device: torch.device) -> DeviceMedia:
    plan = plan_vision([tuple(grid) for grid in batch.grids.tolist()])
    return DeviceMedia(
        _move(batch.patches[plan.order], device),
        _move(batch.patch_labels[plan.order], device),
        _move(plan.coordinates, device),
        _move(plan.back, device),
        torch.from_numpy(plan.bounds),
        torch.as_tensor(batch.grids).long(),
    )


def _move(array: object, device: torch.device) -> torch.Tensor:
    tensor = torch.as_tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def padded_embeddings(model: Model, normalise: Normaliser, batch: DeviceBatch) -> torch.Tensor:
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
    pixels = normalise(media.patches).to(tower.patch_embed.proj.weight.dtype)
    seen = see(tower, pixels, media.coordinates, media.bounds)
    features: torch.Tensor = model.model.resampler_model(seen.index_select(0, media.back), media.grids)
    return features


def packed_embeddings(model: Model, normalise: Normaliser, batch: DeviceBatch) -> torch.Tensor:
    """[N, H]: word embeddings, then the features of all media, in the order of `batch.packing`."""
    places = batch.packing.place[: batch.packing.num_embedded]
    words = model.model.language_model.embed_tokens(batch.token_ids.reshape(-1)[places])
    if batch.media is None:
        return words
    return torch.cat([words, media_features(model, normalise, batch.media).to(words.dtype)])


def target_states(
    model: Model, normalise: Normaliser, batch: DeviceBatch, on_attention: Watcher | None = None
) -> torch.Tensor:
    """[M, H] after the last norm, where each label is predicted."""
    packing = batch.packing
    positions = batch.positions.flatten(1)[:, packing.place]
    return decode(model, packed_embeddings(model, normalise, batch), positions, packing, on_attention)


def answer_losses(
    model: Model, normalise: Normaliser, batch: DeviceBatch, on_attention: Watcher | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per answer [A]: sum of its labels' losses, their number, whether each is the likeliest token."""
    logits = model.lm_head(target_states(model, normalise, batch, on_attention)).float()
    losses = cross_entropy(logits, batch.labels, reduction="none")
    wrong = (logits.argmax(-1) != batch.labels).float()
    sums = torch.zeros(len(batch.num_labels), device=losses.device).index_add(0, batch.owners, losses)
    mistakes = torch.zeros_like(sums).index_add(0, batch.owners, wrong)
    return sums, batch.num_labels, mistakes == 0
