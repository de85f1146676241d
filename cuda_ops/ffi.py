"""How apache-tvm-ffi is imported: without the frameworks it would pull in.

Where PyTorch is installed, `import tvm_ffi` imports it too: a second and some 250 MB in each rank, for a
shortcut that only PyTorch tensors use. They work without it, through the ordinary DLPack methods.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any


@cache
def import_tvm_ffi() -> Any:
    """The module tvm_ffi; PyTorch is left alone unless it has been imported already."""
    is_hidden = "torch" not in sys.modules
    if is_hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` raise ImportError
    try:
        import tvm_ffi
        import tvm_ffi.libinfo
    finally:
        if is_hidden:
            del sys.modules["torch"]
    return tvm_ffi
