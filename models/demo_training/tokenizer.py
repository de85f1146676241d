"""The demo model's tokenizer: SentencePiece trained on what the generators say.

    python -m models.demo_training.tokenizer FOLDER      writes tokenizer, template and settings files

Special tokens, their order and the files beside the model are those of the tiny checkpoints. The words that
are read from pictures or copied are left out of the corpus on purpose: they stay letters and small pieces,
so that every letter is seen often, while the phrases of questions and answers become whole words.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from models.demo_training.config import preprocessor_config
from models.demo_training.lexicon import CITIES, NAMES, SUBJECTS
from models.demo_training.names import COLOURS, LANGUAGES, PLACES, SHAPES
from models.demo_training.sample import Sample, rng_for
from models.demo_training.skills import SKILLS
from models.tiny import write_companions
from models.tiny_tokenizer import SENTENCEPIECE_SIZE, end_token_ids, write_json

SPECIAL_PIECES = ("<|begin_of_sentence|>", "<|end_of_sentence|>", "<mask:1>")
STRUCTURE_PIECES = tuple(
    f"<{slash}{name}>"
    for name in ("think", "tool_call", "tool_list", "tool_output", "response")
    for slash in ("", "/")
)
COPIES = frozenset({"words", "repeat"})  # skills whose texts are letters to copy, not phrases to learn
SAMPLES_PER_SKILL = 300


def write_tokenizer_folder(folder: Path, seed: int = 0, samples_per_skill: int = SAMPLES_PER_SKILL) -> None:
    """Everything of a checkpoint but its configuration and weights."""
    write_companions(folder, published_ids=False)
    (folder / "tokenizer.model").write_bytes(train(corpus(seed, samples_per_skill)))
    write_json(folder / "preprocessor_config.json", preprocessor_config())


def corpus(seed: int, samples_per_skill: int) -> Iterator[str]:
    """Lines of text from the tokenizer's own sample space."""
    for skill, draw in SKILLS.items():
        if skill in COPIES:
            continue
        for index in range(samples_per_skill):
            for text in _texts(draw(rng_for("tokenizer", seed, skill, index))):
                yield from text.split("\n")
    for language in LANGUAGES:
        for words in (CITIES[language], NAMES[language], SUBJECTS[language]):
            yield from words
    yield from ("User: ", "Assistant: ", "Picture 1:", "Video 1:") * samples_per_skill


def _texts(sample: Sample) -> Iterator[str]:
    for message in sample.messages:
        content = message["content"]
        yield from (
            [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
        )
    for tool in sample.tools:
        yield json.dumps(tool, ensure_ascii=False)
    yield sample.answer
    if sample.reasoning is not None:
        yield sample.reasoning


def train(lines: Iterator[str]) -> bytes:
    """A byte-fallback BPE model without dummy prefix and normalisation; digits are tokens of their own.

    Lines are cut at structure tags, which are pieces already, and around the world's Chinese names: without
    blanks whole sentences would become one piece, and a red circle another word than a blue one.
    """
    model = io.BytesIO()
    names = [n.zh for table in (COLOURS, SHAPES, PLACES) for n in table.values()]
    cuts = re.compile(f"{'|'.join(map(re.escape, STRUCTURE_PIECES))}|({'|'.join(names)}|[个和在有，。？])")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(part for line in lines for part in cuts.split(line) if part and part.strip()),
        model_writer=model,
        model_type="bpe",
        vocab_size=SENTENCEPIECE_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        normalization_rule_name="identity",
        user_defined_symbols=[*"0123456789", "\n", *SPECIAL_PIECES, *STRUCTURE_PIECES],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,  # with more, the result may depend on timing
        minloglevel=2,
    )
    _check_ids(model.getvalue())
    return model.getvalue()


def _check_ids(model: bytes) -> None:
    """The end tokens must lie where the configuration says they do."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    assert (2, processor.piece_to_id("<|end_of_sentence|>")) == end_token_ids()
    assert processor.get_piece_size() == SENTENCEPIECE_SIZE


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m models.demo_training.tokenizer")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_tokenizer_folder(options.folder, options.seed)


if __name__ == "__main__":
    main()
