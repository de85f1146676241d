"""Which format each weight gets (design D7).

              decoder linears      routed experts      embedding, head, norms, vision    routers
    bfloat16  T                    T                   T                                 fp32
    wint8     int8 per row         int8 per row        T                                 fp32
    wint4     int8 per row         int4 in groups      T                                 fp32
    wint4-all int4 in groups of 32 int4 in groups      T                                 fp32

On a CPU the head of a quantised model is int8 per row too (wint4-all: int4 in groups of 32): it is a third of
what a decode step of a small model reads, and its rounding is lost among the experts'. Attention and shared
experts see every token: in int4 they cost several times the divergence of all routed experts together
(`./run.sh quality` measures it), for a third less to read: wint4-all is for who wants that, with finer groups
for all that is no routed expert. In a dense model wint4 means int4 for all decoder linears. A group is 64
inputs, or 32 where a rank's width is no multiple of 64. T is the activation dtype. The arithmetic is in
cuda_ops (quantize_int8, quantize_int4). Weights that a checkpoint holds quantised already get the same
formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.config import Quantization, ServerConfig
from engine.errors import ConfigError
from engine.model_config import ModelConfig
from workers.checkpoint_inventory import EXPERTS, Role

Kind = Literal["float32", "bfloat16", "int8", "int4"]

_DECODER_LINEARS = EXPERTS | {
    Role.QKV,
    Role.ATTENTION_OUT,
    Role.DENSE_UP,
    Role.DENSE_DOWN,
    Role.SHARED_UP,
    Role.SHARED_DOWN,
}
_GROUPS = (64, 32)  # inputs that share one int4 scale, best first


@dataclass(frozen=True, slots=True)
class Format:
    """How a weight is stored; `group` counts the inputs under one scale and is 0 unless int4."""

    kind: Kind
    group: int = 0


def activation_dtype(config: ServerConfig, model: ModelConfig) -> Literal["float32", "bfloat16"]:
    """T: what --dtype says, or the checkpoint's."""
    return model.dtype if config.dtype == "auto" else config.dtype


def kv_cache_dtype(
    config: ServerConfig, dtype: Literal["float32", "bfloat16"]
) -> Literal["float32", "bfloat16", "int8"]:
    """Of keys and values beside activations of `dtype`; what does not go with it was refused by the plan."""
    return "int8" if config.kv_cache_dtype == "int8" else dtype


def head_format(
    quantization: Quantization, dtype: Literal["float32", "bfloat16"], hidden: int, is_gpu: bool
) -> Format:
    """The format of the head with `hidden` inputs; what it is tied to keeps the activation dtype."""
    if is_gpu or quantization in ("auto", "bfloat16"):
        return Format(dtype)
    is_int4 = quantization == "wint4-all" and hidden % _GROUPS[-1] == 0
    return Format("int4", _GROUPS[-1]) if is_int4 else Format("int8")


def format_of(
    role: Role, in_features: int, quantization: Quantization, dtype: Literal["float32", "bfloat16"], moe: bool
) -> Format:
    """The format of a linear with `in_features` inputs on this rank, in a model with experts or without.

    Raises ConfigError when no int4 group divides the inputs.
    """
    if quantization in ("auto", "bfloat16") or role not in _DECODER_LINEARS:
        return Format(dtype)
    is_beside_experts = moe and role not in EXPERTS
    if quantization == "wint8" or (quantization == "wint4" and is_beside_experts):
        return Format("int8")
    for group in _GROUPS[-1:] if is_beside_experts else _GROUPS:
        if in_features % group == 0:
            return Format("int4", group)
    raise ConfigError(
        f"--quantization {quantization} needs a multiple of {_GROUPS[-1]} inputs per rank, but the "
        f"{role.value} has {in_features}; use wint8 or a smaller --tensor-parallel-size"
    )
