"""What the workers ask of a tensor framework (design D1); the implementations are beside this file.

The model runs on cuda_ops, which takes any DLPack tensor. What is left for a framework is small: memory,
copies, the plain bf16 matmul on a GPU, collectives. Whoever adds a framework implements `Device` and
nothing else; host.py and gpu.py hold what the frameworks have in common.

Everything is issued in order, and the next call sees what the one before has done. On the CPU a call returns
when it is done. On a GPU it returns when it is queued: only `download`, `Download.result` and `synchronize`
wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from cuda_ops import TiledWeight, Weight

# A framework tensor. The workers use only: .shape, DLPack, and slices of the first axis (`t[a:b]`), which
# are contiguous and share memory with `t`.
Tensor = Any

DtypeName = Literal["float32", "bfloat16", "int8", "uint8", "int32", "int64"]
Activation = Literal["none", "gelu", "quick_gelu"]

BYTES_PER_ELEMENT: dict[str, int] = {
    "float32": 4,
    "bfloat16": 2,
    "int8": 1,
    "uint8": 1,
    "int32": 4,
    "int64": 8,
}


class Group(Protocol):
    """The collectives of one rank among `world` ranks; every rank makes the same calls in the same order.

    Sums are taken in rank order in fp32, so their bits never vary. A rank that does not come raises an
    error that names it after the group's timeout.
    """

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` (fp32 or bf16, any shape) on each rank by the sum over the ranks."""

    def all_gather(self, tensor: Tensor, out: Tensor) -> None:
        """Write every rank's `tensor` [...] into `out` [world, ...] on every rank."""

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Overwrite `tensor` on each rank by rank `root`'s."""

    def barrier(self) -> None:
        """Return once every rank has called."""

    def close(self) -> None: ...


class Download(Protocol):
    """A copy on its way to the host."""

    def is_done(self) -> bool:
        """Whether `result` returns at once."""

    def result(self) -> np.ndarray:
        """The array, once it is there; to be asked for once."""


class HostStore(Protocol):
    """Host memory for what is on the device, bit for bit; copies follow what was issued before them."""

    def save(self, tensor: Tensor, place: int) -> None:
        """Copy a contiguous tensor to the bytes from `place` on; what is issued next may overwrite it."""

    def load(self, tensor: Tensor, place: int) -> None:
        """Overwrite a contiguous tensor with the bytes from `place` on."""


class Graph(Protocol):
    """Work that was recorded once; it reads and writes the very tensors that were named then."""

    def replay(self) -> None:
        """Issue all of it again."""


class Device(Protocol):
    """Memory, copies, matmul and collectives of one rank."""

    name: str  # for logs and RankLoaded: "cpu", "gpu:0 NVIDIA H800"
    is_gpu: bool
    can_record: bool  # whether decode steps are to be recorded before the first one comes
    rank: int
    world: int
    # A rank that computes more slowly than this many operations per second counts as stuck; far below what
    # the slowest supported machine does with all its ranks busy.
    slowest_flops: float

    def enter_thread(self) -> None:
        """The calling thread is going to call ops. Methods that take or give arrays call this themselves."""

    # memory and copies ------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: DtypeName) -> Tensor:
        """A contiguous tensor with arbitrary content (NaN included)."""

    def zeros(self, shape: Sequence[int], dtype: DtypeName) -> Tensor: ...

    def upload(self, array: np.ndarray, dtype: DtypeName | None = None) -> Tensor:
        """A contiguous copy of `array` on the device, of the array's dtype unless `dtype` is given.

        "bfloat16" takes uint16 arrays as raw bits (NumPy has no bf16) and rounds fp32 arrays to nearest
        even. No other conversion happens: a dtype that differs from the array's raises TypeError.
        """

    def upload_all(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        """`upload` of several int32 arrays, which travel together where that is cheaper.

        The tensors may be those of the call before, overwritten: what follows a call needs only its own.
        """

    def upload_again(self, name: str, array: np.ndarray) -> Tensor:
        """`upload` of what every step has under this name, perhaps over the tensor of the step before."""

    def write(self, tensor: Tensor, array: np.ndarray) -> None:
        """Overwrite `tensor`, contiguous and of the array's shape, in place; converts as `upload` does.

        The loader fills one expert of a stack with it: `tensor` may be a slice of something larger.
        """

    def write_corner(self, tensor: Tensor, array: np.ndarray) -> None:
        """tensor [R, C] int32: overwrite its first rows and columns with `array` [r, c], not empty.

        GPU only.
        """

    def download(self, tensor: Tensor) -> np.ndarray:
        """A copy on the host; bf16 comes back as fp32, which holds every bf16 value exactly."""

    def download_later(self, tensor: Tensor) -> Download:
        """Start `download` and return; the tensor may be overwritten by what is issued next."""

    def host_bits(self, tensor: Tensor) -> np.ndarray:
        """The bits of a contiguous tensor on the host, bf16 as uint16.

        On the CPU the same memory: valid as long as the tensor is.
        """

    def adopt(self, array: np.ndarray, dtype: DtypeName) -> Tensor:
        """A tensor of `array`, bf16 given as uint16: its own memory on the CPU, a copy elsewhere.

        The array must be contiguous, aligned to 64 bytes and writable; the tensor keeps it alive.
        """

    def host_store(self, num_bytes: int) -> HostStore:
        """Memory that lasts as long as the device; pinned on a GPU, where nobody waits for its copies."""

    def view(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """The same memory under another shape with as many elements."""

    def lend_scratch(self, num_bytes: int) -> None:
        """Memory that the ops of this thread share while they run, from now on; the CPU's need none."""

    def free_memory(self) -> int:
        """Bytes that can still be allocated: host memory for the CPU, device memory for a GPU."""

    def total_memory(self) -> int:
        """Bytes this device has in all, or the container's limit where that is lower."""

    # arithmetic that is not an op of ours ---------------------------------------------------------------

    def linear(
        self,
        x: Tensor,
        weight: Weight | TiledWeight,
        out: Tensor,
        bias: Tensor | None = None,
        activation: Activation = "none",
    ) -> None:
        """out [M, N] = activation(x [M, K] @ weight [N, K]^T + bias [N]), as cuda_ops.linear.

        A hook, because on a GPU the framework multiplies by weights that are not tiled.
        """

    def add(self, x: Tensor, y: Tensor) -> None:
        """x += y, element by element, rounded once to their common dtype."""

    # recorded work ------------------------------------------------------------------------------------

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` issues, which a GPU does not do now and a CPU does.

        `work` may neither upload, download nor wait, and must have run before, so that all memory it takes
        is there. A CPU records calls of ops alone, so not what ranks do together.
        """

    # collectives: see Group; with one rank they do nothing (all_gather copies) ----------------------------

    def all_reduce(self, tensor: Tensor) -> None: ...

    def all_reduce_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        """residual [M, H] += the ranks' sum of x, out = rms_norm(residual) * weight [H]; x is lost.

        The same bits as `all_reduce` and cuda_ops.add_rms_norm, at once where the device can.
        """

    def all_gather(self, tensor: Tensor, out: Tensor) -> None: ...

    def broadcast(self, tensor: Tensor, root: int) -> None: ...

    def barrier(self) -> None: ...

    def synchronize(self) -> None:
        """Return once everything issued so far is done (a no-op on the CPU)."""

    def close(self) -> None:
        """Leave the group; the device is not used afterwards."""
