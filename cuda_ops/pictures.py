"""Pictures made ready for the vision tower, on the host: the api's decoding processes call this."""

from __future__ import annotations

from cuda_ops.library import library
from cuda_ops.tensor import Tensor


def resize_patches(pixels: Tensor, rows: int, columns: int, out: Tensor) -> None:
    """Resize by the bicubic filter of Pillow 13, bit for bit, and cut into patches of 14x14 pixels.

    pixels [H, W, 4] uint8, the fourth channel ignored · rows, columns of the new size, multiples of 28
    out [rows/14 * columns/14, 588] uint8: 2x2 windows in raster order, a patch as (channel, y, x)
    """
    library.resize_patches(pixels, rows, columns, out)
