"""Grouped-query attention of one layer over the paged KV cache (specification section 3.2)."""

from __future__ import annotations

import cuda_ops
from workers.batch import Batch
from workers.device.base import Tensor
from workers.kv_cache import KvCache
from workers.model.context import Context
from workers.model.weights import LayerWeights


class Attention:
    """This rank's heads; the partial sums of the output projection meet in one all-reduce."""

    def __init__(self, context: Context) -> None:
        share, head_dim = context.share, context.model.head_dim
        self._context = context
        self._num_q_heads = share.num_q_heads
        self._head_dim = head_dim
        self._qkv_width = (share.num_q_heads + 2 * share.num_kv_heads) * head_dim
        self._num_kv_heads = share.num_kv_heads
        self._scale = head_dim**-0.5
        self._plan: cuda_ops.AttentionPlan | None = None

    def begin(self, batch: Batch, kv: KvCache) -> None:
        """Once per step, before the first layer: a GPU makes a list for all layers of who attends to what."""
        context = self._context
        if not context.device.is_gpu:
            return
        num_bytes = cuda_ops.attention_plan_bytes(
            *batch.attention_tasks, batch.kv_lens.shape[0], self._num_kv_heads, self._head_dim
        )
        memory = context.workspace.take("attention.plan", (num_bytes,), "uint8")
        self._plan = cuda_ops.AttentionPlan(memory, *batch.attention_tasks)
        cuda_ops.plan_attention(
            self._plan,
            batch.block_tables,
            batch.query_starts,
            batch.kv_lens,
            self._num_q_heads,
            self._num_kv_heads,
            self._head_dim,
            kv.block_size,
        )

    def run(
        self,
        weights: LayerWeights,
        x: Tensor,
        batch: Batch,
        cos_sin: Tensor,
        kv: tuple[Tensor, ...],
        out: Tensor,
    ) -> None:
        """out [M, H] = this rank's part of attention of the normalised x [M, H]; the ranks' sum is the whole.

        Writes the batch's keys and values to `kv`, one of KvCache.layers.
        """
        context, (k_cache, v_cache, *scales), m = self._context, kv, batch.num_tokens
        qkv = context.take("attention.qkv", m, self._qkv_width)
        context.device.linear(x, weights.qkv, qkv)

        q = context.take("attention.q", m, self._num_q_heads, self._head_dim)
        cuda_ops.rope_write_kv(qkv, cos_sin, batch.slots, k_cache, v_cache, q, *scales)

        heads = context.take("attention.heads", m, self._num_q_heads * self._head_dim)
        cuda_ops.paged_attention(
            q,
            k_cache,
            v_cache,
            batch.block_tables,
            batch.query_starts,
            batch.kv_lens,
            self._scale,
            heads,
            self._plan,
            *scales,
        )
        context.device.linear(heads, weights.o_proj, out)
