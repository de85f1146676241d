"""The compiled library, loaded at the first call of any op.

Importing cuda_ops costs nothing: `library.rms_norm` finds, and if need be builds, the shared library when
it is first looked up. build.py decides which library.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from threading import get_ident
from typing import Any

from cuda_ops.ffi import import_tvm_ffi


class Library:
    """Attributes are the exported functions of csrc/boundary."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(_module(), name)
        setattr(self, name, function)  # the next look-up does not come here
        return function  # type: ignore[no-any-return]

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do `work`; returns a function that makes the calls of ops again which this thread made in it.

        The ops must have been called before. The function keeps the memory of the tensors that they were
        given, and takes them as the library knows them: it converts nothing.
        """
        calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        thread, functions = get_ident(), dict(vars(self))

        def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                if get_ident() == thread:
                    calls.append((function, arguments))
                return function(*arguments)

            return call

        vars(self).update({name: recorded(function) for name, function in functions.items()})
        try:
            work()
        finally:
            missed = vars(self).keys() - functions.keys()
            vars(self).update(functions)
        if missed:
            raise RuntimeError(f"{', '.join(missed)} had never been called before it was to be recorded")
        return _join(calls)


def _join(calls: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> Callable[[], None]:
    convert = import_tvm_ffi().convert
    given = {id(argument): argument for _, arguments in calls for argument in arguments}
    converted = {key: convert(argument) for key, argument in given.items()}  # each once
    ready = [[function, *(converted[id(one)] for one in arguments)] for function, arguments in calls]
    return _module().make_recording(ready)  # type: ignore[no-any-return]


@cache
def _module() -> Any:
    from cuda_ops import build
    from cuda_ops.device_library import device_library

    module = import_tvm_ffi().load_module(str(build.library_path()))
    module.set_device_library(device_library.find)  # asked when a tensor on a GPU comes
    return module


library = Library()
