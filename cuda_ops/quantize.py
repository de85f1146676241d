"""Weight matrices made int8 or int4, symmetric, for Weight(kind="int8") and Weight(kind="int4")."""

from __future__ import annotations

from cuda_ops.library import library
from cuda_ops.tensor import Tensor


def quantize_int8(weight: Tensor, data: Tensor, scales: Tensor) -> None:
    """Quantise each row of weight to its own scale, bf16(max|w| / 127).

    weight [N, K] fp32|bf16 · data [N, K] int8 · scales [N] bf16
    The scale is rounded to bf16 first; q = round half away(w / scale), clipped to +-127. A zero row gets
    scale 1.
    """
    library.quantize_int8(weight, data, scales)


def quantize_int4(weight: Tensor, group: int, data: Tensor, scales: Tensor) -> None:
    """Quantise every `group` columns of each row to their own scale, bf16(max|w| / 7).

    weight [N, K] fp32|bf16 · group even, a divisor of K · data [N, K/2] uint8, two's complement nibbles, low
    nibble = even column · scales [N, K/group] bf16. Rounding as in quantize_int8, clipped to +-7.
    """
    library.quantize_int4(weight, group, data, scales)
