"""Prompts for measuring quality: built-in ones, or a file's, as token ids.

Plain text without a chat template: what counts is that the model meets ordinary tokens. The server's
tokenizer, with templates and media, is the api's business.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from engine.errors import ConfigError

BUILT_IN = (
    "The lighthouse keeper climbed the stairs every evening at dusk, trimmed the wick, and wrote one line"
    " about the weather into a book that nobody had asked him to keep.",
    "To compute the area of a circle, square its radius and multiply by pi. A circle with a radius of 3"
    " metres therefore covers about 28.27 square metres; with twice the radius it covers four times that.",
    "def fibonacci(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n"
    "    return a\n",
    "春天来了，河边的柳树长出了嫩绿的新芽。孩子们在草地上放风筝，老人们坐在长椅上聊天，远处传来火车的汽笛声。",
    "| city | population | country |\n|---|---|---|\n| Lagos | 15.4 million | Nigeria |\n"
    "| Lima | 11.2 million | Peru |\n",
    "Q: Which planet has the most moons?\nA: Saturn, with more than one hundred and forty known moons.\n"
    "Q: And which has none?\nA: Mercury and Venus have none.",
)
_MODELS = ("tokenizer.model", "spm.model", "ernie_token_100k.model")


def read_prompts(file: str, folder: Path, vocab_size: int) -> list[list[int]]:
    """Token ids of every prompt. `file` has one prompt per line: text, or a JSON list of ids; "" is built in.

    Raises ConfigError when the file or the tokenizer cannot be used.
    """
    lines = list(BUILT_IN)
    if file:
        try:
            lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts {file} cannot be read: {error}") from None
    encode: Callable[[str], list[int]] | None = None
    prompts = []
    for line in lines:
        ids = _given_ids(line)
        if ids is None:
            encode = encode or _open_tokenizer(folder)
            ids = encode(line)
        if not ids or not all(0 <= token < vocab_size for token in ids):
            raise ConfigError(f"the prompt {line[:40]!r} has no tokens, or some beyond the vocabulary")
        prompts.append(ids)
    if not prompts:
        raise ConfigError(f"--prompts {file} holds no prompt; write one per line")
    return prompts


def _given_ids(line: str) -> list[int] | None:
    if not line.startswith("["):
        return None
    try:
        ids = json.loads(line)
    except ValueError:
        return None
    is_list = isinstance(ids, list) and all(isinstance(token, int) for token in ids)
    return ids if is_list else None


def _open_tokenizer(folder: Path) -> Callable[[str], list[int]]:
    for name in _MODELS:
        if (folder / name).is_file():
            from sentencepiece import SentencePieceProcessor

            processor = SentencePieceProcessor(model_file=str(folder / name))
            return lambda text: list(processor.encode(text))
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)
    raise ConfigError(f"{folder} has no tokenizer; give --prompts with lists of token ids, as in [1, 2, 3]")
