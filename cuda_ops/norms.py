"""Row norms and the gated activation. Statistics in fp32, one rounding at the end."""

from __future__ import annotations

from cuda_ops.library import library
from cuda_ops.tensor import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """Divide each row of x by its root mean square, then scale by weight.

    x, out [M, H] fp32|bf16 · weight [H]; all of one type · out may be x
    """
    library.rms_norm(x, weight, eps, out)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """Add x to residual in place (rounded to its type), then write rms_norm(residual) into out.

    x, residual, out [M, H] fp32|bf16 · weight [H]; all of one type · out may be x
    """
    library.add_rms_norm(x, residual, weight, eps, out)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None:
    """Centre each row of x, divide by its standard deviation, scale by weight and add bias.

    x, out [M, H] fp32|bf16 · weight, bias [H]; all of one type · out may be x
    """
    library.layer_norm(x, weight, bias, eps, out)


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """Write silu(gate) * up into out, where each row of gate_up is gate then up.

    gate_up [M, 2 * width] fp32|bf16 · out [M, width] of the same type
    """
    library.silu_mul(gate_up, out)
