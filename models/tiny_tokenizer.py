"""Tokenizer files with the real names of ERNIE-4.5-VL's special tokens, trained from tiny_corpus.txt.

Ids follow the published order: <unk>, <s>, </s>, the ten digits, then the other pieces; the media markers
come behind the SentencePiece model as added tokens. `published_ids` puts them where the real tokenizer
has them, so that a preset with random weights can be served without downloading anything.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece

from models.tiny_config import MediaIds

SENTENCEPIECE_SIZE = 2048
PUBLISHED_SENTENCEPIECE_SIZE = 100295
SEPARATOR = "<|end_of_sentence|>"

_CORPUS = Path(__file__).with_name("tiny_corpus.txt")
_NAMED = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "cls_token": "<|begin_of_sentence|>",
    "sep_token": SEPARATOR,
    "mask_token": "<mask:1>",
}
_STRUCTURE = [
    f"<{slash}{name}>"
    for name in ("think", "tool_call", "tool_list", "tool_output", "response")
    for slash in ("", "/")
]


def train_sentencepiece() -> bytes:
    """A byte-fallback BPE model without dummy prefix and without normalisation, as the real one."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS.read_text(encoding="utf-8").splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=SENTENCEPIECE_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=[*"0123456789", "\n", *_special_pieces(), *_STRUCTURE],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,  # with more, the result may depend on timing
        minloglevel=2,
    )
    return model.getvalue()


def added_tokens(*, published_ids: bool) -> dict[str, int]:
    """Name to id of the tokens behind the SentencePiece model, in the published order."""
    last_location = 1000 if published_ids else 9
    names = [
        "<|IMAGE_PLACEHOLDER|>",
        "<|AUDIO_PLACEHOLDER|>",
        *(f"<|LOC_{number}|>" for number in range(last_location + 1)),
        "<|LOC_BEGIN|>",
        "<|LOC_END|>",
        "<|LOC_SEP|>",
        "<|CROP_COL_SEP|>",
        "<|CROP_ROW_SEP|>",
        "<|IMAGE_SEP|>",
        "<|IMAGE_START|>",
        "<|IMAGE_END|>",
        "<|VIDEO_START|>",
        "<|VIDEO_END|>",
        "<|ASR_START|>",
        "<|ASR_END|>",
    ]
    first = PUBLISHED_SENTENCEPIECE_SIZE if published_ids else SENTENCEPIECE_SIZE
    return {name: first + offset for offset, name in enumerate(names)}


def _filler_tokens() -> dict[str, int]:
    """A word for every published id that the small SentencePiece model lacks.

    A model with random weights generates all ids alike; without these most of its output would be no text.
    """
    return {f" w{token_id}": token_id for token_id in range(SENTENCEPIECE_SIZE, PUBLISHED_SENTENCEPIECE_SIZE)}


def media_ids(added: dict[str, int]) -> MediaIds:
    names = ("IMAGE_PLACEHOLDER", "IMAGE_START", "IMAGE_END", "VIDEO_START", "VIDEO_END")
    return MediaIds(*(added[f"<|{name}|>"] for name in names))


def end_token_ids() -> tuple[int, int]:
    """</s> and the separator, which also ends an answer."""
    return 2, 3 + 10 + 1 + _special_pieces().index(SEPARATOR)


def write_tokenizer(folder: Path, *, published_ids: bool) -> None:
    """Write tokenizer.model and the three JSON files that real repositories have beside it."""
    added = added_tokens(published_ids=published_ids)
    (folder / "tokenizer.model").write_bytes(train_sentencepiece())
    write_json(folder / "added_tokens.json", (_filler_tokens() if published_ids else {}) | added)
    write_json(folder / "special_tokens_map.json", {**_NAMED, "additional_special_tokens": list(added)})
    write_json(
        folder / "tokenizer_config.json",
        {
            **_NAMED,
            "additional_special_tokens": list(added),
            "add_bos_token": False,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(token_id): {"content": name, "special": True} for name, token_id in added.items()
            },
        },
    )


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _special_pieces() -> list[str]:
    """Special tokens that the real SentencePiece model holds as pieces of its own."""
    return [_NAMED[role] for role in ("cls_token", "sep_token", "mask_token")]
