"""The decoder's rotary angles (specification section 3.3).

Frequency i turns with one of the three positions: the last `time_frequencies` with time, the others with
height (even i) and width (odd i) in turn. A text model has one axis, and since text tokens have equal
positions the same code serves it. The rotation itself is cuda_ops.rope_write_kv.
"""

from __future__ import annotations

import numpy as np

import cuda_ops
from engine.model_config import ModelConfig
from workers.device.base import Tensor
from workers.model.context import Context

TIME, HEIGHT, WIDTH = 0, 1, 2  # rows of the positions


def rope_axes(head_dim: int, time_frequencies: int) -> np.ndarray:
    """Which row of the positions each of the head_dim / 2 frequencies uses; all TIME for text models."""
    axes = np.full(head_dim // 2, TIME, np.int32)
    if time_frequencies:
        spatial = head_dim // 2 - time_frequencies
        axes[:spatial] = np.where(np.arange(spatial) % 2 == 0, HEIGHT, WIDTH)
    return axes


def rope_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """theta ** (-2i / head_dim) for i in [0, head_dim / 2), rounded once to fp32."""
    return (theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)).astype(np.float32)


class Rope:
    """The tables of one model on the device."""

    def __init__(self, context: Context) -> None:
        model: ModelConfig = context.model
        self._context = context
        self._axes = context.device.upload(rope_axes(model.head_dim, model.time_frequencies))
        self._frequencies = context.device.upload(rope_frequencies(model.head_dim, model.rope_theta))
        self._num_frequencies = model.head_dim // 2

    def angles(self, positions: Tensor) -> Tensor:
        """positions [3, M] int32 -> cos and sin of every angle, [M, head_dim / 2, 2] fp32."""
        shape = (positions.shape[1], self._num_frequencies, 2)
        cos_sin = self._context.workspace.take("rope.cos_sin", shape, "float32")
        cuda_ops.rope_angles(positions, self._axes, self._frequencies, cos_sin)
        return cos_sin
