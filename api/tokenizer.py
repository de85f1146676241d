"""Text to token ids and back, with the model's markers looked up by name.

Text from clients goes through `encode`, which cannot produce a marker; the chat template's own markers
enter as ids (`encode_with_specials`). Reading the files is in tokenizer_files.py.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from api.markers import STRUCTURE_MARKERS, MarkerScanner
from api.tokenizer_files import TokenizerFiles, read_tokenizer_files
from engine.errors import ConfigError, RequestError
from engine.grammar import Vocabulary

_END_NAMES = ("</s>", "<|end_of_sentence|>", "<|im_end|>")


def load_tokenizer(folder: str | Path, model_folder: str | Path | None = None) -> Tokenizer:
    """Read a tokenizer; end tokens also come from generation_config.json of `model_folder`."""
    folder = Path(folder)
    files = read_tokenizer_files(folder)
    return Tokenizer(files, _generation_end_ids(Path(model_folder or folder)))


class Tokenizer:
    """Immutable once made; safe to use from several threads."""

    def __init__(self, files: TokenizerFiles, extra_end_ids: Iterable[int] = ()) -> None:
        self.vocab_size = len(files.pieces)  # one more than the largest id
        self.markers = files.markers
        self.longest_piece = files.longest_piece  # characters that one token can stand for
        self.end_token_ids: tuple[int, ...] = tuple(
            sorted({files.markers[name] for name in _END_NAMES if name in files.markers} | set(extra_end_ids))
        )
        self._encode = files.encode
        self._scanner = MarkerScanner(files.markers)
        self._marker_ids = frozenset(files.markers.values())
        self._names = {token_id: name for name, token_id in files.markers.items()}
        self._pieces = files.pieces
        self._tables: dict[frozenset[str], list[bytes]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; a marker spelled in it is encoded as the characters it has.

        Raises RequestError when the text has unpaired surrogates, which no encoding can write.
        """
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError(
                "The text contains an unpaired surrogate (\\ud800 to \\udfff); send valid Unicode."
            ) from None
        token_ids = self._encode(text)
        if self._marker_ids.isdisjoint(token_ids) or not self._spells_marker(text):
            return token_ids
        return self._encode_broken(text)

    def encode_with_specials(self, segments: Iterable[str | int]) -> list[int]:
        """Concatenate: strings are encoded as plain text, each on its own; ints are taken as they are."""
        token_ids: list[int] = []
        for segment in segments:
            if isinstance(segment, int):
                token_ids.append(segment)
            else:
                token_ids.extend(self.encode(segment))
        return token_ids

    def token_id(self, name: str) -> int | None:
        """Id of a marker, or of the one token that `name` is encoded as; None if there is none."""
        if name in self.markers:
            return self.markers[name]
        token_ids = self.encode(name)
        return token_ids[0] if len(token_ids) == 1 and self._pieces[token_ids[0]] == name.encode() else None

    def vocabulary(self, end_ids: Sequence[int] = ()) -> Vocabulary:
        """For grammars; `end_ids` are those that end answers, by default all that the tokenizer knows."""
        ends = [token_id for token_id in end_ids or self.end_token_ids if token_id < self.vocab_size]
        return Vocabulary(self._pieces, sorted(self._marker_ids), ends)

    def detokenizer(self, keep: Iterable[str] = STRUCTURE_MARKERS) -> Detokenizer:
        """For one stream. Markers write nothing, except those named in `keep`."""
        return Detokenizer(self._table(frozenset(keep)))

    def decode(self, token_ids: Sequence[int], keep: Iterable[str] = STRUCTURE_MARKERS) -> str:
        detokenizer = self.detokenizer(keep)
        return detokenizer.add(token_ids) + detokenizer.flush()

    def decode_token(self, token_id: int) -> tuple[str, bytes]:
        """What logprobs show: the text (U+FFFD where it is not whole characters) and the exact bytes."""
        if token_id in self._names:
            name = self._names[token_id]
            return name, name.encode()
        piece = self._pieces[token_id] if 0 <= token_id < self.vocab_size else b""
        return piece.decode("utf-8", "replace"), piece

    def _table(self, keep: frozenset[str]) -> list[bytes]:
        keep = keep.intersection(self.markers)
        if keep not in self._tables:
            if len(self._tables) > 8:  # callers choose among a few; never let them grow without end
                self._tables.clear()
            table = self._pieces.copy()
            for name, token_id in self.markers.items():
                table[token_id] = name.encode() if name in keep else b""
            self._tables[keep] = table
        return self._tables[keep]

    def _spells_marker(self, text: str) -> bool:
        return any(is_marker for _, is_marker in self._scanner.split(text))

    def _encode_broken(self, text: str) -> list[int]:
        """Encode a text whose merges rebuild a marker, by cutting every marker behind its first character."""
        token_ids: list[int] = []
        rest = ""
        for piece, is_marker in self._scanner.split(text):
            token_ids += self._encode(rest + (piece[:1] if is_marker else piece))
            rest = piece[1:] if is_marker else ""
        return token_ids + (self._encode(rest) if rest else [])


class Detokenizer:
    """Turns a growing list of ids into text deltas; concatenated they are the text of the whole list.

    A character is held back until all its bytes are there; bytes that can never become one turn into
    U+FFFD. The work per id does not depend on how many came before.
    """

    def __init__(self, table: list[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_ids: Iterable[int]) -> str:
        table, size = self._table, len(self._table)
        return self._decoder.decode(b"".join([table[i] if 0 <= i < size else b"" for i in token_ids]))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)


def _generation_end_ids(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}. Download the file again.") from None
    values = value if isinstance(value, list) else [value]
    return [int(token_id) for token_id in values if token_id is not None]
