"""Every op, by name: the table of contents of this folder.

Importing this is cheap; the first call of an op loads the compiled library, and builds it where this machine
has none yet. Outputs are given by the caller and written in full; ids and lengths are int32 unless stated.
"""

from cuda_ops.linear import cast, linear
from cuda_ops.norms import add_rms_norm, layer_norm, rms_norm, silu_mul
from cuda_ops.weight import Weight

__all__ = [
    "Weight",
    "add_rms_norm",
    "cast",
    "layer_norm",
    "linear",
    "rms_norm",
    "silu_mul",
]
