"""Tiny tokenizers with the model's marker names, trained once per test run."""

from __future__ import annotations

import io
import json
from functools import lru_cache
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from api.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "What kind of dog is this? Picture 1: Describe the image. Video 1: What happens?",
    "User: Hi there, please compare the pictures and count the circles.",
    "Assistant: There are three circles, one square and two triangles in the picture.",
    "图片里有一只猫和两只狗。视频里发生了什么？请描述这张图片。",
    "The quick brown fox jumps over the lazy dog while the cat is sleeping <div> here.",
]
MEDIA_MARKERS = (
    "<|IMAGE_PLACEHOLDER|>",
    "<|IMAGE_START|>",
    "<|IMAGE_END|>",
    "<|VIDEO_START|>",
    "<|VIDEO_END|>",
)
# The published model holds these as pieces; digits are user-defined so that each is one token.
PIECE_MARKERS = ("<|end_of_sentence|>", "<|begin_of_sentence|>", "<mask:1>", "<think>", "</think>")


@lru_cache
def sentencepiece_model(*, with_media: bool = False) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=640,
        byte_fallback=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=[*"0123456789", *PIECE_MARKERS, *(MEDIA_MARKERS if with_media else ())],
        minloglevel=2,
    )
    return model.getvalue()


def write_sentencepiece(folder: Path, *, with_media: bool = False) -> Path:
    """tokenizer.model; the media markers are pieces, or listed in added_tokens.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(with_media=with_media))
    if not with_media:
        added = {name: 640 + index for index, name in enumerate(MEDIA_MARKERS)}
        (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    return folder


@lru_cache
def tokenizer_json() -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    content = json.loads(tokenizer.to_str())
    # Bytes are pieces, not added tokens.
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
    size = len(content["model"]["vocab"])
    for index, name in enumerate((*PIECE_MARKERS, *MEDIA_MARKERS)):
        token = {"id": size + index, "content": name, "special": True}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        content["added_tokens"].append({**token, **flags})
    return json.dumps(content)


def write_tokenizer_json(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    return folder


def make_tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(write_sentencepiece(folder))
