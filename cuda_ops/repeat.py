"""Memory filled with a repeated block: random-looking weights of any size, made where they are to lie."""

from __future__ import annotations

from cuda_ops.library import library
from cuda_ops.tensor import Tensor


def repeat_block(block: Tensor, first_row: int, first_column: int, out: Tensor) -> None:
    """Write block[(first_row + i) % R, (first_column + j) % C] into byte j of row i of out.

    block [R, C] uint8 · out [N, K] int8|uint8|bf16|fp32, whose rows are taken as bytes
    """
    library.repeat_block(block, first_row, first_column, out)
