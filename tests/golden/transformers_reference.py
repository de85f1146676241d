"""Runs Hugging Face transformers' ERNIE-4.5-VL on a case: the independent implementation.

transformers reads the -PT layout by itself (`from_pretrained`), so its loader checks ours too. It has its own
conventions, translated here: videos have a placeholder of their own, pixels come normalised, and the token
types must be given or every token silently takes the text experts. Imports torch and transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import Ernie4_5_VLMoeForConditionalGeneration

from tests.golden.cases import NUM_GREEDY, Case, Media

_MEAN = np.repeat(np.array([0.48145466, 0.4578275, 0.40821073], np.float32), 14 * 14)
_STD = np.repeat(np.array([0.26862954, 0.26130258, 0.27577711], np.float32), 14 * 14)


class TransformersReference:
    """A checkpoint in the -PT layout, computed in fp32 without a cache."""

    def __init__(self, folder: Path) -> None:
        self.model = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        config = json.loads((folder / "config.json").read_text())
        self._patch_id = config["image_token_id"]
        self._video_id = config["video_token_id"]

    def logits(self, case: Case, generated: list[int] | None = None) -> np.ndarray:
        """[S, V] fp32 for the prompt, continued by `generated` text tokens."""
        generated = generated or []
        ids = np.concatenate([case.token_ids, np.array(generated, np.int32)]).astype(np.int64)
        moe_types = (ids >= self._patch_id).astype(np.int64)
        types = np.zeros_like(ids)
        for item in case.media:
            span = slice(item.offset, item.offset + item.num_tokens)
            types[span] = 1 if item.kind == "image" else 2
            ids[span] = self._patch_id if item.kind == "image" else self._video_id
        with torch.no_grad():
            out = self.model(
                input_ids=_row(ids),
                mm_token_type_ids=_row(types),
                moe_mm_token_type_ids=_row(moe_types),
                position_ids=self._positions(case, len(generated)),
                use_cache=False,
                **_pixels(case.media),
            )
        return out.logits[0].numpy()

    def greedy(self, case: Case) -> np.ndarray:
        """The likeliest text ids, one after the other; media ids are never generated."""
        ids: list[int] = []
        for _ in range(NUM_GREEDY):
            ids.append(int(np.argmax(self.logits(case, ids)[-1, : self._patch_id])))
        return np.array(ids, np.int32)

    def _positions(self, case: Case, num_generated: int) -> torch.Tensor | None:
        """Explicit where a video is, because transformers ends a video differently; else its own."""
        if all(item.kind == "image" for item in case.media):
            return None
        follow = int(case.positions.max()) + 1 + np.arange(num_generated)
        positions = np.concatenate([case.positions, np.tile(follow, (3, 1))], axis=1)
        return torch.from_numpy(positions.astype(np.int64))[:, None]


def _pixels(media: list[Media]) -> dict[str, torch.Tensor]:
    inputs = {}
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        items = [item for item in media if item.kind == kind]
        if items:
            patches = np.concatenate([item.patches for item in items]).astype(np.float32)
            inputs[pixels] = torch.from_numpy((patches / np.float32(255) - _MEAN) / _STD)
            inputs[grid] = torch.tensor([item.grid for item in items])
    return inputs


def _row(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values)[None]
