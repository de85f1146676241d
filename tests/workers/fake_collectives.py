"""What carries data between GPUs, replaced by what takes notes."""

from __future__ import annotations

from typing import Any

from workers.device.nccl import ID_BYTES


class FakeNcclLibrary:
    """What libnccl.so.2 is asked for, as (function, count, type, root or sum)."""

    def __init__(self, answer: int = 0) -> None:
        self.answer, self.calls = answer, []  # type: ignore[var-annotated]

    class ncclGetErrorString:
        restype: Any = None

        def __new__(cls, code: Any) -> Any:
            return b"unhandled system error"

    def ncclGetUniqueId(self, unique: Any) -> int:
        unique._obj.internal = b"the ranks of one server"
        return 0

    def ncclCommInitRank(self, communicator: Any, world: Any, unique: Any, rank: Any) -> int:
        self.calls.append(("join", unique.internal, rank.value, world.value))
        communicator._obj.value = 5
        return self.answer

    def ncclAllReduce(self, x: Any, out: Any, count: Any, dtype: Any, op: Any, comm: Any, stream: Any) -> int:
        assert x.value == out.value and comm.value == 5
        self.calls.append(("sum", count.value, dtype.value, op.value, stream.value))
        return self.answer

    def ncclAllGather(self, x: Any, out: Any, count: Any, dtype: Any, comm: Any, stream: Any) -> int:
        self.calls.append(("gather", count.value, dtype.value, stream.value))
        return self.answer

    def ncclBroadcast(
        self, x: Any, out: Any, count: Any, dtype: Any, root: Any, comm: Any, stream: Any
    ) -> int:
        self.calls.append(("broadcast", count.value, dtype.value, root.value, stream.value))
        return self.answer

    def ncclCommAbort(self, communicator: Any) -> int:
        self.calls.append(("leave", communicator.value))
        return 0


class FakePeers:
    capacity = 64

    def __init__(self) -> None:
        self.sums: list[int] = []
        self.fused: list[tuple[int, float]] = []

    def all_reduce(self, x: Any, out: Any) -> None:
        assert x is out
        self.sums.append(x.shape[0] * x.shape[1])

    def all_reduce_add_rms_norm(self, x: Any, residual: Any, weight: Any, eps: float, out: Any) -> None:
        assert x.shape == residual.shape == out.shape and weight.shape == x.shape[1:]
        self.fused.append((x.shape[0], eps))

    def close(self) -> None:
        self.sums.append(-1)


class LoneHost:
    """The host's group of a rank that is told it is not alone."""

    def broadcast(self, tensor: Any, root: int) -> None:
        assert len(tensor) == ID_BYTES

    def barrier(self) -> None: ...

    def close(self) -> None: ...
