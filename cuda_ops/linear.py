"""Matrix products with every weight format, and conversion between activation types."""

from __future__ import annotations

from typing import Literal

from cuda_ops.device_library import device_library
from cuda_ops.library import library
from cuda_ops.tensor import Tensor
from cuda_ops.tiled_weight import TiledWeight
from cuda_ops.weight import Weight

Activation = Literal["none", "gelu", "quick_gelu"]

_ACTIVATION_INDEX = {"none": 0, "gelu": 1, "quick_gelu": 2}


def linear(
    x: Tensor,
    weight: Weight | TiledWeight,
    out: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "none",
) -> None:
    """Write activation(x @ W^T + bias) into out.

    x [M, K] fp32|bf16 · weight [N, K] · out [M, N] fp32|bf16, any mixture · bias [N] fp32|bf16
    gelu is the exact (erf) one, quick_gelu is x * sigmoid(1.702 x). fp32 sums, one rounding at the end; the
    bits of a row depend on its x, K and the instruction set alone.
    fp32 x: a quantised weight gives the bits of its dequantised fp32 matrix. bf16 x on a CPU: x meets int8
    and int4 weights as int8 with a scale per 64 columns (32 where int4 groups are no multiple of 64), each
    element off by at most max|x| / 254 of its columns; int4 groups that 32 does not divide are exact.
    On a GPU: x and bias bf16, weight tiled; a gated one writes silu(gate) * up, out [M, N/2]. bf16 weights
    are better served by the framework's product, followed by bias_activation.
    """
    if isinstance(weight, TiledWeight):
        device_library.linear_tiled(x, *weight.arguments, out, bias, _ACTIVATION_INDEX[activation])
    else:
        library.linear(x, *weight.arguments, out, bias, _ACTIVATION_INDEX[activation])


def bias_activation(x: Tensor, bias: Tensor | None, activation: Activation) -> None:
    """x = activation(x + bias) in place, on a GPU: what follows a product of the framework.

    x [M, N] fp32|bf16 · bias [N] of x's type
    """
    device_library.bias_activation(x, bias, _ACTIVATION_INDEX[activation])


def cast(x: Tensor, out: Tensor) -> None:
    """Copy x into out of the same shape, converting fp32 <-> bf16 (to nearest, ties to even)."""
    library.cast(x, out)


def add(x: Tensor, y: Tensor) -> None:
    """x += y, element by element: fp32|bf16 of one type and size on the CPU, rounded once."""
    library.add(x, y)
