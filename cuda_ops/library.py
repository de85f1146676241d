"""The compiled library, loaded at the first call of any op.

Importing cuda_ops costs nothing: `library.rms_norm` finds, and if need be builds, the shared library when
it is first looked up. build.py decides which library.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from cuda_ops.ffi import import_tvm_ffi


class Library:
    """Attributes are the exported functions of csrc/boundary."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(_module(), name)
        setattr(self, name, function)  # the next look-up does not come here
        return function  # type: ignore[no-any-return]


@cache
def _module() -> Any:
    from cuda_ops import build
    from cuda_ops.device_library import device_library

    module = import_tvm_ffi().load_module(str(build.library_path()))
    module.set_device_library(device_library.find)  # asked when a tensor on a GPU comes
    return module


library = Library()
