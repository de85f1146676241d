"""The server's wint8 and wint4, applied to fp32 weights: to train for them and to see what they cost.

wint8: symmetric int8 per output channel in every decoder linear. wint4: routed experts int4 in groups along
the input axis, the rest as wint8. Embeddings, norms, routers, tower and resampler stay (specification 8.1,
design D7).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from models.demo_training.model import Model

Quantization = Literal["bfloat16", "wint8", "wint4"]
GROUP, SMALL_GROUP = 64, 32  # inputs; the small one where a rank's share is no multiple of 64


def round_trip(weight: torch.Tensor, bits: int, group: int = 0) -> torch.Tensor:
    """Quantise and dequantise along the last axis, in whole rows if `group` is 0. Scales are bf16."""
    largest = 2 ** (bits - 1) - 1
    rows = weight.reshape(*weight.shape[:-1], -1, group or weight.shape[-1])
    scale = (rows.abs().amax(-1, keepdim=True) / largest).bfloat16().float()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    steps = rows / scale
    rounded = torch.sign(steps) * torch.floor(steps.abs() + 0.5)
    return (rounded.clamp(-largest, largest) * scale).reshape(weight.shape)


@contextmanager
def quantised(model: Model, quantization: Quantization, ranks: int = 1) -> Iterator[None]:
    """Inside, the decoder computes with quantised weights; gradients go to the originals, which come back
    after.

    ranks  of tensor parallelism, which decides the groups of the experts' down matrices
    """
    originals: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    try:
        for name, parameter in model.model.language_model.named_parameters():
            how = _how(name, parameter, quantization, ranks)
            if how is not None:
                originals.append((parameter, parameter.data))
                parameter.data = round_trip(parameter.data, *how)
        yield
    finally:
        for parameter, data in originals:
            parameter.data = data


def _how(
    name: str, parameter: torch.nn.Parameter, quantization: Quantization, ranks: int
) -> tuple[int, int] | None:
    """(bits, group) of a weight, None if it stays."""
    if quantization == "bfloat16" or parameter.ndim < 2 or "embed_tokens" in name or ".gate." in name:
        return None
    if ".experts." in name and quantization == "wint4":
        share = parameter.shape[-1] // (ranks if name.endswith("down_proj") else 1)
        return 4, GROUP if share % GROUP == 0 else SMALL_GROUP
    return 8, 0
