"""Which cases are checked, and which are measured: tiny ones for the emulator, real ones for a GPU.

The geometry that is measured is that of rank 0 of eight of ERNIE-4.5-VL-424B (hidden 8192, 8 of 64 query
heads and one of 8 KV heads of 128, experts 448 and 192 wide), whole heads for the anchors, and the shapes
that others have published figures for (anchors.md of the design, B.2 and B.3).
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.gpu.case import Case
from tests.gpu.cases_attention import Heads, attention_case, kv_write_case, tower_case
from tests.gpu.cases_products import MoeShape, linear_case, moe_cases, routing_case
from tests.gpu.cases_rows import row_cases
from tests.gpu.cases_sampling import sampling_case
from tests.gpu.machine import Machine

RANK = Heads(8, 1, 128)
WHOLE = Heads(64, 8, 128)


def checked_cases(machine: Machine, is_small: bool) -> Iterator[Case]:
    """Every op against float64. Small: within seconds in the emulator and under compute-sanitizer."""
    m, h = (3, 128) if is_small else (37, 4096)
    n, k = (48, 128) if is_small else (1000, 4096)
    yield from row_cases(machine, m, h)
    for kind in ("int4", "int8", "bfloat16"):
        for rows in (1, 9, 33) if is_small else (1, 9, 64, 300):
            yield linear_case(machine, kind, rows, n, k)
        yield linear_case(machine, kind, 2, 96, k, is_gated=True)
    yield routing_case(machine, 5 if is_small else 200, 64 if is_small else 8192, 2, 8 if is_small else 64, 2)
    for kind in ("int4", "int8", "bfloat16"):
        shape = (
            MoeShape(64, (64, 32), 4, 2, kind, 32) if is_small else MoeShape(1024, (448, 192), 64, 8, kind)
        )
        yield from moe_cases(machine, shape, [1, 6] if is_small else [1, 16, 300], {})
    yield from _checked_attention(machine, is_small)
    rows, vocab = (2, 900) if is_small else (64, 103424)
    yield sampling_case(machine, rows, vocab, is_greedy=True, num_top=3)
    yield sampling_case(machine, rows, vocab, is_greedy=False)


def _checked_attention(machine: Machine, is_small: bool) -> Iterator[Case]:
    heads = Heads(4, 2, 32) if is_small else Heads(16, 2, 128)
    mixed = (
        [(1, 70), (20, 20), (1, 1), (3, 300)] if is_small else [(1, 9000), (500, 500), (1, 1), (300, 5000)]
    )
    for is_int8 in (False, True):
        yield kv_write_case(machine, 5 if is_small else 300, heads, is_int8=is_int8)
        yield attention_case(machine, heads, mixed, is_int8=is_int8)
    yield tower_case(machine, [7, 70] if is_small else [300, 4096, 1], heads=2 if is_small else 16)


MOE_424B = MoeShape(8192, (448, 192), 64, 8, name="424B, rank of 8")
MOE_28B = MoeShape(2560, (1536, 512), 64, 6, name="28B, one GPU")
MOE_WIDE = MoeShape(4096, (14336,), 8, 2, name="8 x 4096 x 14336, top 2")
# Marlin-MoE on H20 (4.0 TB/s): anchors.md B.2
_WIDE_ANCHORS = {1: "Marlin-MoE on H20: 142 us", 64: "Marlin-MoE on H20: 1,207 us"}


def measured_cases(machine: Machine, is_small: bool) -> Iterator[Case]:
    """Every op that matters at the shapes of a step."""
    if is_small:  # the same calls at sizes for the emulator
        yield from moe_cases(
            machine, MoeShape(64, (64, 32), 4, 2, group=32, name="tiny"), [1, 3], {1: "an anchor"}
        )
        yield attention_case(machine, Heads(8, 1, 32), [(1, 70)] * 2, is_int8=True)
        yield attention_case(machine, Heads(4, 1, 64), [(20, 20)])
        yield from row_cases(machine, 2, 128)
        return
    for shape, anchors in ((MOE_424B, {}), (MOE_28B, {}), (MOE_WIDE, _WIDE_ANCHORS)):
        yield from moe_cases(machine, shape, [1, 4, 16, 64, 256, 2048], anchors)
    for m in (1, 16, 64, 2048):
        yield linear_case(machine, "int8", m, 10 * 128, 8192)  # qkv of a rank
        yield linear_case(machine, "int8", m, 8192, 1024)  # o_proj of a rank
        yield linear_case(machine, "int8", m, 2 * 3584, 8192, is_gated=True)  # a dense layer of a rank
        yield linear_case(machine, "int4", m, 8192, 8192)
        yield linear_case(machine, "bfloat16", m, 12928, 8192)  # head of a rank
        yield routing_case(machine, m, 8192, 2, 64, 8)
    yield from _measured_attention(machine)
    for m in (1, 64, 2048):
        yield from row_cases(machine, m, 8192)
    yield sampling_case(machine, 64, 103424, is_greedy=True)
    yield sampling_case(machine, 64, 103424, is_greedy=False)


def _measured_attention(machine: Machine) -> Iterator[Case]:
    hpc = "HPC-Ops FP8 on H20: {} ms"
    for heads, sequences, length, anchor in (
        (WHOLE, 64, 512, hpc.format(0.013)),
        (WHOLE, 64, 4096, hpc.format(0.033) + "; bf16 0.299 ms"),
        (RANK, 64, 4096, ""),
        (RANK, 16, 32768, ""),
        (RANK, 1, 131072, ""),
        (RANK, 4, 131072, ""),
    ):
        for is_int8 in (False, True):
            yield attention_case(machine, heads, [(1, length)] * sequences, is_int8=is_int8, anchor=anchor)
    mixed = [(1, 131072)] + [(1, 4096)] * 31
    yield attention_case(machine, WHOLE, mixed, anchor=hpc.format(0.063))
    yield attention_case(machine, WHOLE, [(8192, 8192)], anchor="HPC-Ops on H20: 7.88 ms")
    yield attention_case(machine, RANK, [(2048, 32768)])
    yield attention_case(machine, RANK, [(2048, 2048)], is_int8=True)
    for is_int8 in (False, True):
        yield kv_write_case(machine, 64, RANK, is_int8=is_int8)
    yield tower_case(machine, [4096])
    yield tower_case(machine, [1024] * 16)
