"""The vision transformer: patches of any frames to one vector per patch (specification section 4.4).

A frame is the unit of attention: frames never see each other, whether they come from a video, from one
image or from several packed into one call. Patches of a frame lie in merge-window order (section 4.3), and
so do the rows and columns that turn them. Merging patches into tokens is resampler.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

import cuda_ops
from engine.model_config import VisionConfig
from workers.device.base import Tensor
from workers.model.context import Context
from workers.model.weights import VisionBlockWeights, VisionWeights

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

_ROWS_AT_ONCE = 4096  # patches of one feed-forward call: bounds its buffer, never its result


@dataclass(slots=True)
class PatchBatch:
    """Patches of one encoder call: `frames` names (patch rows, patch columns) of each frame in order."""

    patches: np.ndarray  # [P, 3*14*14] uint8
    frames: list[tuple[int, int]]


@lru_cache(maxsize=256)
def window_order(rows: int, columns: int, merge: int = 2) -> np.ndarray:
    """[rows*columns, 2] int32: row and column of each patch of a frame, merge windows in raster order."""
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    windows = grid.reshape(rows // merge, merge, columns // merge, merge, 2).swapaxes(1, 2)
    return np.ascontiguousarray(windows.reshape(-1, 2), np.int32)


class Encoder:
    """The whole transformer on one rank."""

    def __init__(self, context: Context, vision: VisionConfig, weights: VisionWeights) -> None:
        self._context = context
        self._vision = vision
        self._weights = weights
        self._scale = vision.head_dim**-0.5
        self._mean = context.device.upload(np.array(PIXEL_MEAN, np.float32))
        self._std = context.device.upload(np.array(PIXEL_STD, np.float32))

    def run(self, batch: PatchBatch) -> Tensor:
        """One vector per patch, [P, D], in a buffer that the next call overwrites."""
        context, vision = self._context, self._vision
        sizes = [rows * columns for rows, columns in batch.frames]
        starts = context.device.upload(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))
        row_col = context.device.upload(np.concatenate([window_order(*frame) for frame in batch.frames]))
        block_flops = _block_flops(vision, sizes)

        x = self._embed(batch.patches)
        normed = context.take("encoder.normed", *x.shape)
        for block in self._weights.blocks:
            context.begin_work(block_flops)
            cuda_ops.layer_norm(x, block.norm1_w, block.norm1_b, vision.layer_norm_eps, normed)
            self._attend(block, normed, row_col, starts, x)
            cuda_ops.layer_norm(x, block.norm2_w, block.norm2_b, vision.layer_norm_eps, normed)
            self._feed_forward(block, normed, x)
        cuda_ops.layer_norm(x, self._weights.ln_w, self._weights.ln_b, vision.layer_norm_eps, normed)
        return normed

    def _embed(self, patches: np.ndarray) -> Tensor:
        context = self._context
        pixels = context.take("encoder.pixels", *patches.shape)
        cuda_ops.normalize_pixels(context.device.upload(patches), self._mean, self._std, pixels)
        x = context.take("encoder.x", patches.shape[0], self._vision.hidden_size)
        context.device.linear(pixels, self._weights.patch_embed, x)
        return x

    def _attend(
        self, block: VisionBlockWeights, normed: Tensor, row_col: Tensor, starts: Tensor, x: Tensor
    ) -> None:
        """x += attention of `normed` inside each frame."""
        context, vision, device = self._context, self._vision, self._context.device
        patches, width = x.shape
        qkv = context.take("encoder.qkv", patches, 3 * width)
        device.linear(normed, block.qkv, qkv, bias=block.qkv_b)
        heads = device.view(qkv, (patches, 3, vision.num_heads, vision.head_dim))
        cuda_ops.vision_rope(heads, row_col, vision.rope_theta)
        attended = context.take("encoder.attended", patches, width)
        cuda_ops.segment_attention(heads, starts, self._scale, attended)
        projected = normed  # no longer needed as such
        device.linear(attended, block.proj, projected, bias=block.proj_b)
        device.add(x, projected)

    def _feed_forward(self, block: VisionBlockWeights, normed: Tensor, x: Tensor) -> None:
        """x += the block's MLP of `normed`, some rows at a time."""
        context, device = self._context, self._context.device
        for start in range(0, x.shape[0], _ROWS_AT_ONCE):
            rows = normed[start : start + _ROWS_AT_ONCE]
            inner = context.take("encoder.inner", rows.shape[0], self._vision.intermediate_size)
            device.linear(rows, block.fc1, inner, bias=block.fc1_b, activation="quick_gelu")
            answer = context.take("encoder.answer", *rows.shape)
            device.linear(inner, block.fc2, answer, bias=block.fc2_b)
            device.add(x[start : start + _ROWS_AT_ONCE], answer)


def _block_flops(vision: VisionConfig, frame_sizes: list[int]) -> float:
    """Multiplications and additions of one block over these frames."""
    width = vision.hidden_size
    linear = 2 * sum(frame_sizes) * (4 * width * width + 2 * width * vision.intermediate_size)
    attention = 4 * width * sum(size * size for size in frame_sizes)
    return float(linear + attention)
