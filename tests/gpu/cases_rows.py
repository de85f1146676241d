"""Cases of the ops that pass once over rows: norms, gating, rope, lookups, pixels, casts, quantising."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import cuda_ops
from tests.gpu.case import Answer, Case
from tests.gpu.machine import Machine

EPS = 1e-5


def row_cases(machine: Machine, m: int, h: int) -> Iterator[Case]:
    """Every such op at `m` rows of `h`, a multiple of 128."""
    yield from _norms(machine, m, h)
    yield from _gates(machine, m, h)
    yield from _lookups(machine, m, h)
    yield _vision_rope(machine, m)
    yield from _quantising(machine, m, h)


def _randn(machine: Machine, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=machine.device).to(torch.bfloat16)


def _norms(machine: Machine, m: int, h: int) -> Iterator[Case]:
    x, residual, weight, bias = (_randn(machine, *shape) for shape in ((m, h), (m, h), (h,), (h,)))
    out, before = machine.empty(m, h), residual.clone()
    wide, row = x.double(), f"{m} x {h}"

    def rms(rows: torch.Tensor) -> torch.Tensor:
        return rows / (rows.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()

    yield Case(
        "rms_norm", row, lambda: cuda_ops.rms_norm(x, weight, EPS, out),
        lambda: [Answer("out", out, rms(wide))], 4 * m * h,
        peers={"torch": lambda: F.rms_norm(x, (h,), weight, EPS)},
    )  # fmt: skip

    def add() -> None:
        residual.copy_(before)
        cuda_ops.add_rms_norm(x, residual, weight, EPS, out)

    summed = (before.float() + x.float()).to(torch.bfloat16).double()

    def plain_add(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return total, F.rms_norm(total, (h,), weight, EPS)

    triton_add = machine.compiled(plain_add)
    yield Case(
        "add_rms_norm", row, lambda: cuda_ops.add_rms_norm(x, residual, weight, EPS, out),
        lambda: (add(), [Answer("residual", residual, summed, 0.0), Answer("out", out, rms(summed))])[1],
        8 * m * h, peers={"torch": lambda: plain_add(x, before), "triton": lambda: triton_add(x, before)},
    )  # fmt: skip
    normal = F.layer_norm(wide, (h,), weight.double(), bias.double(), EPS)
    yield Case(
        "layer_norm", row, lambda: cuda_ops.layer_norm(x, weight, bias, EPS, out),
        lambda: [Answer("out", out, normal)], 4 * m * h,
        peers={"torch": lambda: F.layer_norm(x, (h,), weight, bias, EPS)},
    )  # fmt: skip


def _gates(machine: Machine, m: int, h: int) -> Iterator[Case]:
    x, out = _randn(machine, m, h), machine.empty(m, h // 2)
    gate, up = x.double().chunk(2, -1)
    triton_gate = machine.compiled(lambda x: F.silu(x[:, : h // 2]) * x[:, h // 2 :])
    yield Case(
        "silu_mul", f"{m} x {h // 2}", lambda: cuda_ops.silu_mul(x, out),
        lambda: [Answer("out", out, F.silu(gate) * up)], 3 * m * h,
        peers={"triton": lambda: triton_gate(x)},
    )  # fmt: skip
    bias, y = _randn(machine, h), x.clone()
    shifted = (x.float() + bias.float()).double()

    def answers() -> list[Answer]:
        y.copy_(x)
        cuda_ops.bias_activation(y, bias, "gelu")
        one = Answer("gelu", y.clone(), F.gelu(shifted))
        y.copy_(x)
        cuda_ops.bias_activation(y, bias, "quick_gelu")
        return [one, Answer("quick_gelu", y, shifted * torch.sigmoid(1.702 * shifted))]

    yield Case(
        "bias_activation", f"{m} x {h}", lambda: cuda_ops.bias_activation(y, bias, "gelu"), answers,
        4 * m * h,
        peers={"torch": lambda: F.gelu(x + bias)},
    )  # fmt: skip


def _lookups(machine: Machine, m: int, h: int) -> Iterator[Case]:
    table, out = _randn(machine, 4 * m, h), machine.empty(m, h)
    ids = torch.randint(0, 6 * m, (m,), dtype=torch.int32, device=machine.device)
    local = (ids - m).long()
    found = table.double()[local.clamp(0, 4 * m - 1)] * ((local >= 0) & (local < 4 * m))[:, None]
    yield Case(
        "embed_tokens", f"{m} x {h}", lambda: cuda_ops.embed_tokens(ids, table, m, out),
        lambda: [Answer("out", out, found, 0.0)], 4 * m * h,
        peers={"torch": lambda: F.embedding(local.clamp(0, 4 * m - 1), table)},
    )  # fmt: skip
    rows = torch.randperm(m, device=machine.device)[: m // 2].to(torch.int32)
    source, into = _randn(machine, m // 2, h), torch.zeros(m, h, dtype=torch.bfloat16, device=machine.device)
    placed = torch.zeros(m, h, dtype=torch.float64, device=machine.device)
    placed[rows.long()] = source.double()
    yield Case(
        "scatter_rows", f"{m // 2} x {h}", lambda: cuda_ops.scatter_rows(source, rows, into),
        lambda: [Answer("out", into, placed, 0.0)], 2 * m * h,
        peers={"torch": lambda: into.index_copy_(0, rows.long(), source)},
    )  # fmt: skip
    pixels = torch.randint(0, 256, (m, 588), dtype=torch.uint8, device=machine.device)
    mean, std = (torch.rand(3, device=machine.device) + 0.1 for _ in range(2))
    made = machine.empty(m, 588)
    spread = [x.double().repeat_interleave(196) for x in (mean, std)]
    yield Case(
        "normalize_pixels", f"{m} x 588", lambda: cuda_ops.normalize_pixels(pixels, mean, std, made),
        lambda: [Answer("out", made, (pixels.double() / 255 - spread[0]) / spread[1])], 3 * m * 588,
    )  # fmt: skip
    wide = torch.randn(m, h, device=machine.device)
    yield Case(
        "cast", f"{m} x {h}", lambda: cuda_ops.cast(wide, out),
        lambda: [Answer("out", out, wide.to(torch.bfloat16), 0.0)], 6 * m * h,
        peers={"torch": lambda: wide.to(torch.bfloat16)},
    )  # fmt: skip


def _vision_rope(machine: Machine, patches: int) -> Case:
    heads, hd, theta = 16, 80, 10000.0
    before = _randn(machine, patches, 3, heads, hd)
    qkv, row_col = before.clone(), torch.randint(0, 80, (patches, 2), device=machine.device)
    quarter = hd // 4
    turns = theta ** (-torch.arange(quarter, dtype=torch.float64, device=machine.device) * 4 / hd)
    angles = torch.cat([row_col[:, i : i + 1].double() * turns for i in (0, 1)], -1)[:, None]
    first, second = before.double()[:, :2].split(hd // 2, -1)
    c, s = angles.cos()[:, None], angles.sin()[:, None]
    turned = before.double().clone()
    turned[:, :2] = torch.cat([first * c - second * s, second * c + first * s], -1)
    places = row_col.to(torch.int32)

    def answers() -> list[Answer]:
        qkv.copy_(before)
        cuda_ops.vision_rope(qkv, places, theta)
        return [Answer("qkv", qkv, turned)]

    return Case(
        "vision_rope", f"{patches} x 16 x 80", lambda: cuda_ops.vision_rope(qkv, places, theta), answers,
        8 * patches * heads * hd,
    )  # fmt: skip


def _quantising(machine: Machine, n: int, k: int) -> Iterator[Case]:
    weight = _randn(machine, n, k)
    data = torch.empty(n, k, dtype=torch.int8, device=machine.device)
    scales = machine.empty(n)

    def int8_rule(rows: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = (rows.float().abs().amax(-1, keepdim=True) / limit).to(torch.bfloat16)
        x = rows.float() / scale.float()
        return torch.trunc(x + torch.copysign(torch.tensor(0.5), x)).clamp(-limit, limit), scale

    q, scale = int8_rule(weight, 127)
    yield Case(
        "quantize_int8", f"{n} x {k}", lambda: cuda_ops.quantize_int8(weight, data, scales),
        lambda: [Answer("data", data, q, 0.0), Answer("scales", scales, scale, 0.0)], 3 * n * k,
    )  # fmt: skip
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device=machine.device)
    group_scales = machine.empty(n, k // 64)
    q4, scale4 = int8_rule(weight.reshape(n, k // 64, 64), 7)
    pairs = (q4.reshape(n, k).to(torch.int64) & 15).reshape(n, k // 2, 2)
    nibbles = pairs[..., 0] | pairs[..., 1] << 4
    yield Case(
        "quantize_int4", f"{n} x {k}", lambda: cuda_ops.quantize_int4(weight, 64, packed, group_scales),
        lambda: [Answer("data", packed, nibbles, 0.0), Answer("scales", group_scales, scale4, 0.0)],
        2.5 * n * k,
    )  # fmt: skip
