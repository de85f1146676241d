"""What every op accepts as a tensor."""

from __future__ import annotations

from typing import Any, Protocol


class Tensor(Protocol):
    """Anything with DLPack (Paddle, NumPy, PyTorch): contiguous, writable, on the CPU."""

    @property
    def shape(self) -> Any: ...

    def __dlpack__(self) -> Any: ...
