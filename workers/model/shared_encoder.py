"""The vision transformer over one large image or group of frames, computed by all ranks together.

Attention is shared by heads, everything that works row by row is shared by rows; twice per block the ranks
gather what the others have. Each sum is the one that encoder.py takes, so the bits are those of one rank.
What is worth sharing is decided in workers/media_features.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import cuda_ops
from engine.model_config import VisionConfig
from workers.device.base import Device, Tensor
from workers.model.context import Context
from workers.model.encoder import Encoder, Frames
from workers.model.weights import VisionBlockWeights, VisionWeights


def can_share(vision: VisionConfig, world: int) -> bool:
    """Whether the heads divide among this many ranks."""
    return world > 1 and vision.num_heads % world == 0


@dataclass(frozen=True, slots=True)
class _Cut:
    """Which of `num_patches` rows are this rank's: as many on each, the last ones' partly beyond the end."""

    num_patches: int
    num_rows: int  # of one rank
    first_row: int
    qkv_order: Tensor  # where row p of shard s goes when q, k and v come side by side
    head_order: Tensor  # the same for the ranks' heads

    @classmethod
    def of(cls, num_patches: int, device: Device) -> _Cut:
        num_rows = -(-num_patches // device.world)
        return cls(
            num_patches,
            num_rows,
            num_rows * device.rank,
            device.upload(_side_by_side(3, num_patches)),
            device.upload(_side_by_side(device.world, num_patches)),
        )

    def mine(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a tensor with all ranks' rows."""
        return tensor[self.first_row : self.first_row + self.num_rows]


class SharedEncoder(Encoder):
    """Every rank calls `run` with the same batch and gets the whole result."""

    def __init__(self, context: Context, vision: VisionConfig, weights: VisionWeights) -> None:
        super().__init__(context, vision, weights)
        self._width = vision.hidden_size // context.device.world  # of this rank's heads

    def _run_blocks(self, patches: np.ndarray, frames: Frames) -> Tensor:
        context, device, eps = self._context, self._context.device, self._vision.layer_norm_eps
        cut = _Cut.of(len(patches), device)
        shape = (cut.num_rows * device.world, self._vision.hidden_size)
        x, gathered = context.take("encoder.x", *shape), context.take("encoder.gathered", *shape)
        self._embed(patches, x[: cut.num_patches])
        normed = context.take("encoder.normed", *shape)
        for block in self._weights.blocks:
            context.begin_work(frames.block_flops)
            all_rows = normed[: cut.num_patches]
            cuda_ops.layer_norm(x[: cut.num_patches], block.norm1_w, block.norm1_b, eps, all_rows)
            self._attend_by_heads(block, all_rows, frames, cut, gathered[: cut.num_patches])
            mine = cut.mine(x)
            self._project(block, cut.mine(gathered), mine, cut.mine(normed))
            cuda_ops.layer_norm(mine, block.norm2_w, block.norm2_b, eps, cut.mine(normed))
            self._feed_forward(block, cut.mine(normed), mine)
            device.all_gather(mine, device.view(gathered, (device.world, cut.num_rows, shape[1])))
            x, gathered = gathered, x
        return x[: cut.num_patches]

    def _attend_by_heads(
        self, block: VisionBlockWeights, normed: Tensor, frames: Frames, cut: _Cut, out: Tensor
    ) -> None:
        """out [P, D] = attention inside each frame, of all ranks' heads."""
        context, device, width, count = self._context, self._context.device, self._width, cut.num_patches
        attended = context.take("encoder.attended_share", count, width)
        self._attend_frames(self._own_qkv(block, normed, cut), frames, attended)
        shards = context.take("encoder.shards", device.world, count, width)
        device.all_gather(attended, shards)
        self._lay_side_by_side(shards, cut.head_order, out)

    def _own_qkv(self, block: VisionBlockWeights, normed: Tensor, cut: _Cut) -> Tensor:
        """[P, 3*width]: queries, keys and values of this rank's heads."""
        context, device, width = self._context, self._context.device, self._width
        shards = context.take("encoder.shards", 3, cut.num_patches, width)
        data: Tensor = block.qkv.data
        for part in range(3):
            first = part * self._vision.hidden_size + device.rank * width
            weight = cuda_ops.Weight(block.qkv.kind, data[first : first + width])
            out = device.view(shards[part : part + 1], (cut.num_patches, width))
            device.linear(normed, weight, out, bias=block.qkv_b[first : first + width])
        qkv = context.take("encoder.qkv", cut.num_patches, 3 * width)
        self._lay_side_by_side(shards, cut.qkv_order, qkv)
        return qkv

    def _lay_side_by_side(self, shards: Tensor, order: Tensor, out: Tensor) -> None:
        """out [P, S*width] from columns [S, P, width]."""
        device, rows = self._context.device, shards.shape[0] * shards.shape[1]
        flat = (rows, self._width)
        cuda_ops.scatter_rows(device.view(shards, flat), order, device.view(out, flat))


def _side_by_side(num_shards: int, num_rows: int) -> np.ndarray:
    """int32 [num_shards * num_rows]: shard after shard, the row each becomes when shards lie in columns."""
    rows = np.arange(num_rows, dtype=np.int32) * num_shards
    return (rows + np.arange(num_shards, dtype=np.int32)[:, None]).reshape(-1)
