"""A weight matrix in one of four formats, as the linear and expert ops take it.

The numbers mean the same everywhere: `W = q * scale`. How to make int8 and int4 ones is in quantize.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from cuda_ops.tensor import Tensor

WeightKind = Literal["float32", "bfloat16", "int8", "int4"]

KIND_INDEX: dict[str, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
_PACKED_INDEX = 16  # added to the kind of a packed weight
_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 1}  # per element of data


@dataclass(frozen=True)
class Weight:
    """`[..., out_features, in_features]`, rows contiguous along in_features.

    data    fp32, bf16 or int8 `[..., N, K]`; int4: uint8 `[..., N, K/2]`, two's complement nibbles, low
            nibble = even k
    scales  bf16; int8 `[..., N]`, int4 `[..., N, K/group]`; None for the plain kinds
    group   columns that share an int4 scale; 0 for the other kinds
    is_packed  the bytes lie in the order of pack.py, not in rows; bf16 activations only
    """

    kind: WeightKind
    data: Tensor
    scales: Tensor | None = None
    group: int = 0
    is_packed: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KIND_INDEX:
            raise ValueError(f"Weight.kind is {self.kind!r}; it must be one of {', '.join(KIND_INDEX)}")

    @cached_property
    def out_features(self) -> int:
        return int(self.data.shape[-2])

    @cached_property
    def in_features(self) -> int:
        return int(self.data.shape[-1]) * (2 if self.kind == "int4" else 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of data and scales together."""
        scales = 0 if self.scales is None else 2 * math.prod(self.scales.shape)
        return int(_BYTES[self.kind] * math.prod(self.data.shape) + scales)

    @cached_property
    def arguments(self) -> tuple[int, Any, Any, int]:
        """What the compiled ops take for a weight: kind index, data, scales, group."""
        index = KIND_INDEX[self.kind] + (_PACKED_INDEX if self.is_packed else 0)
        return index, self.data, self.scales, self.group
