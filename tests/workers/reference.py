"""The model in plain NumPy, float64, straight from the specification: full attention, no cache, no shards.

Written to be obviously right. Matrices are [out, in] from builders.make_raw_weights.
"""

from __future__ import annotations

from math import erf

import numpy as np

from engine.model_config import ModelConfig
from tests.workers.builders import Prompt, RawWeights


def reference_logits(
    raw: RawWeights, config: ModelConfig, prompt: Prompt, generated: list[int] | None = None
) -> np.ndarray:
    """[tokens, vocabulary] for the prompt and what was generated after it."""
    ids = np.array(prompt.token_ids + (generated or []))
    x = raw["embed"][ids].astype(np.float64)
    for item, patches in zip(prompt.media, prompt.patches, strict=True):
        x[item.offset : item.offset + item.num_tokens] = reference_features(raw, config, patches, item.grid)
    positions = reference_positions(prompt, len(ids))
    vision = ids >= config.image_patch_id
    for i in range(config.num_layers):
        x = x + _attention(raw, config, i, _rms(x, raw[f"{i}.input_norm"], config), positions)
        y = _rms(x, raw[f"{i}.post_norm"], config)
        if config.is_moe_layer(i):
            x = x + np.stack(
                [_experts(raw, config, i, row, int(v)) for row, v in zip(y, vision, strict=True)]
            )
        else:
            x = x + _swiglu(raw, f"{i}.mlp", y)
    head = raw["embed"] if config.tie_word_embeddings else raw["head"]
    return _rms(x, raw["norm"], config) @ head.T


def reference_positions(prompt: Prompt, num_tokens: int) -> np.ndarray:
    """[3, num_tokens] by walking the prompt token by token (specification 3.4)."""
    positions: list[tuple[int, int, int]] = []
    counter = 0
    starts = {item.offset: item for item in prompt.media}
    while len(positions) < num_tokens:
        item = starts.get(len(positions))
        if item is None:
            positions.append((counter, counter, counter))
            counter += 1
            continue
        frames, rows, columns = max(item.grid[0] // 2, 1), item.grid[1] // 2, item.grid[2] // 2
        positions += [
            (counter + f, counter + a, counter + b)
            for f in range(frames)
            for a in range(rows)
            for b in range(columns)
        ]
        counter += max(frames, rows, columns)
    return np.array(positions).T


def _rms(x: np.ndarray, weight: np.ndarray, config: ModelConfig) -> np.ndarray:
    return weight * (x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + config.rms_norm_eps))


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _attention(
    raw: RawWeights, config: ModelConfig, i: int, y: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    tokens, hd = len(y), config.head_dim
    q = (y @ raw[f"{i}.q"].T).reshape(tokens, config.num_heads, hd)
    k = (y @ raw[f"{i}.k"].T).reshape(tokens, config.num_kv_heads, hd)
    v = (y @ raw[f"{i}.v"].T).reshape(tokens, config.num_kv_heads, hd)
    angles = _rope_angles(config, positions)
    q, k = _rotate(q, angles), _rotate(k, angles)
    group = config.num_heads // config.num_kv_heads
    mask = np.where(np.tri(tokens) > 0, 0.0, -np.inf)
    heads = [
        _softmax(q[:, h] @ k[:, h // group].T / np.sqrt(hd) + mask) @ v[:, h // group]
        for h in range(config.num_heads)
    ]
    return np.concatenate(heads, axis=1) @ raw[f"{i}.o"].T


def _rope_angles(config: ModelConfig, positions: np.ndarray) -> np.ndarray:
    """[tokens, head_dim / 2]"""
    half = config.head_dim // 2
    angles = np.empty((positions.shape[1], half))
    for i in range(half):
        if config.time_frequencies == 0 or i >= half - config.time_frequencies:
            axis = 0
        else:
            axis = 1 if i % 2 == 0 else 2
        angles[:, i] = positions[axis] * config.rope_theta ** (-2 * i / config.head_dim)
    return angles


def _rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Adjacent pairs of x [tokens, heads, head_dim]."""
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    rotated = np.empty_like(x)
    rotated[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    rotated[..., 1::2] = x[..., 1::2] * cos + x[..., 0::2] * sin
    return rotated


def _swiglu(raw: RawWeights, name: str, y: np.ndarray, expert: int | None = None) -> np.ndarray:
    gate, up, down = (raw[f"{name}.{part}"] for part in ("gate", "up", "down"))
    if expert is not None:
        gate, up, down = gate[expert], up[expert], down[expert]
    g = y @ gate.T
    return (g / (1 + np.exp(-g)) * (y @ up.T)) @ down.T


def _experts(raw: RawWeights, config: ModelConfig, i: int, y: np.ndarray, pool: int) -> np.ndarray:
    """One token through its pool."""
    pool = pool if config.num_pools == 2 else 0
    p = _softmax(raw[f"{i}.router"][pool].astype(np.float64) @ y)
    chosen = np.argsort(-(p + raw[f"{i}.bias"][pool]), kind="stable")[: config.moe_top_k]
    weights = p[chosen] / max(p[chosen].sum(), config.moe_norm_min)
    out = sum(w * _swiglu(raw, f"{i}.pool{pool}", y, int(e)) for w, e in zip(weights, chosen, strict=True))
    if config.num_shared_experts:
        out = out + _swiglu(raw, f"{i}.shared", y)
    return np.asarray(out)


# vision -------------------------------------------------------------------------------------------------


def reference_features(
    raw: RawWeights, config: ModelConfig, patches: np.ndarray, grid: tuple[int, int, int]
) -> np.ndarray:
    """One media item's [tokens, hidden] features, frame by frame."""
    frames, rows, columns = grid
    encoded = [
        _encode_frame(raw, config, part, rows, columns)
        for part in np.split(patches.astype(np.float64), frames)
    ]
    windows = [frame.reshape(len(frame) // 4, -1) for frame in encoded]
    spatial = [_merge(raw, config, "spatial", frame) for frame in windows]
    pairs = (
        [(spatial[0], spatial[0])] if frames == 1 else list(zip(spatial[0::2], spatial[1::2], strict=True))
    )
    joined = np.concatenate([np.concatenate(pair, axis=1) for pair in pairs])
    temporal = _merge(raw, config, "temporal", joined)
    return _rms(_linear(raw, "resampler.mlp", temporal), raw["after_norm"], config)


def _linear(raw: RawWeights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ raw[name].T + raw[f"{name}.bias"]


def _layer_norm(raw: RawWeights, config: ModelConfig, name: str, x: np.ndarray) -> np.ndarray:
    assert config.vision is not None
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + config.vision.layer_norm_eps)
    return scaled * raw[name] + raw[f"{name}.bias"]


def _merge(raw: RawWeights, config: ModelConfig, name: str, x: np.ndarray) -> np.ndarray:
    inner = _linear(raw, f"{name}0", x)
    gelu = inner * 0.5 * (1 + np.vectorize(erf)(inner / np.sqrt(2)))
    return _layer_norm(raw, config, f"{name}.ln", _linear(raw, f"{name}2", gelu))


def _encode_frame(
    raw: RawWeights, config: ModelConfig, patches: np.ndarray, rows: int, columns: int
) -> np.ndarray:
    vision = config.vision
    assert vision is not None
    mean = np.repeat([0.48145466, 0.4578275, 0.40821073], 196)
    std = np.repeat([0.26862954, 0.26130258, 0.27577711], 196)
    x = ((patches / 255 - mean) / std) @ raw["patch_embed"].T
    coordinates = [
        (2 * a + da, 2 * b + db)
        for a in range(rows // 2)
        for b in range(columns // 2)
        for da in (0, 1)
        for db in (0, 1)
    ]
    angles = _vision_angles(np.array(coordinates), vision.head_dim, vision.rope_theta)
    for i in range(vision.depth):
        qkv = _linear(raw, f"vision{i}.qkv", _layer_norm(raw, config, f"vision{i}.norm1", x))
        q, k, v = qkv.reshape(len(x), 3, vision.num_heads, vision.head_dim).transpose(1, 2, 0, 3)
        q, k = _rotate_half(q, angles), _rotate_half(k, angles)
        attended = _softmax(q @ k.swapaxes(1, 2) / np.sqrt(vision.head_dim)) @ v
        x = x + _linear(raw, f"vision{i}.proj", attended.transpose(1, 0, 2).reshape(len(x), -1))
        inner = _linear(raw, f"vision{i}.fc1", _layer_norm(raw, config, f"vision{i}.norm2", x))
        x = x + _linear(raw, f"vision{i}.fc2", inner / (1 + np.exp(-1.702 * inner)))
    return _layer_norm(raw, config, "vision.ln", x)


def _vision_angles(row_col: np.ndarray, head_dim: int, theta: float) -> np.ndarray:
    inv = theta ** (-np.arange(head_dim // 4) * 2 / (head_dim // 2))
    return np.concatenate([row_col[:, :1] * inv, row_col[:, 1:] * inv], axis=1)


def _rotate_half(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Pairs (d, d + head_dim / 2) of x [heads, patches, head_dim]."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1
    )
