"""What only the tensors of a checkpoint decide about its size: a tied head, shared experts, quantisation.

Reads names and shapes from the headers of safetensors files, never a weight. The workers check the whole
inventory when they load (workers/checkpoint.py); here silence is taken as the config says it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from engine.model_config import ModelConfig, read_json_object

_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 << 20


def decide_by_tensors(model: ModelConfig, source: Path) -> ModelConfig:
    """`model` with tying and shared experts as the checkpoint in `source` has them.

    Without weights there (a preset, a folder for dummy weights) what the config leaves open counts as untied
    and as no shared experts.
    """
    shapes = stored_shapes(source) if source.is_dir() else {}
    if not shapes:
        return _decided(model, bool(model.tie_word_embeddings), model.num_shared_experts or 0)
    is_tied = not any(name.endswith("lm_head.weight") for name in shapes)
    return _decided(model, is_tied, model.num_shared_experts or _count_shared_experts(model, shapes))


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the folder; empty where there are no readable weights.

    A file of the index that is not there adds nothing: whether all are there is checked elsewhere.
    """
    files = set(folder.glob("*.safetensors"))
    index = folder / _INDEX
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else ()
        files = {folder / Path(str(name)).name for name in names}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(files):
        for name, entry in _header(file).items():
            shape = entry.get("shape") if isinstance(entry, dict) else None
            if isinstance(shape, list):
                shapes[name] = tuple(shape)
    return shapes


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if length <= _MAX_HEADER_BYTES else {}
    except (OSError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def _count_shared_experts(model: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> int:
    """From the width of the fused shared MLP: the side of its down_proj that is not the hidden size."""
    down = (s for name, s in shapes.items() if ".shared_experts.down_proj." in name and len(s) == 2)
    shape = next(down, None)
    if shape is None or not model.num_experts:
        return 0
    is_paddle = any(".qkv_proj." in name for name in shapes)
    return (shape[0] if is_paddle else shape[1]) // model.moe_intermediate_sizes[0]


def _decided(model: ModelConfig, is_tied: bool, num_shared_experts: int) -> ModelConfig:
    return msgspec.structs.replace(model, tie_word_embeddings=is_tied, num_shared_experts=num_shared_experts)
