"""A checkpoint folder as logical tensors: which files, which layout, is everything there, read a part.

The check comes before the first byte is read: every stored name must be one the model has (or one of the
few that are ignorable), with exactly its shape, and none may be missing, because a silently dropped tensor
is a fluent but wrong model. Names and shapes are in checkpoint_inventory.py, bytes in checkpoint_file.py.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import numpy as np

from engine.errors import ConfigError
from engine.model_config import ModelConfig, effective_quantization, read_json_object
from workers.checkpoint_file import CheckpointFile, StoredTensor
from workers.checkpoint_inventory import (
    EXPERTS,
    PLAIN,
    QUANTISED,
    SCALE,
    LogicalTensor,
    Role,
    Scheme,
    is_beyond,
    is_ignorable,
    model_tensors,
    plain_name,
    quantised_name,
    scheme_of,
)
from workers.device.bfloat16 import float32_from_bits
from workers.shards import Part

log = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
_NAMES_SHOWN = 5
_SANE_MAGNITUDE = 1e6  # no weight of a trained model is larger; misread bits are, all over


class Checkpoint:
    """An opened checkpoint that holds every tensor of `model`; close() it when the weights are loaded.

    `model` is the given configuration with tying and shared experts decided by the tensors.
    """

    def __init__(self, folder: str | Path, model: ModelConfig, *, is_cut: bool = False) -> None:
        """Open and check. `is_cut`: an override removed layers, so tensors past the last one are expected.

        Raises ConfigError naming files and tensors.
        """
        self.folder = Path(folder)
        self._files: dict[str, tuple[CheckpointFile, str]] = {}  # plain name -> file, name in it
        self._open_files()
        self.scheme = self._find_scheme()
        self._quantization = effective_quantization(model, "auto") if model.quantization_config else None
        self._drop_ignorable(model, is_cut)
        self.model = self._decide_open_questions(model)
        self._check_inventory()
        self._check_raw_bits()

    def has(self, tensor: LogicalTensor) -> bool:
        return all(name in self._files for name in tensor.stored(self.scheme))

    def will_read(self, tensor: LogicalTensor) -> None:
        """Let the disk begin with the whole tensor; what a rank does not need of it, its neighbours do."""
        for name in tensor.stored(self.scheme):
            for kind in (name, quantised_name(name, QUANTISED)):
                if kind in self._files:
                    file, stored_name = self._files[kind]
                    file.will_read(stored_name)

    def read(self, tensor: LogicalTensor, part: Part) -> np.ndarray:
        """The part, out-major and contiguous: fp32 or uint16 bits of bf16 as stored. Any thread may call."""
        if tensor.role is Role.ROUTER:
            return self._read_router(tensor)
        out = np.empty(part.shape, self._numpy_type(tensor))
        start = 0
        for rows in part.rows:
            self._read_rows(tensor, rows, part.columns, out[start : start + len(rows)])
            start += len(rows)
        return out

    def packed(self, tensor: LogicalTensor) -> int:
        """How many of the tensor's integers share a byte, 1 or 2; 0 when it is not stored quantised."""
        if not tensor.is_linear or not self._is_quantised(next(iter(tensor.stored(self.scheme)))):
            return 0
        has_experts, is_expert = bool(self.model.num_experts), tensor.role in EXPERTS
        return 2 if self._quantization == "wint4" and (is_expert or not has_experts) else 1

    def read_quantised(self, tensor: LogicalTensor, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """The part's integers, uint8 [N, K / packed], and the scales of its rows, fp32 [N].

        Two integers of a byte are neighbours along the inputs, the low half first, as in cuda_ops.Weight.
        """
        assert part.columns is not None
        packed = self.packed(tensor)
        columns = range(part.columns.start // packed, part.columns.stop // packed)
        integers, start = np.empty((part.num_rows, len(columns)), np.uint8), 0
        for rows in part.rows:
            target = integers[start : start + len(rows)]
            self._read_rows(tensor, rows, columns, target.view(self._integer_type(tensor)), QUANTISED)
            start += len(rows)
        names = [quantised_name(name, SCALE) for name in tensor.stored(self.scheme)]
        scales = np.concatenate([self._read_vector(name) for name in names])
        return integers, np.concatenate([scales[rows.start : rows.stop] for rows in part.rows])

    def num_bytes(self, tensor: LogicalTensor, part: Part) -> int:
        """Bytes that reading the part takes from disk; 0 for an optional tensor that is absent."""
        if packed := self.packed(tensor):
            return part.num_elements // packed
        if not self.has(tensor):
            return 0
        first = self._stored(next(iter(tensor.stored(self.scheme))))
        return part.num_elements * first.bytes_per_element

    def close(self) -> None:
        for file in {file.path: file for file, _ in self._files.values()}.values():
            file.close()

    # reading ------------------------------------------------------------------------------------------

    def _read_rows(
        self,
        tensor: LogicalTensor,
        rows: range,
        columns: range | None,
        out: np.ndarray,
        kind: str = PLAIN,
    ) -> None:
        """out = tensor[rows, columns] of the logical tensor, straight from the mapped file."""
        if tensor.is_linear and self.scheme == "A":
            file, stored_name = self._files[quantised_name(tensor.name, kind)]
            file.copy_transposed(stored_name, _slice(columns), _slice(rows), out)
        elif tensor.is_linear and tensor.parts:
            self._read_separate(tensor, rows, columns, out, kind)
        elif tensor.is_linear:
            self._copy(quantised_name(tensor.name, kind), _slice(rows), columns, out)
        else:
            self._copy(tensor.name, _slice(rows), columns, out)

    def _read_separate(
        self, tensor: LogicalTensor, rows: range, columns: range | None, out: np.ndarray, kind: str
    ) -> None:
        """Rows of the fused tensor from scheme B's separate ones; a range may span several."""
        start = 0
        for name, (count, *_) in tensor.stored("B").items():
            first, last = max(rows.start, start), min(rows.stop, start + count)
            if first < last:
                target = out[first - rows.start : last - rows.start]
                self._copy(quantised_name(name, kind), slice(first - start, last - start), columns, target)
            start += count

    def _copy(self, name: str, rows: slice, columns: range | None, out: np.ndarray) -> None:
        file, stored_name = self._files[name]
        file.copy(stored_name, rows, None if columns is None else _slice(columns), out)

    def _numpy_type(self, tensor: LogicalTensor) -> np.dtype:
        """The type that all stored parts of the tensor have."""
        places = [self._files[name] for name in tensor.stored(self.scheme)]
        types = {file.numpy_type(stored_name) for file, stored_name in places}
        if len(types) > 1:
            raise ConfigError(f"the parts of {tensor.name} are stored in different types")
        return types.pop()

    def _integer_type(self, tensor: LogicalTensor) -> np.dtype:
        """int8 or uint8, as the first stored part declares its bytes; the bits are what counts."""
        file, stored_name = self._files[quantised_name(next(iter(tensor.stored(self.scheme))), QUANTISED)]
        return file.numpy_type(stored_name)

    def _read_vector(self, name: str) -> np.ndarray:
        """A [N] or [1, N] tensor as fp32 [N]."""
        file, stored_name = self._files[name]
        values = np.empty(file.tensors[stored_name].shape, file.numpy_type(stored_name))
        file.copy(stored_name, slice(None), None, values)
        wide = float32_from_bits(values) if values.dtype == np.uint16 else values
        return wide.reshape(-1)

    def _is_quantised(self, name: str) -> bool:
        return self._quantization is not None and quantised_name(name, QUANTISED) in self._files

    def _read_router(self, tensor: LogicalTensor) -> np.ndarray:
        """[hidden, experts] as published, or [experts, hidden] as transformers' text models keep it."""
        stored = np.empty(self._stored(tensor.name).shape, self._numpy_type(tensor))
        self._copy(tensor.name, slice(None), None, stored)
        return np.ascontiguousarray(stored if stored.shape == tensor.shape else stored.T)

    def _stored(self, name: str) -> StoredTensor:
        file, stored_name = self._files[name]
        return file.tensors[stored_name]

    # opening ------------------------------------------------------------------------------------------

    def _open_files(self) -> None:
        for path, listed in self._list_files().items():
            file = CheckpointFile(path)
            if absent := [name for name in listed or () if name not in file.tensors]:
                raise ConfigError(f"{path} lacks {_some(absent)} that {INDEX_NAME} places there")
            for name in listed or file.tensors:
                plain = plain_name(name)
                if plain in self._files:
                    raise ConfigError(f"{self.folder} holds the tensor {plain} twice, also as {name}")
                self._files[plain] = file, name

    def _list_files(self) -> dict[Path, list[str] | None]:
        """Files to open, each with the names the index places in it (None without an index: all)."""
        index = self.folder / INDEX_NAME
        if not index.is_file():
            paths = sorted(self.folder.glob("*.safetensors"))
            if not paths:
                raise ConfigError(f"{self.folder} holds no *.safetensors file; Octet reads no other weights")
            return dict.fromkeys(paths)
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise ConfigError(f"{index} has no weight_map from tensor names to file names")
        files: dict[Path, list[str] | None] = {}
        for name, file_name in weight_map.items():
            if Path(file_name).name != file_name:
                raise ConfigError(f"{index} places {name} outside its folder, in {file_name!r}")
            names = files.setdefault(self.folder / file_name, [])
            assert names is not None
            names.append(name)
        return files

    def _find_scheme(self) -> Scheme:
        scheme = scheme_of({f".{name}." for name in self._files})
        if scheme is None:
            raise ConfigError(
                f"{self.folder} has neither qkv_proj (-Paddle layout) nor q_proj (-PT layout) tensors: "
                "it is no ERNIE-4.5 checkpoint that Octet can read"
            )
        return scheme

    def _drop_ignorable(self, model: ModelConfig, is_cut: bool) -> None:
        ignored = [name for name in self._files if is_ignorable(name)]
        beyond = [name for name in self._files if is_cut and is_beyond(name, model)]
        for name in {*ignored, *beyond}:
            del self._files[name]
        if ignored:
            log.info("ignoring %d tensors that inference does not use: %s", len(ignored), _some(ignored))
        if beyond:
            log.info("leaving out %d tensors of layers that the overrides removed", len(beyond))

    def _decide_open_questions(self, model: ModelConfig) -> ModelConfig:
        """Tying and shared experts by what is there; published configs omit or contradict both."""
        has_head = "lm_head.weight" in self._files
        if has_head and model.tie_word_embeddings:
            log.warning("config.json ties the head to the embedding, but there is a lm_head.weight: using it")
        if model.tie_word_embeddings is False and not has_head:
            raise ConfigError(
                f"{self.folder} lacks lm_head.weight although tie_word_embeddings is false in its config.json"
            )
        shared = model.num_shared_experts or self._count_shared_experts(model)
        return msgspec.structs.replace(model, tie_word_embeddings=not has_head, num_shared_experts=shared)

    def _count_shared_experts(self, model: ModelConfig) -> int:
        """From the width of the fused shared MLP; 0 if there is none."""
        found = (n for n in self._files if ".shared_experts.down_proj." in n and not n.endswith(SCALE))
        name = next(found, None)
        if name is None or not model.num_experts:
            return 0
        rows, columns = self._stored(name).shape
        width = rows if self.scheme == "A" else columns
        if width % model.moe_intermediate_sizes[0]:
            raise ConfigError(
                f"{name} is {width} wide, no multiple of the text experts' width in config.json"
            )
        return width // model.moe_intermediate_sizes[0]

    # checking -----------------------------------------------------------------------------------------

    def _check_inventory(self) -> None:
        expected: dict[str, tuple[tuple[int, ...], Role]] = {}
        for tensor in model_tensors(self.model):
            packed = self.packed(tensor)
            for name, shape in tensor.stored(self.scheme).items():
                if packed:
                    expected |= self._quantised_shapes(name, shape, tensor.role, packed)
                else:
                    expected[name] = shape, tensor.role
        optional = {name for name, (_, role) in expected.items() if role is Role.CORRECTION}
        if missing := [name for name in expected if name not in self._files and name not in optional]:
            raise ConfigError(f"{self.folder} lacks {_some(missing)}")
        if unknown := [name for name in self._files if name not in expected]:
            raise ConfigError(
                f"{self.folder} holds {_some(unknown)}, which this model does not have; "
                "config.json and weights do not belong together"
            )
        for name, (shape, role) in expected.items():
            if name in self._files:
                self._check_shape(name, shape, role)

    def _quantised_shapes(
        self, name: str, shape: tuple[int, ...], role: Role, packed: int
    ) -> dict[str, tuple[tuple[int, ...], Role]]:
        """What stands for a quantised linear: integers, packed along the inputs, and a scale per output."""
        is_paddle = self.scheme == "A"
        inputs, outputs = shape if is_paddle else shape[::-1]
        stored = (inputs // packed, outputs) if is_paddle else (outputs, inputs // packed)
        return {
            quantised_name(name, QUANTISED): (stored, role),
            quantised_name(name, SCALE): ((outputs,), role),
        }

    def _check_shape(self, name: str, expected: tuple[int, ...], role: Role) -> None:
        stored = self._stored(name).shape
        if stored == expected or (role is Role.ROUTER and stored == expected[::-1]):
            self._check_type(name)
            return
        if name.endswith(SCALE) and stored == (1, *expected):
            return
        raise ConfigError(
            f"{name} has the shape {list(stored)}, but config.json asks for {list(expected)} "
            f"in the -{'Paddle' if self.scheme == 'A' else 'PT'} layout"
        )

    def _check_type(self, name: str) -> None:
        """Bytes are quantised weights and nothing else is."""
        dtype = self._stored(name).dtype
        if (dtype in ("I8", "U8")) != name.endswith(QUANTISED):
            raise ConfigError(
                f"{name} is stored as {dtype}; Octet reads BF16 and F32, bytes only as {QUANTISED} under a "
                "quantization_config"
            )

    def _check_raw_bits(self) -> None:
        """bf16 stored under the name U16 cannot be told from integers by its type, only by its values."""
        for name in (name for name in self._files if self._stored(name).dtype == "U16"):
            bits = np.empty((1, *self._stored(name).shape[1:]), np.uint16)
            self._copy(name, slice(0, 1), None, bits)
            values = (bits.astype(np.uint32) << 16).view(np.float32)
            if not np.all(np.abs(values) < _SANE_MAGNITUDE):  # NaN is not smaller either
                raise ConfigError(f"{name} is stored as U16, but its bits are no bf16 weights")


def _slice(span: range | None) -> slice:
    return slice(None) if span is None else slice(span.start, span.stop)


def _some(names: list[str]) -> str:
    """'the tensor a', or '7 tensors: a, b, c, d, e, ...'."""
    if len(names) == 1:
        return f"the tensor {names[0]}"
    shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
    return f"{len(names)} tensors: {shown}{', ...' if len(names) > _NAMES_SHOWN else ''}"
