"""Small checkpoints on disk, and ways to damage or reshape one, for the loading tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import TensorSpec, serialize_file

from cuda_ops import Weight
from engine.config import ServerConfig
from engine.model_config import ModelConfig, read_model_config
from models.tiny_config import Layout, MediaIds, TinyModel, config_json
from models.tiny_weights import write_weights
from workers.checkpoint import INDEX_NAME
from workers.device.bfloat16 import bits_from_float32, float32_from_bits
from workers.device.paddle import PaddleCpu
from workers.loader import load_weights
from workers.model.weights import ModelWeights

Tensors = dict[str, np.ndarray]  # fp32, or uint16 bits of bf16


def make_model(**changes: Any) -> TinyModel:
    """Two layers, the second with two pools of four experts; milliseconds to write and to load."""
    settings = {
        "vocab_size": 320,
        "media": MediaIds(300, 301, 302, 303, 304),
        "hidden_size": 128,
        "num_layers": 2,
        "num_experts": 4,
        "expert_widths": (512, 256),
        "vision_depth": 1,
    }
    return TinyModel(**{**settings, **changes})


def write_checkpoint(folder: Path, model: TinyModel, layout: Layout = "paddle", seed: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(model, layout)))
    write_weights(folder / "model.safetensors", model, layout, seed)
    return folder


def change_config(folder: Path, **changes: Any) -> ModelConfig:
    """Write keys into config.json (... removes one) and return what it then says."""
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
    return read_model_config(folder)


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors | None]) -> Path:
    """Rewrite model.safetensors after `change`, which edits the tensors in place or returns new ones."""
    file = folder / "model.safetensors"
    tensors = read_tensors(file)
    write_tensors(file, change(tensors) or tensors)
    return folder


def read_tensors(file: Path) -> Tensors:
    """All tensors of a file, parsed here and not by the code under test."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    kinds = {"F32": np.float32, "BF16": np.uint16}
    return {
        name: np.frombuffer(data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
                            kinds[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }  # fmt: skip


def write_tensors(file: Path, tensors: Tensors, bits_as: str = "bfloat16") -> None:
    """uint16 arrays are declared as `bits_as`."""
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    names = {kind: kind for kind in ("float32", "float16", "int8", "uint8")} | {"uint16": bits_as}
    specs = {
        name: TensorSpec(
            dtype=names[array.dtype.name],
            shape=list(array.shape),
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in arrays.items()
    }
    serialize_file(specs, file, None)


def split_into_shards(folder: Path, count: int) -> Path:
    """Distribute model.safetensors over `count` files with an index, as large repositories do."""
    single = folder / "model.safetensors"
    tensors = read_tensors(single)
    single.unlink()
    weight_map = {}
    for shard in range(count):
        name = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        part = dict(list(tensors.items())[shard::count])
        write_tensors(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def quantise(matrix: np.ndarray, group: int, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales of specification 8.2, the scale rounded to bf16 before dividing."""
    grouped = matrix.reshape(len(matrix), -1, group)
    amax = np.abs(grouped).max(-1)
    scales = float32_from_bits(bits_from_float32(amax / np.float32(largest)))
    ratio = grouped / scales[..., None]
    integers = np.clip(np.copysign(np.floor(np.abs(ratio) + 0.5), ratio), -largest, largest)
    return integers.reshape(matrix.shape).astype(np.int8), scales


def load(folder: Path, rank: int = 0, world: int = 1, **settings: Any) -> ModelWeights:
    """One rank's weights of a checkpoint on a CPU device; `settings` are ServerConfig's."""
    config = ServerConfig(model=str(folder), **settings)
    model = read_model_config(folder, config.config_overrides)
    return load_weights(config, model, PaddleCpu(), rank, world)


def arrays_of(weights: Any) -> dict[str, np.ndarray]:
    """Every tensor by its path (`decoder.layers.1.mlp.pools.0.0.data`): bf16 as fp32, packed ones in rows."""
    return dict(_walk(weights, ""))


def _walk(value: Any, path: str) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(value, Weight) and value.is_packed:
        data, scales = rows_of(value)
        yield from ((f"{path}.data", data), (f"{path}.scales", scales))
    elif is_dataclass(value):
        for field in fields(value):
            yield from _walk(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _walk(item, f"{path}.{index}")
    elif hasattr(value, "__dlpack__"):
        yield path, PaddleCpu().download(value)


def rows_of(weight: Weight) -> tuple[np.ndarray, np.ndarray]:
    """Data and scales of a packed weight in the order of its rows (cuda_ops/pack.py)."""
    data, scales = PaddleCpu().download(weight.data), PaddleCpu().download(weight.scales)
    stack, (rows, row_bytes) = data.shape[:-2], data.shape[-2:]
    panels = data.view(np.uint8).reshape(*stack, rows // 16, row_bytes // 4, 16, 4)
    offset = 0x80 if weight.kind == "int8" else 0x88
    turned = panels.swapaxes(-3, -2).reshape(data.shape) ^ np.uint8(offset)
    if weight.kind == "int4":
        groups = scales.shape[-1]
        scales = scales.reshape(*stack, rows // 16, groups, 16).swapaxes(-2, -1).reshape(scales.shape)
    return turned.view(data.dtype), scales
