"""A way to stand around every call of an op: to find out which one failed, or to record what is called."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cuda_ops.device_library import device_library
from cuda_ops.library import library
from engine.errors import EngineError

Op = Callable[..., Any]
_PEER_SETTINGS = ("peers_create", "peers_open", "peers_close")
Around = Callable[[str, Op], Op]


@contextmanager
def watched_ops(around: Around) -> Iterator[None]:
    """Inside the block each op that is called is `around(its name, the op)` instead.

    Functions that queue nothing on the device, such as those that tell sizes, stay as they are.
    """
    with _watched(library, around), _watched(device_library, around):
        yield


@contextmanager
def _watched(functions: Any, around: Around) -> Iterator[None]:
    """`functions` finds its attributes when they are first used, and keeps them as they are here."""
    plain: type = type(functions)

    class Watched(plain):  # type: ignore[misc]
        def __getattr__(self, name: str) -> Op:
            op = super().__getattr__(name)
            watched = op if _is_host_work(name) else around(name, op)
            setattr(self, name, watched)
            return watched

    _forget(functions)
    functions.__class__ = Watched
    try:
        yield
    finally:
        functions.__class__ = plain
        _forget(functions)


def _is_host_work(name: str) -> bool:
    is_setting = name.startswith(("group_", "set_", "emulate_")) or name in _PEER_SETTINGS
    return is_setting or name.endswith(("_bytes", "_parts"))


def _forget(functions: Any) -> None:
    for name in [name for name, value in vars(functions).items() if callable(value)]:
        delattr(functions, name)


def wants_checked_ops() -> bool:
    """Whether OCTET_CHECK_OPS=1 asks to wait for every op, which is slow and names the one that fails."""
    return os.environ.get("OCTET_CHECK_OPS") == "1"


def checked(wait: Callable[[], None]) -> Around:
    """For watched_ops: call `wait` after each op, and put the op's name before what that raises."""

    def around(name: str, op: Op) -> Op:
        def call(*arguments: Any) -> Any:
            answer = op(*arguments)
            try:
                wait()
            except EngineError as error:
                raise EngineError(f"the op {name} failed: {error}") from error
            return answer

        return call

    return around
