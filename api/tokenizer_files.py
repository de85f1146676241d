"""Reads a tokenizer folder: pieces, special tokens and an encoder that never emits a marker.

Two formats: SentencePiece (`tokenizer.model`, also under its older names) and `tokenizer.json`. Both are
loaded with their markers taken out of the matching rules, so that text which spells one is
encoded as ordinary pieces. What is done with the result is in tokenizer.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from api.markers import is_marker_name
from engine.errors import ConfigError

SENTENCEPIECE_FILES = ("tokenizer.model", "spm.model", "ernie_token_100k.model")

_METASPACE = "\u2581"
# SentencePiece.Type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6


@dataclass
class TokenizerFiles:
    """pieces[i] is the UTF-8 that token i writes; markers maps names to ids; encode takes plain text."""

    pieces: list[bytes]
    markers: dict[str, int]
    encode: Callable[[str], list[int]]
    longest_piece: int  # characters


@dataclass
class _AddedTokens:
    """Tokens beside the vocabulary, from every file that may list them."""

    ids: dict[str, int] = field(default_factory=dict)
    special: set[str] = field(default_factory=set)


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Raises ConfigError when the folder holds no tokenizer that can be read."""
    added = _read_added_tokens(folder)
    for name in SENTENCEPIECE_FILES:
        if (folder / name).is_file():
            return _read_sentencepiece(folder / name, added)
    if (folder / "tokenizer.json").is_file():
        return _read_tokenizer_json(folder / "tokenizer.json", added)
    raise ConfigError(
        f"{folder} holds no tokenizer: expected tokenizer.model or tokenizer.json. "
        "Give a folder that has one with --tokenizer."
    )


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}. Download the file again.") from None


def _read_added_tokens(folder: Path) -> _AddedTokens:
    added = _AddedTokens()
    for name, token_id in _read_json(folder / "added_tokens.json").items():
        added.ids[name] = int(token_id)
    config = _read_json(folder / "tokenizer_config.json")
    for token_id, token in config.get("added_tokens_decoder", {}).items():
        added.ids[token["content"]] = int(token_id)
        if token.get("special"):
            added.special.add(token["content"])
    for named in (config, _read_json(folder / "special_tokens_map.json")):
        added.special.update(_special_names(named))
    return added


def _special_names(named: dict[str, Any]) -> set[str]:
    """Names in `bos_token`, ..., `additional_special_tokens`; each is a string or has `content`."""
    values = [value for key, value in named.items() if key.endswith("_token")]
    values += named.get("additional_special_tokens") or []
    names = (value.get("content") if isinstance(value, dict) else value for value in values)
    return {name for name in names if isinstance(name, str) and name}


def _place_added(pieces: list[bytes], markers: dict[str, int], added: _AddedTokens) -> None:
    for name, token_id in added.ids.items():
        if token_id >= len(pieces):
            pieces.extend([b""] * (token_id + 1 - len(pieces)))
        if name in added.special or is_marker_name(name):
            markers[name] = token_id
        pieces[token_id] = name.encode()


# SentencePiece ------------------------------------------------------------------------------------


def _read_sentencepiece(path: Path, added: _AddedTokens) -> TokenizerFiles:
    import sentencepiece

    try:
        messages = _model_fields(path.read_bytes())
        rows = [_parse_piece(body) if number == 1 else None for number, body in messages]
        encoded = b"".join(
            _field(number, _as_control(body) if row and _steers(row, added) else body)
            for (number, body), row in zip(messages, rows, strict=True)
            if number != 4  # self-test samples, which may spell markers
        )
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(encoded)
    except (ValueError, IndexError, RuntimeError) as error:
        raise ConfigError(f"{path} is not a SentencePiece model: {error}.") from None
    vocabulary = [row for row in rows if row]
    pieces = [_piece_bytes(name, kind) for name, kind in vocabulary]
    markers = {row[0]: token_id for token_id, row in enumerate(vocabulary) if _steers(row, added)}
    _place_added(pieces, markers, added)
    longest = max((len(name) for name, _ in vocabulary), default=1)
    return TokenizerFiles(pieces, markers, lambda text: processor.encode(text, out_type=int), longest)


def _steers(row: tuple[str, int], added: _AddedTokens) -> bool:
    name, kind = row
    if kind in (_CONTROL, _UNKNOWN):
        return True
    return kind != _BYTE and (name in added.special or is_marker_name(name))


def _piece_bytes(name: str, kind: int) -> bytes:
    if kind == _BYTE:
        return bytes([int(name[3:-1], 16)])  # <0x0A>
    return name.replace(_METASPACE, " ").encode()


def _model_fields(data: bytes) -> list[tuple[int, bytes]]:
    """The top-level (field number, body) pairs of a ModelProto; all its fields are messages."""
    fields, position = [], 0
    while position < len(data):
        key, position = _varint(data, position)
        if key & 7 != 2:
            raise ValueError("unexpected wire type")
        size, position = _varint(data, position)
        if position + size > len(data):
            raise ValueError("the file is cut short")
        fields.append((key >> 3, data[position : position + size]))
        position += size
    return fields


def _parse_piece(body: bytes) -> tuple[str, int]:
    """(name, type) of a ModelProto.SentencePiece: 1 string, 2 float score, 3 enum."""
    name, kind, position = "", _NORMAL, 0
    while position < len(body):
        key, position = _varint(body, position)
        if key == 0x0A:
            size, position = _varint(body, position)
            name, position = body[position : position + size].decode(), position + size
        elif key == 0x18:
            kind, position = _varint(body, position)
        elif key == 0x15:
            position += 4
        else:
            raise ValueError("unexpected field in a piece")
    return name, kind


def _as_control(piece: bytes) -> bytes:
    """Control pieces are never matched in text. The last value of a protobuf field counts."""
    _, kind = _parse_piece(piece)
    return piece if kind == _UNKNOWN else piece + bytes([0x18, _CONTROL])


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _field(number: int, body: bytes) -> bytes:
    size, encoded = len(body), bytearray([number << 3 | 2])
    while size > 0x7F:
        encoded.append(size & 0x7F | 0x80)
        size >>= 7
    encoded.append(size)
    return bytes(encoded) + body


# tokenizer.json -----------------------------------------------------------------------------------


def _read_tokenizer_json(path: Path, added: _AddedTokens) -> TokenizerFiles:
    import tokenizers

    content = _read_json(path)
    ordinary = []
    for token in content.get("added_tokens") or []:
        added.ids[token["content"]] = int(token["id"])
        if token.get("special"):
            added.special.add(token["content"])
        if token["content"] not in added.special and not is_marker_name(token["content"]):
            ordinary.append(token)
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps({**content, "added_tokens": ordinary}))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=False)
    to_bytes = _byte_level_bytes if _uses_byte_level(content) else _metaspace_bytes
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for name, token_id in vocabulary.items():
        pieces[token_id] = to_bytes(name)
    markers: dict[str, int] = {
        name: token_id
        for name, token_id in vocabulary.items()
        if name in added.special or is_marker_name(name)
    }
    _place_added(pieces, markers, added)
    return TokenizerFiles(
        pieces,
        markers,
        lambda text: backend.encode(text, add_special_tokens=False).ids,
        max(map(len, vocabulary), default=1),
    )


def _uses_byte_level(content: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps([content.get("decoder"), content.get("pre_tokenizer")])


def _metaspace_bytes(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    return name.replace(_METASPACE, " ").encode()


def _byte_level_table() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_table()


def _byte_level_bytes(name: str) -> bytes:
    if all(character in _BYTE_LEVEL for character in name):
        return bytes(_BYTE_LEVEL[character] for character in name)
    return name.encode()
