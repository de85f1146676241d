"""How many bytes of weights one rank holds, component by component: arithmetic on a ModelConfig alone.

The shapes are those that workers/loader.py allocates and the formats those of workers/quant.py, computed
here a second time, because the engine knows neither tensors nor the workers; a test holds both against each
other. Every rank holds as much as every other. Model specification sections 1.6 to 1.8.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from engine.config import Quantization, ServerConfig
from engine.errors import ConfigError
from engine.model_config import ModelConfig, VisionConfig

Dtype = Literal["float32", "bfloat16"]
KvDtype = Literal["float32", "bfloat16", "int8"]

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "int8": 1}
_SCALE_BYTES = 2
_GROUPS = (64, 32)  # inputs that share one int4 scale, best first


class _Linear(NamedTuple):
    """`copies` equal matrices [outputs, inputs] on one rank; `is_routed`: of a routed expert."""

    component: str
    copies: int
    outputs: int
    inputs: int
    is_routed: bool = False


def weight_bytes(
    model: ModelConfig,
    world: int,
    quantization: Quantization,
    dtype: Dtype = "bfloat16",
    *,
    is_host: bool = False,
) -> dict[str, int]:
    """Bytes per rank of every component the model has, in the order of a forward pass; "scales" are last.

    `dtype` is that of what is never quantised; on a host the head of a quantised model is quantised, too.
    Tying and shared experts that are still open count as untied and as none. Raises ConfigError when no
    int4 group divides a rank's width.
    """
    size = DTYPE_BYTES[dtype]
    found: dict[str, int] = {"embedding": _vocabulary(model, world) * size}
    scales = 0
    if is_host and quantization not in ("auto", "bfloat16"):
        found["head"], scales = _quantised_head(model, world, quantization)
    elif not model.tie_word_embeddings:
        found["head"] = found["embedding"]
    for linear in _decoder_linears(model, world):
        data, scale = _linear_bytes(linear, quantization, size, has_experts=bool(model.num_experts))
        found[linear.component] = found.get(linear.component, 0) + data
        scales += scale
    if model.num_experts:
        per_pool = len(model.moe_layers) * model.num_experts
        found["routers"] = 4 * per_pool * model.num_pools * (model.hidden_size + 1)  # fp32, with their bias
    found["norms"] = (2 * model.num_layers + 1) * model.hidden_size * size
    if model.vision is not None:
        found["vision tower"] = _vision_elements(model.vision) * size
        found["resampler"] = _resampler_elements(model.vision, model.hidden_size) * size
    return {name: count for name, count in (found | {"scales": scales}).items() if count}


def kv_dtype_of(config: ServerConfig, dtype: Dtype) -> KvDtype:
    """What keys and values are kept in beside activations of `dtype`.

    Raises ConfigError for bfloat16 beside float32: attention reads what it computes in, or int8.
    """
    if config.kv_cache_dtype == "bfloat16" and dtype == "float32":
        raise ConfigError(
            "--kv-cache-dtype bfloat16 does not go with float32 activations: leave it out, take int8, or "
            "give --dtype bfloat16"
        )
    return "int8" if config.kv_cache_dtype == "int8" else dtype


def kv_bytes_per_token(model: ModelConfig, world: int, dtype: KvDtype = "bfloat16") -> int:
    """Keys and values of one token in all layers, on one rank; int8 with their scales."""
    head = model.head_dim * DTYPE_BYTES[dtype] + (_SCALE_BYTES if dtype == "int8" else 0)
    return 2 * model.num_layers * _kv_heads(model, world) * head


def _vocabulary(model: ModelConfig, world: int) -> int:
    """Elements of one rank's vocabulary rows; the vocabulary is padded to a multiple of the ranks."""
    return -(-model.vocab_size // world) * model.hidden_size


def _kv_heads(model: ModelConfig, world: int) -> int:
    """Ranks beyond the number of kv heads hold copies."""
    return max(model.num_kv_heads // world, 1)


def _decoder_linears(model: ModelConfig, world: int) -> Iterator[_Linear]:
    hidden, layers, moe_layers = model.hidden_size, model.num_layers, len(model.moe_layers)
    queries = model.num_heads // world * model.head_dim
    keys = _kv_heads(model, world) * model.head_dim
    yield _Linear("qkv", layers, queries + 2 * keys, hidden)
    yield _Linear("o_proj", layers, hidden, queries)
    yield from _swiglu("dense FFN", layers - moe_layers, hidden, model.intermediate_size // world)
    for name, width in zip(("text experts", "vision experts"), model.moe_intermediate_sizes, strict=False):
        yield from _swiglu(name, moe_layers * model.num_experts, hidden, width // world, is_routed=True)
    shared_width = model.shared_intermediate_size // world
    yield from _swiglu("shared experts", moe_layers if shared_width else 0, hidden, shared_width)


def _swiglu(
    component: str, count: int, hidden: int, width: int, *, is_routed: bool = False
) -> tuple[_Linear, ...]:
    up = _Linear(component, count, 2 * width, hidden, is_routed)
    return (up, _Linear(component, count, hidden, width, is_routed)) if count else ()


def _linear_bytes(
    linear: _Linear, quantization: Quantization, size: int, *, has_experts: bool
) -> tuple[int, int]:
    """(data, scales) of all its matrices; the rule is that of workers/quant.py."""
    rows, elements = linear.copies * linear.outputs, linear.copies * linear.outputs * linear.inputs
    if quantization in ("auto", "bfloat16"):
        return elements * size, 0
    is_beside_experts = has_experts and not linear.is_routed
    if quantization == "wint8" or (quantization == "wint4" and is_beside_experts):
        return elements, rows * _SCALE_BYTES
    groups = _GROUPS[-1:] if is_beside_experts else _GROUPS
    group = next((group for group in groups if linear.inputs % group == 0), 0)
    if not group:
        raise ConfigError(
            f"--quantization {quantization} needs a multiple of {_GROUPS[-1]} inputs per rank, but "
            f"{linear.component} have {linear.inputs}; use wint8 or a smaller --tensor-parallel-size"
        )
    return elements // 2, elements // group * _SCALE_BYTES


def _quantised_head(model: ModelConfig, world: int, quantization: Quantization) -> tuple[int, int]:
    """(data, scales) on a host; the rule is that of workers/quant.py."""
    elements, group = _vocabulary(model, world), _GROUPS[-1]
    if quantization == "wint4-all" and model.hidden_size % group == 0:
        return elements // 2, elements // group * _SCALE_BYTES
    return elements, elements // model.hidden_size * _SCALE_BYTES


def _vision_elements(vision: VisionConfig) -> int:
    width, inner = vision.hidden_size, vision.intermediate_size
    norms = 4 * width  # two norms with biases
    block = 4 * width**2 + 4 * width + 2 * width * inner + inner + width + norms
    return vision.patch_features * width + vision.depth * block + 2 * width


def _resampler_elements(vision: VisionConfig, hidden: int) -> int:
    width = vision.merged_size
    spatial = 2 * (width**2 + width) + 2 * width
    temporal = (vision.temporal_merge * width**2 + width) + (width**2 + width) + 2 * width
    return spatial + temporal + (width * hidden + hidden) + hidden
