"""Quantised weights in the order in which the CPU multiplies them, in the memory they have.

Sixteen rows lie side by side, 32 bits of each in turn, so that a thread reads a weight as one stream:
csrc/cpu/int8_panels.h. The products have the same bits as those of the row-major weight.
"""

from __future__ import annotations

from dataclasses import replace

from cuda_ops.library import library
from cuda_ops.weight import Weight, WeightKind


def can_pack(kind: WeightKind, out_features: int, in_features: int, group: int = 0) -> bool:
    """Whether such a weight has a packed form: int8 [32 n, 64 k], int4 [32 n, K] in groups of 32 k."""
    if out_features % 32:
        return False
    return in_features % 64 == 0 if kind == "int8" else kind == "int4" and group % 32 == 0


def pack_panels(weight: Weight) -> Weight:
    """Reorder a row-major weight [..., N, K] in place, data and scales; returns it marked as packed.

    Only bf16 activations meet it afterwards. Raises ValueError where `can_pack` is False.
    """
    library.pack_panels(*weight.arguments)
    return replace(weight, is_packed=True)
