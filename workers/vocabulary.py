"""How many token ids the tokenizer knows: rows of the vocabulary from there on are padding.

Reads only the id tables in a checkpoint's JSON files; turning text into ids is the api's business.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def count_token_ids(folder: Path) -> int:
    """One more than the highest id named in the folder's tokenizer files; 0 if none names any."""
    ids = [
        *_added_ids(_read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")),
        *_added_ids(_swapped(_read_json(folder / "added_tokens.json"))),
        *_tokenizer_json_ids(_read_json(folder / "tokenizer.json")),
    ]
    return max(ids, default=-1) + 1


def _added_ids(by_id: Any) -> list[int]:
    """Keys like "100295" of a table by id."""
    return [int(key) for key in by_id if str(key).isdecimal()] if isinstance(by_id, dict) else []


def _swapped(by_name: dict[str, Any]) -> dict[Any, str]:
    return {value: name for name, value in by_name.items() if isinstance(value, int)}


def _tokenizer_json_ids(tokenizer: dict[str, Any]) -> list[int]:
    added = [entry.get("id") for entry in tokenizer.get("added_tokens") or [] if isinstance(entry, dict)]
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    size = [len(vocab) - 1] if vocab else []  # a dict by name or a list of pieces: ids are dense
    return [token_id for token_id in added if isinstance(token_id, int)] + size


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a file; empty when there is no such file (the api reports a broken one)."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
