"""What clients can and cannot make the tokenizer do, in both file formats."""

from __future__ import annotations

import time
from itertools import combinations
from pathlib import Path

import pytest

from api.tokenizer import Tokenizer, load_tokenizer
from engine.errors import ConfigError, RequestError
from tests.api.tokenizer_builders import (
    MEDIA_MARKERS,
    PIECE_MARKERS,
    write_sentencepiece,
    write_tokenizer_json,
)

KINDS = ("added", "pieces", "json")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "added": load_tokenizer(write_sentencepiece(folder / "added")),
        "pieces": load_tokenizer(write_sentencepiece(folder / "pieces", with_media=True)),
        "json": load_tokenizer(write_tokenizer_json(folder / "json")),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marker", [*MEDIA_MARKERS, *PIECE_MARKERS, "</s>", "<s>"])
def test_text_that_spells_a_marker_is_encoded_as_its_characters(
    tokenizers: dict[str, Tokenizer], kind: str, marker: str
) -> None:
    tokenizer = tokenizers[kind]
    for text in (marker, f"see {marker} here", marker * 3, marker[:-1] + marker):
        token_ids = tokenizer.encode(text)
        assert not set(token_ids) & set(tokenizer.markers.values()), f"{text!r} became {token_ids}"
        assert tokenizer.decode(token_ids) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    [
        "What kind of dog is this?",
        "  two spaces, a\ttab\nand lines\n\n",
        "图片里有一只猫。",
        "emoji 👩‍👩‍👧 and 🇩🇪, naïve, \u2028 separator",
        "0123456789 007",
        "a < b <div> <| |> <unk>",
        "",
    ],
)
def test_decoding_gives_back_what_was_encoded(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_every_split_of_a_stream_gives_the_text_of_the_whole(
    tokenizers: dict[str, Tokenizer], kind: str
) -> None:
    tokenizer = tokenizers[kind]
    token_ids = tokenizer.encode("a 猫鼬 🦦é")
    whole = tokenizer.decode(token_ids)
    assert whole == "a 猫鼬 🦦é"
    for first, second in combinations(range(len(token_ids) + 1), 2):
        stream = tokenizer.detokenizer()
        parts = [token_ids[:first], token_ids[first:second], token_ids[second:]]
        assert "".join([*map(stream.add, parts), stream.flush()]) == whole, (first, second)


def test_no_delta_holds_half_a_character(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["added"]
    stream = tokenizer.detokenizer()
    deltas = [stream.add([token_id]) for token_id in tokenizer.encode("🦦")]
    assert deltas == ["", "", "", "🦦"]


def test_bytes_that_are_no_character_become_replacement_signs_at_every_split(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers["added"]
    broken = tokenizer.encode("🦦")[:3] + tokenizer.encode("ok") + tokenizer.encode("é")[:1]
    whole = tokenizer.decode(broken)
    assert whole == "\ufffdok\ufffd"
    for at in range(len(broken) + 1):
        stream = tokenizer.detokenizer()
        assert stream.add(broken[:at]) + stream.add(broken[at:]) + stream.flush() == whole, at


def test_markers_write_nothing_but_the_kept_ones(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["pieces"]
    think, end = tokenizer.markers["</think>"], tokenizer.markers["<|end_of_sentence|>"]
    token_ids = [*tokenizer.encode("so"), think, *tokenizer.encode("yes"), end, 10**6]
    assert tokenizer.decode(token_ids) == "so</think>yes"
    assert tokenizer.decode(token_ids, keep=()) == "soyes"


def test_segments_are_encoded_each_on_its_own(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["added"]
    start = tokenizer.token_id("<|IMAGE_START|>")
    assert start == 641
    assert tokenizer.encode_with_specials(["Picture 1:", start, "Describe"]) == [
        *tokenizer.encode("Picture 1:"),
        start,
        *tokenizer.encode("Describe"),
    ]


def test_end_tokens_come_from_names_and_the_generation_config(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["added"]
    assert tokenizer.end_token_ids == tuple(sorted({2, 7, tokenizer.markers["<|end_of_sentence|>"]}))


def test_names_and_sizes_come_from_the_files(tokenizers: dict[str, Tokenizer]) -> None:
    assert tokenizers["added"].vocab_size == 640 + len(MEDIA_MARKERS)
    assert tokenizers["pieces"].vocab_size == 640
    assert tokenizers["added"].token_id("<|NO_SUCH_NAME|>") is None
    digit = tokenizers["added"].encode("7")
    assert digit == [tokenizers["added"].token_id("7")]


def test_a_single_token_is_shown_with_its_bytes(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["added"]
    first = tokenizer.encode("🦦")[0]
    assert tokenizer.decode_token(first) == ("\ufffd", "🦦".encode()[:1])
    assert tokenizer.decode_token(tokenizer.markers["</think>"]) == ("</think>", b"</think>")
    assert tokenizer.decode_token(10**6) == ("", b"")


def test_an_unpaired_surrogate_is_the_callers_mistake(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        with pytest.raises(RequestError, match="surrogate"):
            tokenizer.encode("a\ud800b")


def test_the_work_of_a_stream_does_not_grow_with_its_length(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["added"]
    token_ids = tokenizer.encode("The quick brown fox. ") * 4000

    def seconds(stream: object, part: list[int]) -> float:
        started = time.perf_counter()
        for token_id in part:
            stream.add([token_id])  # type: ignore[attr-defined]
        return time.perf_counter() - started

    stream = tokenizer.detokenizer()
    early = seconds(stream, token_ids[:2000])
    seconds(stream, token_ids[2000:-2000])
    late = seconds(stream, token_ids[-2000:])
    assert late < 10 * early + 0.05, f"{late:.4f} s at the end, {early:.4f} s at the start"


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.model or tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path)
    content = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        load_tokenizer(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tokenizer(folder)


def test_added_tokens_may_come_from_the_tokenizer_config(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path)
    (folder / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"700": {"content": "<|LOC_0|>", "special": false},'
        ' "701": {"content": "[STEER]", "special": true}}}'
    )
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.token_id("<|LOC_0|>"), tokenizer.token_id("[STEER]")) == (700, 701)
    assert tokenizer.vocab_size == 702
    assert not {700, 701} & set(tokenizer.encode("<|LOC_0|>[STEER]"))
