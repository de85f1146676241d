"""Feed-forward layers: dense SwiGLU, and experts in two disjoint pools (specification section 3.5).

A token uses the experts of its own pool only. Routed and shared experts are summed on the rank, so that
each layer needs one all-reduce, which the decoder makes; on a CPU one op computes them all.
"""

from __future__ import annotations

import cuda_ops
from workers.device.base import Tensor
from workers.model.context import Context
from workers.model.weights import DenseWeights, MoeWeights


class Mlp:
    """Either kind of layer; the weights say which."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def run(self, weights: DenseWeights | MoeWeights, x: Tensor, token_types: Tensor, out: Tensor) -> None:
        """out [M, H] = this rank's part of the answer to the normalised x [M, H]; the sum is the whole."""
        if isinstance(weights, DenseWeights):
            self._dense(weights, x, out)
        else:
            self._experts(weights, x, token_types, out)

    def _dense(self, weights: DenseWeights, x: Tensor, out: Tensor) -> None:
        device, rows = self._context.device, x.shape[0]
        activated = self._context.take("mlp.activated", rows, weights.down.in_features)
        if isinstance(weights.up_gate, cuda_ops.TiledWeight):  # gated: it activates what it multiplies
            device.linear(x, weights.up_gate, activated)
        else:
            up_gate = self._context.take("mlp.up_gate", rows, weights.up_gate.out_features)
            device.linear(x, weights.up_gate, up_gate)
            cuda_ops.silu_mul(up_gate, activated)
        device.linear(activated, weights.down, out)

    def _experts(self, weights: MoeWeights, x: Tensor, token_types: Tensor, out: Tensor) -> None:
        context, model = self._context, self._context.model
        shape = (x.shape[0], model.moe_top_k)
        ids = context.workspace.take("moe.expert_ids", shape, "int32")
        routing = context.workspace.take("moe.expert_weights", shape, "float32")
        cuda_ops.route_experts(
            x, weights.router, weights.bias, token_types, model.moe_top_k, model.moe_norm_min, ids, routing
        )
        shared = weights.shared
        if shared is not None and not context.device.is_gpu:
            cuda_ops.moe_experts(x, ids, routing, weights.pools, out, (shared.up_gate, shared.down))
            return
        cuda_ops.moe_experts(x, ids, routing, weights.pools, out)
        if shared is not None:
            answer = context.take("moe.shared", *out.shape)
            self._dense(shared, x, answer)
            context.device.add(out, answer)
