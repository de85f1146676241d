"""The model to train: transformers' own ERNIE-4.5-VL classes in fp32, initialised as suits its size."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

from models.demo_training.experts import IMPLEMENTATION
from models.demo_training.fast_vision import pair_frames
from models.demo_training.pixels import Normaliser
from models.demo_training.tutor import add_heads
from models.demo_training.whitening import drawn_patches, whitening
from models.tiny_config import TinyModel, transformers_config

Model = Ernie4_5_VLMoeForConditionalGeneration

# Picture features come out of a norm with the size of its weight: start near that of word embeddings.
EMBEDDING_STD = 0.06
FEATURE_SCALE = 0.2
_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "down_proj", "attn.proj.weight", "mlp.fc2.weight")


def build_model(sizes: TinyModel, seed: int, device: str = "cpu") -> Model:
    """A freshly initialised model in training mode."""
    model: Any = Model(hugging_face_config(sizes))
    add_heads(model, sizes.vision_hidden, sizes.hidden_size)
    initialise(model, seed)
    _let_see(model)
    model.model.resampler_model._temporal_slicing = pair_frames
    trained: Model = model.to(device).train()
    return trained


def hugging_face_config(sizes: TinyModel) -> Ernie4_5_VLMoeConfig:
    spelled: dict[str, Any] = transformers_config(sizes)
    for part in (spelled, spelled["text_config"]):
        part["dtype"] = "float32"  # what training holds; the export rounds
    del spelled["model_type"], spelled["architectures"]
    config = Ernie4_5_VLMoeConfig(**spelled)
    config._attn_implementation = "sdpa"
    config._experts_implementation = IMPLEMENTATION
    return config


@torch.no_grad()
def _let_see(model: Any) -> None:
    """The patch embedding is not trained; see whitening.py."""
    embedding = model.model.vision_tower.patch_embed.proj
    pixels = Normaliser(torch.device("cpu"))(torch.as_tensor(drawn_patches()))
    embedding.weight.copy_(whitening(pixels, len(embedding.weight)))
    embedding.weight.requires_grad_(False)


@torch.no_grad()
def initialise(model: Any, seed: int) -> None:
    """Normal with variance 1/inputs, less where a layer writes into the residual stream; fixed order."""
    generator = torch.Generator().manual_seed(seed)
    depth = {"vision_tower": model.config.vision_config.depth, "": model.config.text_config.num_hidden_layers}
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith(("bias", "e_score_correction_bias")):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(FEATURE_SCALE if "after_norm" in name else 1.0)
        elif "embed_tokens" in name:
            parameter.normal_(0.0, EMBEDDING_STD, generator=generator)
        elif not name.startswith("lm_head"):  # tied
            std = 0.8 / math.sqrt(parameter.shape[-1])
            if name.endswith(_RESIDUAL_OUTPUTS) and "resampler" not in name:
                std /= math.sqrt(2 * depth["vision_tower" if "vision_tower" in name else ""])
            parameter.normal_(0.0, std, generator=generator)
