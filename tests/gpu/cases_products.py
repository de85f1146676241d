"""Cases of the products: dense layers, routing, and the experts of both pools."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import cuda_ops
from cuda_ops.weight import WeightKind
from tests.gpu.case import Answer, Case
from tests.gpu.machine import Machine, Work
from tests.gpu.weights import dequantised, random_weight, tiled, tiled_router


def linear_case(
    machine: Machine, kind: WeightKind, m: int, n: int, k: int, *, is_gated: bool = False
) -> Case:
    weight = random_weight(machine, kind, n, k)
    packed = tiled(machine, weight, is_gated)
    x = torch.randn(m, k, device=machine.device).to(torch.bfloat16)
    out = machine.empty(m, n // 2 if is_gated else n)

    def answers() -> list[Answer]:
        y = x.double() @ dequantised(weight).T
        if is_gated:
            y = F.silu(y[:, : n // 2]) * y[:, n // 2 :]
        return [Answer("out", out, y)]

    peers: dict[str, Work] = {}
    if kind == "bfloat16" and not is_gated:
        peers["torch"] = lambda: F.linear(x, weight.data)
    if kind == "int8" and not is_gated:
        data, scales = weight.data, weight.scales
        dequantise_and_multiply = machine.compiled(lambda x, q: (x @ q.to(torch.bfloat16).T) * scales)
        peers["triton"] = lambda: dequantise_and_multiply(x, data)
    return Case(
        f"linear {kind}{' gated' if is_gated else ''}", f"{m} x {k} -> {n}",
        lambda: cuda_ops.linear(x, packed, out), answers,
        packed.num_bytes + 2 * m * k + out.numel() * 2, 2.0 * m * n * k, peers,
    )  # fmt: skip


def routing_case(machine: Machine, m: int, hidden: int, pools: int, experts: int, top_k: int) -> Case:
    x = torch.randn(m, hidden, device=machine.device).to(torch.bfloat16)
    router = torch.randn(pools, experts, hidden, device=machine.device) * (2 * hidden**-0.5)
    bias = torch.randn(pools, experts, device=machine.device) * 0.01
    types = torch.randint(0, pools, (m,), dtype=torch.int32, device=machine.device)
    tiles = tiled_router(machine, router)
    ids = torch.empty(m, top_k, dtype=torch.int32, device=machine.device)
    weights = torch.empty(m, top_k, dtype=torch.float32, device=machine.device)
    machine.lend_workspace(cuda_ops.routing_workspace_bytes(m, hidden, pools, experts))

    def answers() -> list[Answer]:
        p = torch.einsum("mh,meh->me", x.double(), router.double()[types.long()]).softmax(-1)
        biased = p + bias.double()[types.long()]
        local = ids.long() - types.long()[:, None] * experts
        best = biased.topk(top_k, -1).values  # scores, because near ties may fall either way
        picked = p.gather(1, local.clamp(0, experts - 1))
        return [
            Answer("scores", biased.gather(1, local.clamp(0, experts - 1)), best, 1e-5),
            Answer("weights", weights, picked / picked.sum(-1, keepdim=True), 1e-5),
        ]

    flat = router.reshape(-1, hidden).to(torch.bfloat16)
    return Case(
        "route_experts", f"{m} x {hidden}, {pools} x {experts}",
        lambda: cuda_ops.route_experts(x, tiles, bias, types, top_k, 1e-12, ids, weights), answers,
        4 * router.numel() + 2 * m * hidden, 6.0 * m * router[..., 0].numel() * hidden,
        {"torch bf16 logits": lambda: F.linear(x, flat).softmax(-1).topk(top_k)},
    )  # fmt: skip


@dataclass(frozen=True)
class MoeShape:
    """The routed experts of one layer on one rank."""

    hidden: int
    widths: tuple[int, ...]  # per pool
    experts: int  # per pool
    top_k: int
    kind: WeightKind = "int4"
    group: int = 64
    name: str = ""


def moe_cases(
    machine: Machine, shape: MoeShape, num_tokens: list[int], anchors: dict[int, str]
) -> Iterator[Case]:
    """Text tokens with random experts; the weights are made once."""
    pools = []
    for width in shape.widths:
        up = random_weight(machine, shape.kind, 2 * width, shape.hidden, shape.experts, shape.group)
        down = random_weight(machine, shape.kind, shape.hidden, width, shape.experts, shape.group)
        pools.append((up, down, tiled(machine, up, is_gated=True), tiled(machine, down)))
    for m in num_tokens:
        yield _moe_case(machine, shape, pools, m, anchors.get(m, ""))


def _moe_case(machine: Machine, shape: MoeShape, pools: list, m: int, anchor: str) -> Case:
    h, top_k = shape.hidden, shape.top_k
    x = torch.randn(m, h, device=machine.device).to(torch.bfloat16)
    chosen = torch.rand(m, shape.experts, device=machine.device).topk(top_k).indices
    pool_of = torch.zeros(m, 1, dtype=torch.long, device=machine.device)
    if len(pools) > 1 and m > 1:
        pool_of[m // 2 :] = 1  # a mixed batch
    ids = (chosen + pool_of * shape.experts).to(torch.int32)
    weights = torch.rand(m, top_k, device=machine.device)
    out, packed = machine.empty(m, h), [(up, down) for _, _, up, down in pools]
    num_experts = shape.experts * len(pools)
    machine.lend_workspace(cuda_ops.moe_workspace_bytes(m, h, top_k, max(shape.widths), num_experts))

    def answers() -> list[Answer]:
        expected = torch.zeros(m, h, dtype=torch.float64, device=machine.device)
        for expert in ids.unique().tolist():
            up, down, _, _ = pools[expert // shape.experts]
            one = expert % shape.experts
            token, place = (ids == expert).nonzero(as_tuple=True)
            y = x[token].double() @ dequantised(_matrix(up, one)).T
            gate, lifted = y.chunk(2, -1)
            hidden = (F.silu(gate) * lifted).to(torch.bfloat16).double()
            rows = hidden @ dequantised(_matrix(down, one)).T * weights[token, place].double()[:, None]
            expected.index_add_(0, token, rows)
        return [Answer("out", out, expected, 4 * 2.0**-8)]

    weight_bytes = flops = 0.0
    for i, (width, (_, _, up, down)) in enumerate(zip(shape.widths, pools, strict=True)):
        pairs = ids[ids // shape.experts == i]
        weight_bytes += pairs.unique().numel() * (up.num_bytes + down.num_bytes) / shape.experts
        flops += 6.0 * pairs.numel() * h * width
    return Case(
        f"moe_experts {shape.kind}", f"{m} tokens, {shape.name or h}",
        lambda: cuda_ops.moe_experts(x, ids, weights, packed, out), answers, weight_bytes + 4 * m * h, flops,
        anchor=anchor,
    )  # fmt: skip


def _matrix(weight: cuda_ops.Weight, index: int) -> cuda_ops.Weight:
    scales = None if weight.scales is None else weight.scales[index]
    return cuda_ops.Weight(weight.kind, weight.data[index], scales, weight.group)
