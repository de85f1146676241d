"""Where weights come from: a checkpoint, or a pattern that stands in for one (`--load-format dummy`).

A source fills final buffers part by part, quantising each matrix as soon as it is read, so the host
never holds more than one matrix in its original type. What to fill is decided in loader.py.
"""

from __future__ import annotations

import threading
import zlib
from typing import Protocol

import msgspec
import numpy as np

import cuda_ops
from cuda_ops import Weight
from cuda_ops.repeat import repeat_block
from engine.model_config import ModelConfig
from workers.checkpoint import Checkpoint
from workers.checkpoint_inventory import LogicalTensor, Role
from workers.device.base import BYTES_PER_ELEMENT, Device, DtypeName, Tensor
from workers.device.bfloat16 import bits_from_float32, float32_from_bits
from workers.shards import Part


class WeightSource(Protocol):
    """`model` is the configuration with tying and shared experts decided."""

    model: ModelConfig

    def num_bytes(self, tensor: LogicalTensor, part: Part) -> int:
        """What `fill` or `values` of this part takes, in the unit of the progress callback."""

    def announce(self, tensor: LogicalTensor, part: Part) -> None:
        """`fill` of this part comes soon: a disk may begin to read."""

    def fill(self, tensor: LogicalTensor, part: Part, weight: Weight) -> None:
        """Write a matrix into `weight`, whose data and scales have the part's [N, K]."""

    def values(self, tensor: LogicalTensor, part: Part) -> np.ndarray:
        """A tensor that is never quantised: fp32, or uint16 bits of bf16."""

    def close(self) -> None: ...


class CheckpointSource:
    """Weights of a checkpoint folder."""

    def __init__(self, checkpoint: Checkpoint, device: Device) -> None:
        self.model = checkpoint.model
        self._checkpoint = checkpoint
        self._device = device

    def num_bytes(self, tensor: LogicalTensor, part: Part) -> int:
        return self._checkpoint.num_bytes(tensor, part)

    def announce(self, tensor: LogicalTensor, part: Part) -> None:
        self._checkpoint.will_read(tensor)

    def fill(self, tensor: LogicalTensor, part: Part, weight: Weight) -> None:
        if self._checkpoint.packed(tensor):
            self._fill_quantised(tensor, part, weight)
            return
        values = self._checkpoint.read(tensor, part)
        if weight.kind in ("float32", "bfloat16"):
            write(self._device, weight.data, values, weight.kind)
            return
        matrix = self._device.upload(values, "bfloat16" if values.dtype == np.uint16 else "float32")
        quantise(matrix, weight)

    def _fill_quantised(self, tensor: LogicalTensor, part: Part, weight: Weight) -> None:
        """Integers as they are stored; a scale per output stands for each of its groups."""
        integers, scales = self._checkpoint.read_quantised(tensor, part)
        assert weight.scales is not None
        self._device.write(weight.data, integers.view(np.int8) if weight.kind == "int8" else integers)
        num_groups = part.shape[1] // weight.group if weight.kind == "int4" else 1
        repeated = np.repeat(scales, num_groups).reshape(tuple(weight.scales.shape))
        self._device.write(weight.scales, repeated)

    def values(self, tensor: LogicalTensor, part: Part) -> np.ndarray:
        if tensor.role is Role.CORRECTION and not (
            self.model.has_correction_bias and self._checkpoint.has(tensor)
        ):
            return np.zeros(part.shape, np.float32)
        return self._checkpoint.read(tensor, part)

    def close(self) -> None:
        self._checkpoint.close()


class DummySource:
    """Random-looking weights in their final format, made at the speed of memory; on a GPU, of its own.

    Element (row, column) of a tensor is that of a fixed random block, repeated in both directions from
    an offset that the tensor's name gives. So a rank's part is the same numbers that any other
    number of ranks would cut from it. Quantised weights are not rounded from anything: their integers are
    the pattern and all their scales are equal, so another format means other numbers.
    """

    # Odd periods, so that no layer width is a multiple and neighbouring experts differ.
    _ROWS, _COLUMNS = 251, 1021

    def __init__(self, model: ModelConfig, device: Device, dtype: DtypeName, seed: int) -> None:
        """`model` may leave tying and shared experts open: an untied head and none are assumed."""
        self.model = decide_without_tensors(model)
        self._device, self._dtype = device, dtype
        generator = np.random.Generator(np.random.PCG64(seed))
        shape = (self._ROWS, self._COLUMNS)
        self._plain = generator.uniform(-1.0, 1.0, shape).astype(np.float32)
        self._scratch = threading.local()
        self._plain_blocks: dict[float, np.ndarray] = {}
        self._on_device: dict[tuple[object, float], Tensor] = {}  # blocks as bytes, by type and amplitude
        self._lock = threading.Lock()
        self._int8 = generator.integers(-127, 128, shape).astype(np.int8)
        nibbles = generator.integers(-7, 8, (2, *shape)) & 15
        self._int4 = (nibbles[0] | nibbles[1] << 4).astype(np.uint8)

    def num_bytes(self, tensor: LogicalTensor, part: Part) -> int:
        return part.num_elements * BYTES_PER_ELEMENT[self._dtype]

    def announce(self, tensor: LogicalTensor, part: Part) -> None:
        pass

    def fill(self, tensor: LogicalTensor, part: Part, weight: Weight) -> None:
        if weight.kind in ("float32", "bfloat16"):
            block = self._plain_block(_amplitude(tensor))
            if self._device.is_gpu:
                self._repeat_on_device(block, tensor, part, weight.data)
            else:
                write(self._device, weight.data, self._pattern(block, tensor, part), weight.kind)
            return
        packed, largest, block = (1, 127, self._int8) if weight.kind == "int8" else (2, 7, self._int4)
        assert weight.scales is not None
        if self._device.is_gpu:
            self._repeat_on_device(block, tensor, part, weight.data, packed)
        else:
            self._device.write(weight.data, self._pattern(block, tensor, part, packed))
        scale = np.float32(_amplitude(tensor) / largest)
        self._device.write(weight.scales, np.full(tuple(weight.scales.shape), scale, np.float32))

    def values(self, tensor: LogicalTensor, part: Part) -> np.ndarray:
        if len(tensor.shape) == 1:
            is_norm = "norm" in tensor.name or ".ln." in tensor.name or "_linear.3." in tensor.name
            return np.full(part.shape, float(is_norm and tensor.name.endswith(".weight")), np.float32)
        if tensor.role is Role.CORRECTION:  # anything else would send every token to the same experts
            return np.zeros(part.shape, np.float32)
        return self._pattern(self._plain_block(_amplitude(tensor)), tensor, part).copy()

    def close(self) -> None:
        pass

    def _plain_block(self, amplitude: float) -> np.ndarray:
        """The block in the activation dtype; a model has a handful of amplitudes."""
        if amplitude not in self._plain_blocks:
            block = self._plain * np.float32(amplitude)
            self._plain_blocks[amplitude] = bits_from_float32(block) if self._dtype == "bfloat16" else block
        return self._plain_blocks[amplitude]

    def _repeat_on_device(
        self, block: np.ndarray, tensor: LogicalTensor, part: Part, out: Tensor, packed: int = 1
    ) -> None:
        """What `_pattern` makes, where it is to lie: only the block travels, once."""
        assert part.columns is not None
        key = out.dtype, _amplitude(tensor) if block.itemsize > 1 else 0.0
        self._device.enter_thread()
        with self._lock:
            if key not in self._on_device:
                self._on_device[key] = self._device.upload(block.view(np.uint8))
        start, end = zlib.crc32(tensor.name.encode()), 0
        column = (part.columns.start // packed + start // self._ROWS) * block.itemsize
        for rows in part.rows:
            begin, end = end, end + len(rows)
            repeat_block(self._on_device[key], rows.start + start, column, out[begin:end])

    def _pattern(self, block: np.ndarray, tensor: LogicalTensor, part: Part, packed: int = 1) -> np.ndarray:
        """[rows, columns / packed] of the repeated block; `packed` elements share one of its entries.

        The result is valid until this thread's next call.
        """
        assert part.columns is not None
        start = zlib.crc32(tensor.name.encode())
        columns = range(part.columns.start // packed, part.columns.stop // packed)
        strip = block[:, (np.arange(columns.start, columns.stop) + start // self._ROWS) % self._COLUMNS]
        rows = np.concatenate([np.arange(rows.start, rows.stop) for rows in part.rows])
        shape = (len(rows), len(columns))
        scratch = getattr(self._scratch, "array", None)
        if scratch is None or scratch.shape != shape or scratch.dtype != block.dtype:
            scratch = self._scratch.array = np.empty(
                shape, block.dtype
            )  # kept: fresh pages cost more than the copy
        return np.take(strip, (rows + start) % self._ROWS, axis=0, out=scratch, mode="clip")


def decide_without_tensors(model: ModelConfig) -> ModelConfig:
    """Tying and shared experts as if the tensors had been silent: an untied head, no shared experts."""
    return msgspec.structs.replace(
        model,
        tie_word_embeddings=bool(model.tie_word_embeddings),
        num_shared_experts=model.num_shared_experts or 0,
    )


def quantise(matrix: Tensor, weight: Weight) -> None:
    """Round matrix [N, K] into an int8 or int4 weight of its shape, row-major."""
    assert weight.scales is not None
    if weight.kind == "int8":
        cuda_ops.quantize_int8(matrix, weight.data, weight.scales)
    else:
        cuda_ops.quantize_int4(matrix, weight.group, weight.data, weight.scales)


def write(device: Device, target: Tensor, values: np.ndarray, dtype: str) -> None:
    """Write fp32 values or bf16 bits into a tensor of fp32 or bf16; only fp32 to bf16 rounds."""
    widen = dtype == "float32" and values.dtype == np.uint16
    device.write(target, float32_from_bits(values) if widen else values)


def _amplitude(tensor: LogicalTensor) -> float:
    """Half-width of the uniform values: a linear then keeps the size of its input, as training makes it."""
    inputs = tensor.shape[0] if tensor.role is Role.ROUTER else tensor.shape[1]
    return float((3.0 / inputs) ** 0.5)
