"""Writes a trained run as a checkpoint in the -Paddle layout (scheme A), ready to be served.

    python -m models.demo_training.export RUN models/demo

bf16 but for routers and their bias. The result is read back and compared with what was trained, and must
stay within 24 MB. Names and orientations: specification 2.2 and 2.4.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from models.demo_training import checkpoint
from models.demo_training.card import model_card
from models.demo_training.config import MAX_EXPORT_BYTES, demo_model
from models.demo_training.tutor import HEADS
from models.tiny_config import TinyModel, paddle_config
from models.tiny_tokenizer import write_json

Tensors = dict[str, torch.Tensor]

_DECODER, _TOWER, _RESAMPLER = "model.language_model.", "model.vision_tower.", "model.resampler_model."
_SEQUENTIAL = {"fc1": "0", "fc2": "2", "ln": "3"}  # of the resampler's two MLPs; 1 is the GELU


def export(run: Path, out: Path, sizes: TinyModel | None = None) -> None:
    """Raises RuntimeError when there is no checkpoint, or the result is too large or reads back otherwise."""
    sizes = sizes or demo_model()
    found = checkpoint.latest(run / "checkpoint")
    if found is None:
        raise RuntimeError(f"{run} has no checkpoint; train one first.")
    weights = load_file(found / "weights.safetensors")
    trained = {n: t for n, t in weights.items() if n.split(".")[0] not in HEADS}
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted((run / "tokenizer").iterdir()):
        shutil.copyfile(file, out / file.name)
    write_json(out / "config.json", paddle_config(sizes))
    write_json(out / "generation_config.json", generation_config(sizes))
    save_file(to_paddle(trained, sizes), out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    (out / "README.md").write_text(model_card(run, sizes, json.loads((found / "progress.json").read_text())))
    check(out, trained, sizes)


def generation_config(sizes: TinyModel) -> dict[str, object]:
    """Greedy by default: every question of the demo has one right answer."""
    return {
        "bos_token_id": 1,
        "pad_token_id": 0,
        "eos_token_id": list(sizes.eos_token_ids),
        "do_sample": False,
    }


def check(out: Path, trained: Tensors, sizes: TinyModel) -> None:
    back = from_paddle(load_file(out / "model.safetensors"), sizes)
    if back.keys() != trained.keys():
        raise RuntimeError(f"Reading back lost or made up tensors: {sorted(back.keys() ^ trained.keys())}")
    for name, tensor in trained.items():
        if not torch.equal(back[name].float(), _stored(name, tensor).float()):
            raise RuntimeError(f"{name} differs from what was trained after reading it back.")
    size = sum(file.stat().st_size for file in out.iterdir())
    if size > MAX_EXPORT_BYTES:
        raise RuntimeError(f"{out} has {size} bytes, more than {MAX_EXPORT_BYTES}; make the model smaller.")


def to_paddle(trained: Tensors, sizes: TinyModel) -> Tensors:
    """Names of transformers' modules -> names on disk; linears become [in, out], and some are fused."""
    rest = dict(trained)
    written: Tensors = {}
    for layer in range(sizes.num_layers):
        source, target = f"{_DECODER}layers.{layer}.", f"ernie.layers.{layer}."
        qkv = [rest.pop(f"{source}self_attn.{name}_proj.weight") for name in "qkv"]
        written[f"{target}self_attn.qkv_proj.weight"] = torch.cat(qkv).T
        written[f"{target}self_attn.o_proj.weight"] = rest.pop(f"{source}self_attn.o_proj.weight").T
        for norm in ("input_layernorm", "post_attention_layernorm"):
            written[f"{target}{norm}.weight"] = rest.pop(f"{source}{norm}.weight")
        if layer not in sizes.expert_layers:
            _put_mlp(rest, written, f"{source}mlp.", f"{target}mlp.")
            continue
        _put_experts(rest, written, f"{source}mlp.", f"{target}mlp.", sizes)
        if sizes.num_shared_experts:
            _put_mlp(rest, written, f"{source}mlp.shared_experts.", f"{target}mlp.shared_experts.")
    for name, tensor in rest.items():
        written[_plain_name(name)] = tensor.T if tensor.ndim == 2 and "embed_tokens" not in name else tensor
    return {name: _stored(name, tensor).contiguous() for name, tensor in written.items()}


def _put_mlp(rest: Tensors, written: Tensors, source: str, target: str) -> None:
    gate_up = [rest.pop(f"{source}{name}_proj.weight") for name in ("gate", "up")]
    written[f"{target}up_gate_proj.weight"] = torch.cat(gate_up).T  # gate first, in spite of the name
    written[f"{target}down_proj.weight"] = rest.pop(f"{source}down_proj.weight").T


def _put_experts(rest: Tensors, written: Tensors, source: str, target: str, sizes: TinyModel) -> None:
    biases = []
    for pool, (kind, suffix) in enumerate((("text_moe", ""), ("vision_moe", "_1"))):
        written[f"{target}gate.weight{suffix}"] = rest.pop(f"{source}{kind}.gate.weight").T
        biases.append(rest.pop(f"{source}{kind}.gate.moe_statics.e_score_correction_bias"))
        gate_up = rest.pop(f"{source}{kind}.experts.gate_up_proj")
        down = rest.pop(f"{source}{kind}.experts.down_proj")
        for expert in range(sizes.num_experts):
            name = f"{target}experts.{pool * sizes.num_experts + expert}."
            written[f"{name}up_gate_proj.weight"] = gate_up[expert].T
            written[f"{name}down_proj.weight"] = down[expert].T
    written[f"{target}moe_statics.e_score_correction_bias"] = torch.cat(biases)


def _plain_name(name: str) -> str:
    """Of a tensor that is neither fused nor split."""
    if name.startswith(_TOWER):
        return "vision_model." + name.removeprefix(_TOWER)
    if name.startswith(_RESAMPLER):
        parts = name.removeprefix(_RESAMPLER).split(".")
        return "ernie.resampler_model." + ".".join(_SEQUENTIAL.get(part, part) for part in parts)
    return "ernie." + name.removeprefix(_DECODER)


def _stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
    keeps_fp32 = ".gate." in name or "e_score_correction_bias" in name
    return tensor.float() if keeps_fp32 else tensor.bfloat16()


def from_paddle(stored: Tensors, sizes: TinyModel) -> Tensors:
    """The inverse of `to_paddle`, on stored values."""
    rest = dict(stored)
    read: Tensors = {}
    heads = [sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads]
    for layer in range(sizes.num_layers):
        source, target = f"ernie.layers.{layer}.", f"{_DECODER}layers.{layer}."
        qkv = rest.pop(f"{source}self_attn.qkv_proj.weight").T.split([n * sizes.head_dim for n in heads])
        for name, part in zip("qkv", qkv, strict=True):
            read[f"{target}self_attn.{name}_proj.weight"] = part
        read[f"{target}self_attn.o_proj.weight"] = rest.pop(f"{source}self_attn.o_proj.weight").T
        for norm in ("input_layernorm", "post_attention_layernorm"):
            read[f"{target}{norm}.weight"] = rest.pop(f"{source}{norm}.weight")
        if layer not in sizes.expert_layers:
            _take_mlp(rest, read, f"{source}mlp.", f"{target}mlp.")
            continue
        _take_experts(rest, read, f"{source}mlp.", f"{target}mlp.", sizes)
        if sizes.num_shared_experts:
            _take_mlp(rest, read, f"{source}mlp.shared_experts.", f"{target}mlp.shared_experts.")
    for name, tensor in rest.items():
        turned = tensor.T if tensor.ndim == 2 and "embed_tokens" not in name else tensor
        read[_module_name(name)] = turned
    return read


def _take_mlp(rest: Tensors, read: Tensors, source: str, target: str) -> None:
    gate, up = rest.pop(f"{source}up_gate_proj.weight").T.chunk(2)
    read[f"{target}gate_proj.weight"], read[f"{target}up_proj.weight"] = gate, up
    read[f"{target}down_proj.weight"] = rest.pop(f"{source}down_proj.weight").T


def _take_experts(rest: Tensors, read: Tensors, source: str, target: str, sizes: TinyModel) -> None:
    biases = rest.pop(f"{source}moe_statics.e_score_correction_bias").split(1)
    for pool, (kind, suffix) in enumerate((("text_moe", ""), ("vision_moe", "_1"))):
        first = pool * sizes.num_experts
        names = [f"{source}experts.{first + expert}." for expert in range(sizes.num_experts)]
        read[f"{target}{kind}.gate.weight"] = rest.pop(f"{source}gate.weight{suffix}").T
        read[f"{target}{kind}.gate.moe_statics.e_score_correction_bias"] = biases[pool]
        for module, stored in (("gate_up_proj", "up_gate_proj"), ("down_proj", "down_proj")):
            weights = [rest.pop(f"{name}{stored}.weight").T for name in names]
            read[f"{target}{kind}.experts.{module}"] = torch.stack(weights)


def _module_name(name: str) -> str:
    if name.startswith("vision_model."):
        return _TOWER + name.removeprefix("vision_model.")
    if name.startswith("ernie.resampler_model."):
        parts = name.removeprefix("ernie.resampler_model.").split(".")
        modules = {index: module for module, index in _SEQUENTIAL.items()}
        return _RESAMPLER + ".".join(modules.get(part, part) for part in parts)
    return _DECODER + name.removeprefix("ernie.")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.demo_training.export")
    parser.add_argument("run", type=Path, help="folder given to train.py as --out")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    export(options.run, options.out)
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"{options.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
