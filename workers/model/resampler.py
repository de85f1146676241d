"""From patch vectors to prompt tokens: 2x2 patches, then two frames, become one (specification section 4.5).

A single image has no second frame; it is paired with itself after the spatial half.
"""

from __future__ import annotations

import numpy as np

import cuda_ops
from engine.model_config import VisionConfig
from workers.device.base import Tensor
from workers.model.context import Context, gather_rows
from workers.model.weights import ResamplerWeights

# A run of frames of one media item: how many (1 for an image, even for a video), and windows in each.
FrameRun = tuple[int, int]


class Resampler:
    """The whole resampler on one rank."""

    def __init__(self, context: Context, vision: VisionConfig, weights: ResamplerWeights) -> None:
        self._context = context
        self._vision = vision
        self._weights = weights
        self._width = vision.hidden_size * vision.spatial_merge**2  # one window

    def run(self, patches: Tensor, frame_runs: list[FrameRun], out: Tensor) -> None:
        """patches [P, D] in window order -> out [R, H], one row per token."""
        context, device, weights = self._context, self._context.device, self._weights
        num_windows = sum(frames * windows for frames, windows in frame_runs)
        context.begin_work(12.0 * num_windows * self._width**2)  # 2 square matrices, 3, and a narrow one
        windows = device.view(patches, (num_windows, self._width))
        spatial = context.take("resampler.spatial", num_windows, self._width)
        self._merge(
            windows,
            (weights.spatial_0, weights.spatial_0_b, weights.spatial_2, weights.spatial_2_b),
            (weights.spatial_ln_w, weights.spatial_ln_b),
            spatial,
        )
        order = paired_frames(frame_runs)
        pairs = context.take("resampler.pairs", len(order), self._width)
        gather_rows(spatial, device.upload(order), pairs)

        num_rows = len(order) // 2
        temporal = context.take("resampler.temporal", num_rows, self._width)
        self._merge(
            device.view(pairs, (num_rows, 2 * self._width)),
            (weights.temporal_0, weights.temporal_0_b, weights.temporal_2, weights.temporal_2_b),
            (weights.temporal_ln_w, weights.temporal_ln_b),
            temporal,
        )
        projected = context.take("resampler.projected", num_rows, context.model.hidden_size)
        device.linear(temporal, weights.mlp, projected, bias=weights.mlp_b)
        cuda_ops.rms_norm(projected, weights.after_norm, context.model.rms_norm_eps, out)

    def _merge(
        self,
        x: Tensor,
        linears: tuple,
        norm: tuple[Tensor, Tensor],
        out: Tensor,
    ) -> None:
        """out = LayerNorm(Linear(gelu(Linear(x))))."""
        first, first_bias, second, second_bias = linears
        inner = self._context.take("resampler.inner", *out.shape)
        self._context.device.linear(x, first, inner, bias=first_bias, activation="gelu")
        merged = self._context.take("resampler.merged", *out.shape)
        self._context.device.linear(inner, second, merged, bias=second_bias)
        cuda_ops.layer_norm(merged, *norm, self._vision.layer_norm_eps, out)


def paired_frames(frame_runs: list[FrameRun]) -> np.ndarray:
    """Which window goes where: rows 2i and 2i+1 are the two windows of token i, the earlier frame first."""
    parts, start = [], 0
    for frames, windows in frame_runs:
        rows = np.arange(start, start + frames * windows, dtype=np.int32).reshape(frames, windows)
        even, odd = (rows, rows) if frames == 1 else (rows[0::2], rows[1::2])
        parts.append(np.stack([even, odd], axis=-1).reshape(-1))
        start += frames * windows
    return np.concatenate(parts)
