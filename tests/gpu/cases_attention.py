"""Cases of attention: the KV write, decode and prefill over both kinds of cache, and the vision tower's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import cuda_ops
from tests.gpu.case import Answer, Case
from tests.gpu.machine import Machine, Work

BLOCK = 64


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    dim: int


class PagedBatch:
    """Sequences of (num_queries, kv_len) with random queries, keys and values in blocks of random place."""

    def __init__(
        self, machine: Machine, heads: Heads, lens: Sequence[tuple[int, int]], is_int8: bool
    ) -> None:
        self.heads, self.lens, self.is_int8, device = heads, lens, is_int8, machine.device
        sizes = [-(-length // BLOCK) for _, length in lens]
        order = torch.randperm(sum(sizes), device=device).to(torch.int32)
        self.tables = torch.zeros(len(lens), max(sizes), dtype=torch.int32, device=device)
        for row, part in enumerate(order.split(sizes)):
            self.tables[row, : len(part)] = part
        queries = torch.tensor([0] + [n for n, _ in lens]).cumsum(0)
        self.starts = queries.to(device, torch.int32)
        self.kv_lens = torch.tensor([length for _, length in lens], dtype=torch.int32, device=device)
        self.q = torch.randn(int(queries[-1]), heads.query, heads.dim, device=device).to(torch.bfloat16)
        shape = (sum(sizes), heads.kv, BLOCK, heads.dim)
        self.scales: tuple[torch.Tensor, ...] = ()
        if is_int8:
            self.caches = [torch.randint(-127, 128, shape, dtype=torch.int8, device=device) for _ in range(2)]
            self.scales = tuple(
                (torch.rand(shape[:3], device=device) / 80 + 1e-3).to(torch.bfloat16) for _ in range(2)
            )
        else:
            self.caches = [
                torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for _ in range(2)
            ]
        self.out = machine.empty(len(self.q), heads.query * heads.dim)
        tasks = cuda_ops.attention_tasks(lens, heads.query // heads.kv)
        size = cuda_ops.attention_plan_bytes(*tasks, len(lens), heads.kv, heads.dim)
        memory = torch.empty(size + 256, dtype=torch.uint8, device=device)
        memory = memory[-memory.data_ptr() % 256 :][:size]
        self.plan = cuda_ops.AttentionPlan(memory, *tasks)
        self.make_plan()

    def make_plan(self) -> None:
        heads = self.heads
        cuda_ops.plan_attention(
            self.plan, self.tables, self.starts, self.kv_lens, heads.query, heads.kv, heads.dim, BLOCK
        )

    def run(self) -> None:
        cuda_ops.paged_attention(
            self.q, *self.caches, self.tables, self.starts, self.kv_lens, self.heads.dim**-0.5, self.out,
            self.plan, *self.scales,
        )  # fmt: skip

    def kv_of(self, row: int) -> list[torch.Tensor]:
        """[len, query heads, dim] float64 keys and values of a sequence."""
        blocks, length = self.tables[row].long(), self.lens[row][1]
        found = []
        for i, cache in enumerate(self.caches):
            rows = cache[blocks].double()
            if self.scales:
                rows = rows * self.scales[i][blocks].double()[..., None]
            rows = rows.transpose(1, 2).reshape(-1, self.heads.kv, self.heads.dim)[:length]
            found.append(rows.repeat_interleave(self.heads.query // self.heads.kv, 1))
        return found

    def expected(self) -> torch.Tensor:
        rows = []
        for row, (n, length) in enumerate(self.lens):
            begin = int(self.starts[row])
            q, (k, v) = self.q[begin : begin + n].double(), self.kv_of(row)
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.heads.dim**-0.5
            seen = (
                torch.arange(length, device=q.device)
                <= torch.arange(length - n, length, device=q.device)[:, None]
            )
            p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            rows.append(torch.einsum("hqk,khd->qhd", p, v).reshape(n, -1))
        return torch.cat(rows)


def attention_case(
    machine: Machine,
    heads: Heads,
    lens: Sequence[tuple[int, int]],
    *,
    is_int8: bool = False,
    anchor: str = "",
) -> Case:
    """paged_attention alone; its plan is made once, as for all layers of a step."""
    batch = PagedBatch(machine, heads, lens, is_int8)
    per_token = 2 * heads.kv * (heads.dim + 2 if is_int8 else 2 * heads.dim)
    pairs = sum(n * (length - n) + n * (n + 1) / 2 for n, length in lens)
    kind = "int8" if is_int8 else "bf16"
    what = "decode" if all(n == 1 for n, _ in lens) else "prefill"
    sizes = ", ".join(f"{n} of {length}" for n, length in dict.fromkeys(lens))
    peers: dict[str, Work] = {}
    if what == "decode" and not is_int8 and len(set(lens)) == 1:
        peers["torch sdpa"] = _contiguous_decode(machine, heads, len(lens), lens[0][1])
    if what == "prefill" and not is_int8 and len(lens) == 1 and lens[0][0] == lens[0][1]:
        q, k, v = (
            torch.randn(1, h, lens[0][0], heads.dim, device=machine.device).to(torch.bfloat16)
            for h in (heads.query, heads.kv, heads.kv)
        )
        peers["torch sdpa"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return Case(
        f"{what} attention {kind}", f"{heads.query}/{heads.kv}/{heads.dim}, {len(lens)} x ({sizes})",
        batch.run, lambda: [Answer("out", batch.out, batch.expected(), 2.0**-6)],
        per_token * sum(length for _, length in lens) + 4 * batch.q.numel(),
        4.0 * heads.query * heads.dim * pairs, peers, anchor,
    )  # fmt: skip


def _contiguous_decode(machine: Machine, heads: Heads, sequences: int, length: int) -> Work:
    """The same products without pages."""
    q, k, v = (
        torch.empty(sequences, h, n, heads.dim, dtype=torch.bfloat16, device=machine.device).normal_()
        for h, n in ((heads.query, 1), (heads.kv, length), (heads.kv, length))
    )
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def kv_write_case(machine: Machine, m: int, heads: Heads, *, is_int8: bool) -> Case:
    hd, device = heads.dim, machine.device
    positions = torch.randint(0, 1000, (3, m), dtype=torch.int32, device=device)
    axis = torch.randint(0, 3, (hd // 2,), dtype=torch.int32, device=device)
    inv_freq = 500000.0 ** (-torch.arange(hd // 2, device=device) / (hd // 2))
    cos_sin = machine.empty(m, hd // 2, 2, dtype=torch.float32)
    cuda_ops.rope_angles(positions, axis, inv_freq, cos_sin)
    qkv = torch.randn(m, (heads.query + 2 * heads.kv) * hd, device=device).to(torch.bfloat16)
    blocks = -(-m // BLOCK) + 1
    slots = torch.randperm(blocks * BLOCK, device=device)[:m].to(torch.int32)
    kind = torch.int8 if is_int8 else torch.bfloat16
    caches = [torch.zeros(blocks, heads.kv, BLOCK, hd, dtype=kind, device=device) for _ in range(2)]
    scales = [machine.empty(blocks, heads.kv, BLOCK) for _ in range(2)] if is_int8 else []
    q_out = machine.empty(m, heads.query, hd)

    def answers() -> list[Answer]:
        angles = (positions.long()[axis.long()].T.float() * inv_freq).double()[:, None]
        rows = qkv.double().reshape(m, -1, hd)
        even, odd, c, s = rows[..., 0::2], rows[..., 1::2], angles.cos(), angles.sin()
        turned = torch.stack([even * c - odd * s, odd * c + even * s], -1).reshape(rows.shape)
        k, v = turned[:, heads.query : -heads.kv], rows[:, -heads.kv :]
        block, offset = slots.long() // BLOCK, slots.long() % BLOCK
        kept = [cache[block, :, offset].double() for cache in caches]
        tolerance = 2 * 2.0**-8
        if is_int8:
            kept = [
                q * scale[block, :, offset].double()[..., None] for q, scale in zip(kept, scales, strict=True)
            ]
            tolerance = 1.1 / 127
        return [
            Answer("q", q_out, turned[:, : heads.query]),
            Answer("k", kept[0], k, tolerance),
            Answer("v", kept[1], v, tolerance),
        ]

    return Case(
        f"rope_write_kv {'int8' if is_int8 else 'bf16'}", f"{m} x {heads.query}/{heads.kv}/{hd}",
        lambda: cuda_ops.rope_write_kv(qkv, cos_sin, slots, *caches, q_out, *scales), answers,
        qkv.numel() * 2 + q_out.numel() * 2 + 2 * m * heads.kv * hd * (1 if is_int8 else 2) + 4 * m * hd,
    )  # fmt: skip


def tower_case(machine: Machine, segments: Sequence[int], heads: int = 16, dim: int = 80) -> Case:
    starts = torch.tensor([0, *segments]).cumsum(0).to(machine.device, torch.int32)
    p = sum(segments)
    qkv = torch.randn(p, 3, heads, dim, device=machine.device).to(torch.bfloat16)
    out = machine.empty(p, heads * dim)

    def answers() -> list[Answer]:
        parts = [part.double().transpose(0, 2) for part in qkv.split(list(segments))]  # [heads, 3, n, dim]
        seen = [F.scaled_dot_product_attention(part[:, 0], part[:, 1], part[:, 2]) for part in parts]
        return [
            Answer(
                "out", out, torch.cat([one.transpose(0, 1).reshape(-1, heads * dim) for one in seen]), 2.0**-6
            )
        ]

    q, k, v = (qkv[: segments[0], i].transpose(0, 1)[None].contiguous() for i in range(3))
    return Case(
        "segment_attention", f"{len(segments)} x {segments[0]}, {heads} x {dim}",
        lambda: cuda_ops.segment_attention(qkv, starts, dim**-0.5, out), answers,
        2 * qkv.numel() + 2 * out.numel(),
        4.0 * heads * dim * sum(n * n for n in segments),
        {"torch sdpa": lambda: F.scaled_dot_product_attention(q, k, v)} if len(segments) == 1 else {},
    )  # fmt: skip
