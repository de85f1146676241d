"""The vision transformer: patches of any frames to one vector per patch (specification section 4.4).

A frame is the unit of attention: frames never see each other, whether they come from a video, from one
image or from several packed into one call. Patches of a frame lie in merge-window order (section 4.3), and
so do the rows and columns that turn them. Merging patches into tokens is resampler.py; all ranks together
do this in shared_encoder.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

import cuda_ops
from engine.model_config import VisionConfig
from workers.device.base import Device, Tensor
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


@dataclass(frozen=True, slots=True)
class Frames:
    """Where the frames of a batch lie, and where in a frame its patches do; on the device."""

    starts: Tensor  # [N + 1] int32
    row_col: Tensor  # [P, 2] int32
    block_flops: float  # of one block

    @classmethod
    def upload(cls, frames: list[tuple[int, int]], vision: VisionConfig, device: Device) -> Frames:
        sizes = [rows * columns for rows, columns in frames]
        return cls(
            device.upload(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)),
            device.upload(np.concatenate([window_order(*frame) for frame in frames])),
            _block_flops(vision, sizes),
        )


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
        x = self._run_blocks(batch.patches, Frames.upload(batch.frames, self._vision, self._context.device))
        out, eps = self._context.take("encoder.normed", *x.shape), self._vision.layer_norm_eps
        cuda_ops.layer_norm(x, self._weights.ln_w, self._weights.ln_b, eps, out)
        return out

    def _run_blocks(self, patches: np.ndarray, frames: Frames) -> Tensor:
        context, eps = self._context, self._vision.layer_norm_eps
        x = context.take("encoder.x", patches.shape[0], self._vision.hidden_size)
        self._embed(patches, x)
        normed = context.take("encoder.normed", *x.shape)
        for block in self._weights.blocks:
            context.begin_work(frames.block_flops)
            cuda_ops.layer_norm(x, block.norm1_w, block.norm1_b, eps, normed)
            self._attend(block, normed, frames, x)
            cuda_ops.layer_norm(x, block.norm2_w, block.norm2_b, eps, normed)
            self._feed_forward(block, normed, x)
        return x

    def _embed(self, patches: np.ndarray, x: Tensor) -> None:
        context = self._context
        pixels = context.take("encoder.pixels", *patches.shape)
        cuda_ops.normalize_pixels(context.device.upload(patches), self._mean, self._std, pixels)
        context.device.linear(pixels, self._weights.patch_embed, x)

    def _attend(self, block: VisionBlockWeights, normed: Tensor, frames: Frames, x: Tensor) -> None:
        """x += attention of `normed` inside each frame; overwrites `normed`."""
        context, (patches, width) = self._context, x.shape
        qkv = context.take("encoder.qkv", patches, 3 * width)
        context.device.linear(normed, block.qkv, qkv, bias=block.qkv_b)
        attended = context.take("encoder.attended", patches, width)
        self._attend_frames(qkv, frames, attended)
        self._project(block, attended, x, normed)

    def _attend_frames(self, qkv: Tensor, frames: Frames, attended: Tensor) -> None:
        """attended [P, n*hd] from qkv [P, 3*n*hd] of any n heads; turns queries and keys in place."""
        vision, (patches, width) = self._vision, attended.shape
        shape = (patches, 3, width // vision.head_dim, vision.head_dim)
        heads = self._context.device.view(qkv, shape)
        cuda_ops.vision_rope(heads, frames.row_col, vision.rope_theta)
        cuda_ops.segment_attention(heads, frames.starts, self._scale, attended)

    def _project(self, block: VisionBlockWeights, attended: Tensor, x: Tensor, scratch: Tensor) -> None:
        """x += the projection of `attended`, both of the same rows."""
        device = self._context.device
        device.linear(attended, block.proj, scratch, bias=block.proj_b)
        device.add(x, scratch)

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
