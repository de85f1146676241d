"""Ids that may be generated: known to the tokenizer, and no media markers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.workers.builders import make_text_config, make_tiny_config
from workers.sampler import allowed_bits
from workers.vocabulary import count_token_ids


def allowed_ids(bits: np.ndarray) -> set[int]:
    flags = np.unpackbits(bits.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(flags).tolist())


def test_padding_and_media_markers_are_never_generated():
    bits = allowed_bits(make_tiny_config(), padded_vocab_size=328, num_token_ids=310)
    assert bits.dtype == np.int32 and bits.shape == (11,)
    assert allowed_ids(bits) == set(range(310)) - {300, 301, 302, 303, 304}


def test_text_model_may_generate_its_whole_vocabulary():
    bits = allowed_bits(make_text_config(), padded_vocab_size=320, num_token_ids=320)
    assert allowed_ids(bits) == set(range(320))


def test_highest_added_token_tells_how_many_ids_there_are(tmp_path: Path):
    decoder = {"100273": {"content": "<|begin_of_sentence|>"}, "103366": {"content": "<unused>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|IMAGE_PLACEHOLDER|>": 100295}))
    assert count_token_ids(tmp_path) == 103367


def test_tokenizer_json_counts_its_pieces_and_added_tokens(tmp_path: Path):
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1, "c": 2}}, "added_tokens": [{"id": 9, "content": "<x>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert count_token_ids(tmp_path) == 10
    tokenizer["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert count_token_ids(tmp_path) == 3


def test_folder_without_tables_leaves_the_number_unknown(tmp_path: Path):
    (tmp_path / "added_tokens.json").write_text("not json")
    assert count_token_ids(tmp_path) == 0
