"""The language model: embedding, layers, logits (specification section 3.1).

The residual stream is kept beside the normalised input of the next block, because adding a block's output and
normalising for the next one is a single pass over memory. A block leaves its rank's part of its output: the
sum over the ranks is part of that pass too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import cuda_ops
from engine.model_config import ModelConfig
from workers.batch import Batch
from workers.device.base import Tensor
from workers.kv_cache import KvCache
from workers.model.attention import Attention
from workers.model.context import Context, gather_rows
from workers.model.mlp import Mlp
from workers.model.rope import Rope
from workers.model.weights import DecoderWeights


@dataclass(slots=True)
class MediaRows:
    """Encoded media that a batch covers: out[rows[i]] = features[i]."""

    features: Tensor  # [R, H]
    rows: Tensor  # [R] int32, rows of the batch


class Decoder:
    """One rank's share of the layers."""

    def __init__(self, context: Context, weights: DecoderWeights) -> None:
        self._context = context
        self._weights = weights
        self._rope = Rope(context)
        self._attention = Attention(context)
        self._mlp = Mlp(context)
        self._pair_flops = 4.0 * context.model.num_heads * context.model.head_dim  # in each layer
        self._token_flops = [token_flops(context.model, index) for index in range(len(weights.layers))]
        self._shard_order: dict[int, Tensor] = {}  # rows of gathered logits, by number of samples

    def run(self, batch: Batch, media: list[MediaRows], kv: KvCache) -> Tensor | None:
        """Compute the batch's tokens; returns their logits, or None when no chunk samples.

        Logits are [num_samples, padded vocabulary] fp32 on rank 0 and None elsewhere.
        """
        context, eps, layers = self._context, self._context.model.rms_norm_eps, self._weights.layers
        residual = self._embed(batch, media)
        self._attention.begin(batch, kv)
        cos_sin = self._rope.angles(batch.positions)
        x = context.take("decoder.normed", *residual.shape)
        out = context.take("decoder.out", *residual.shape)
        cuda_ops.rms_norm(residual, layers[0].input_norm, eps, x)
        for index, layer in enumerate(layers):
            context.begin_work(self._layer_flops(batch, index))
            if index > 0:
                context.device.all_reduce_add_rms_norm(out, residual, layer.input_norm, eps, x)
            self._attention.run(layer, x, batch, cos_sin, kv.layers[index], out)
            context.device.all_reduce_add_rms_norm(out, residual, layer.post_attention_norm, eps, x)
            self._mlp.run(layer.mlp, x, batch.token_types, out)
        if batch.sample_rows is None:
            return None
        return self._logits(out, residual, batch.sample_rows, batch.num_samples)

    def flops(self, batch: Batch) -> float:
        """Operations of a step, over all ranks."""
        layers = sum(self._layer_flops(batch, index) for index in range(len(self._token_flops)))
        return layers + self._head_flops(batch.num_samples)

    def _layer_flops(self, batch: Batch, index: int) -> float:
        return batch.num_tokens * self._token_flops[index] + batch.num_pairs * self._pair_flops

    def _head_flops(self, num_samples: int) -> float:
        context = self._context
        columns = len(context.share.vocab) * context.device.world
        return 2.0 * num_samples * context.model.hidden_size * columns

    def _embed(self, batch: Batch, media: list[MediaRows]) -> Tensor:
        """Word embeddings, with placeholders overwritten by the media's features."""
        context, share = self._context, self._context.share
        residual = context.take("decoder.residual", batch.num_tokens, context.model.hidden_size)
        cuda_ops.embed_tokens(batch.token_ids, self._weights.embed_tokens, share.vocab.start, residual)
        context.device.all_reduce(residual)  # exact: all ranks but one add zeros
        for item in media:
            cuda_ops.scatter_rows(item.features, item.rows, residual)
        return residual

    def _logits(self, out: Tensor, residual: Tensor, rows: Tensor, num_samples: int) -> Tensor | None:
        """Finish the last layer for the rows that are sampled, and project them on the vocabulary."""
        context, device, hidden = self._context, self._context.device, self._context.model.hidden_size
        last_out = context.take("logits.out", num_samples, hidden)
        last_residual = context.take("logits.residual", num_samples, hidden)
        gather_rows(out, rows, last_out)
        gather_rows(residual, rows, last_residual)
        normed = context.take("logits.normed", num_samples, hidden)
        eps = context.model.rms_norm_eps
        device.all_reduce_add_rms_norm(last_out, last_residual, self._weights.norm, eps, normed)

        columns = len(context.share.vocab)
        context.begin_work(self._head_flops(num_samples))
        logits = context.workspace.take("logits.local", (num_samples, columns), "float32")
        device.linear(normed, self._weights.lm_head, logits)
        if device.world == 1:
            return logits
        parts = context.workspace.take("logits.parts", (device.world, num_samples, columns), "float32")
        device.all_gather(logits, parts)
        return self._side_by_side(parts) if device.rank == 0 else None

    def _side_by_side(self, parts: Tensor) -> Tensor:
        """Column shards [world, S, columns] in rank order -> [S, world * columns]."""
        context, (world, num_samples, columns) = self._context, parts.shape
        if num_samples not in self._shard_order:
            order = np.arange(world * num_samples, dtype=np.int32).reshape(world, num_samples).T
            self._shard_order[num_samples] = context.device.upload(np.ascontiguousarray(order.reshape(-1)))
        whole = context.workspace.take("logits.whole", (num_samples, world * columns), "float32")
        shards = context.device.view(whole, (num_samples * world, columns))
        rows = context.device.view(parts, (world * num_samples, columns))
        gather_rows(rows, self._shard_order[num_samples], shards)
        return whole


def token_flops(model: ModelConfig, index: int) -> float:
    """Operations of a layer's products for one token, over all ranks."""
    attention = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim * model.hidden_size
    width = model.intermediate_size
    if model.is_moe_layer(index):
        num_active = model.moe_top_k + (model.num_shared_experts or 0)
        width = num_active * max(model.moe_intermediate_sizes)
    return 2.0 * (attention + 3 * model.hidden_size * width)
