"""Every op in NumPy, in float64, written for reading: what is right."""

from __future__ import annotations

import math

import numpy as np

from tests.cuda_ops.builders import rounded


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2.0)))


ACTIVATIONS = {"none": lambda x: x, "gelu": gelu, "quick_gelu": lambda x: x * sigmoid(1.702 * x)}


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, activation: str) -> np.ndarray:
    y = x.astype(np.float64) @ weight.astype(np.float64).T
    return ACTIVATIONS[activation](y if bias is None else y + bias)


def int8_span(kind: str, group: int) -> int:
    """Columns of x that share an int8 scale when they meet this weight; 0 where x stays as it is."""
    if kind == "int8":
        return 64
    return 0 if kind != "int4" or group % 32 else 64 if group % 64 == 0 else 32


def int8_activations(x: np.ndarray, span: int) -> tuple[np.ndarray, np.ndarray]:
    """What the CPU multiplies for bf16 x and a quantised weight, and the largest error of each element.

    Per span of columns: scale = max|x| / 127, q = nearest(x * (127 / max|x|)), both in fp32. x is off by half
    a step at most, max|x| / 254, and by a little more where fp32 rounds x * inverse across a tie.
    """
    if span == 0:
        return x.astype(np.float64), np.zeros(x.shape)
    columns, padding = x.shape[-1], -x.shape[-1] % span
    padded = np.pad(x.astype(np.float32), [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    spans = padded.reshape(*x.shape[:-1], (columns + padding) // span, span)
    largest = np.abs(spans).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    seen = np.rint(spans * inverse).astype(np.float64) * (largest / np.float32(127))
    error = np.broadcast_to(largest / 254 * (1 + 2.0**-16), spans.shape).astype(np.float64)
    return seen.reshape(padded.shape)[..., :columns], error.reshape(padded.shape)[..., :columns]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * weight + bias


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def rope_angles(positions: np.ndarray, axis: np.ndarray, inv_freq: np.ndarray) -> np.ndarray:
    """positions [3, M] -> [M, pairs, 2] cosines and sines."""
    angles = positions[axis].T.astype(np.float32) * inv_freq
    return np.stack([np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))], -1)


def rotate_adjacent(x: np.ndarray, cos_sin: np.ndarray) -> np.ndarray:
    """x [M, heads, hd], cos_sin [M, hd/2, 2]"""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = cos_sin[:, None, :, 0], cos_sin[:, None, :, 1]
    out = np.empty(x.shape, np.float64)
    out[..., 0::2], out[..., 1::2] = a * cos - b * sin, b * cos + a * sin
    return out


def vision_rope(x: np.ndarray, row_col: np.ndarray, theta: float) -> np.ndarray:
    """x [P, heads, hd]; angles are fp32 products, as the model defines them."""
    hd = x.shape[-1]
    inv = (theta ** (-2.0 * np.arange(hd // 4) / (hd // 2))).astype(np.float32)
    row_col = row_col.astype(np.float32)
    angles = np.concatenate([row_col[:, :1] * inv, row_col[:, 1:] * inv], -1).astype(np.float64)[:, None, :]
    a, b = x[..., : hd // 2].astype(np.float64), x[..., hd // 2 :].astype(np.float64)
    return np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1
    )


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, first_position: int | None
) -> np.ndarray:
    """q [n, nq, hd], k, v [length, nkv, hd] -> [n, nq, hd]; causal from `first_position`, full if None."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1).astype(np.float64), np.repeat(v, group, axis=1).astype(np.float64)
    scores = np.einsum("qhd,khd->hqk", q.astype(np.float64), k) * scale
    if first_position is not None:
        positions = first_position + np.arange(q.shape[0])[:, None]
        scores = np.where(np.arange(k.shape[0])[None, :] <= positions, scores, -np.inf)
    return np.einsum("hqk,khd->qhd", softmax(scores), v)


def route_experts(
    x: np.ndarray, router: np.ndarray, bias: np.ndarray, token_types: np.ndarray, top_k: int, norm_min: float
) -> tuple[np.ndarray, np.ndarray]:
    num_experts = router.shape[1]
    ids = np.full((len(x), top_k), -1, np.int32)
    weights = np.zeros((len(x), top_k))
    for i, pool in enumerate(token_types):
        if pool < 0:
            continue
        p = softmax(router[pool].astype(np.float64) @ x[i].astype(np.float64))
        chosen = np.argsort(-(p + bias[pool]), kind="stable")[:top_k]
        ids[i] = pool * num_experts + chosen
        weights[i] = p[chosen] / max(p[chosen].sum(), norm_min)
    return ids, weights


def moe_experts(
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    pools: list[tuple[np.ndarray, np.ndarray]],
    spans: list[tuple[int, int]] | None = None,
) -> np.ndarray:
    """spans: per pool, the int8_span of x and of the middle activation; None where nothing becomes int8."""
    num_experts = pools[0][0].shape[0]
    out = np.zeros(x.shape, np.float64)
    for i in range(len(x)):
        for expert, weight in zip(ids[i], weights[i], strict=True):
            if expert < 0:
                continue
            up_gate, down = (
                part[expert % num_experts].astype(np.float64) for part in pools[expert // num_experts]
            )
            x_span, hidden_span = spans[expert // num_experts] if spans else (0, 0)
            gate, up = np.split(up_gate @ int8_activations(x[i], x_span)[0], 2)
            hidden = silu(gate) * up
            if hidden_span:
                hidden, _ = int8_activations(rounded(hidden), hidden_span)
            out[i] += weight * (down @ hidden)
    return out


def normalize_pixels(patches: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    channels = patches.reshape(len(patches), 3, -1).astype(np.float64)
    return ((channels / 255.0 - mean[:, None]) / std[:, None]).reshape(patches.shape)


def round_half_away(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.floor(np.abs(x) + 0.5)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    highest = logits.max()
    return logits - highest - np.log(np.exp(logits - highest).sum())


def kept_tokens(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    """Ids that may be drawn after top-k, top-p and min-p, best first."""
    z = logits.astype(np.float64) / temperature
    order = np.lexsort((np.arange(len(z)), -z))
    order = order[np.isfinite(z[order])]
    if top_k > 0:
        order = order[:top_k]
    p = softmax(z[order])
    before = np.cumsum(p) - p
    order, p = order[(before < top_p) | (before == 0)], p[(before < top_p) | (before == 0)]
    return [int(i) for i in order[p >= min_p * p[0]]]
