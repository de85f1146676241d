"""How many fresh samples of each skill the model answers right, by greedy decoding inside PyTorch.

    python -m models.demo_training.evaluate RUN [--samples 200] [--quantization wint4 --ranks 8] [--device
    cuda]

The samples come from the evaluation space, which no training sample shares. The same samples go through the
served API with evaluate_served.py; this one needs no server and runs during training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from models.demo_training import checkpoint
from models.demo_training.config import demo_model
from models.demo_training.encode import Encoder
from models.demo_training.fake_quant import Quantization, quantised
from models.demo_training.forward import Normaliser
from models.demo_training.generate import greedy
from models.demo_training.low_precision import LowPrecision, fast_dtype
from models.demo_training.model import Model, build_model
from models.demo_training.sample import Sample, rng_for
from models.demo_training.scores import Score, is_right, save, table
from models.demo_training.skills import SKILLS

EVALUATION_SEED = 0
MAX_ANSWER_TOKENS = 160
BATCH = 64


def evaluation_samples(skill: str, count: int, seed: int = EVALUATION_SEED) -> list[Sample]:
    return [SKILLS[skill](rng_for("evaluation", seed, skill, index)) for index in range(count)]


@torch.no_grad()
def evaluate(
    model: Model,
    encoder: Encoder,
    skills: tuple[str, ...],
    samples_per_skill: int,
    on_answer: Callable[[Sample, str, bool], None] | None = None,
) -> dict[str, Score]:
    """Scores by skill; the model is left in the mode it had."""
    was_training = model.training
    model.eval()
    scores = {skill: Score() for skill in skills}
    samples = [s for skill in skills for s in evaluation_samples(skill, samples_per_skill)]
    encoded = [(s, encoder.encode(s, with_target=False)) for s in samples]
    encoded.sort(key=lambda pair: len(pair[1].token_ids))
    normalise = Normaliser(next(model.parameters()).device)
    for start in range(0, len(encoded), BATCH):
        part = encoded[start : start + BATCH]
        written = greedy(
            model, normalise, [e for _, e in part], MAX_ANSWER_TOKENS, encoder.tokenizer.end_token_ids
        )
        for (sample, _), token_ids in zip(part, written, strict=True):
            text = encoder.decode(token_ids)
            right = is_right(sample, text)
            scores[sample.skill].right += right
            scores[sample.skill].total += 1
            if on_answer is not None:
                on_answer(sample, text, right)
    model.train(was_training)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.demo_training.evaluate")
    parser.add_argument("run", type=Path, help="folder given to train.py as --out")
    parser.add_argument("--samples", type=int, default=200, help="per skill")
    parser.add_argument("--skills", default=",".join(SKILLS))
    parser.add_argument("--quantization", choices=("bfloat16", "wint8", "wint4"), default="bfloat16")
    parser.add_argument("--ranks", type=int, default=1, help="of tensor parallelism, for wint4's groups")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mistakes", action="store_true", help="print wrong answers")
    parser.add_argument("--name", default="", help="column of the model card to save the scores in")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; 0 for its own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = build_model(demo_model(), seed=0, device=options.device)
    folder = checkpoint.latest(options.run / "checkpoint")
    if folder is None:
        parser.error(f"{options.run} has no checkpoint; train one first with models.demo_training.train.")
    checkpoint.load_weights(model, folder / "weights.safetensors")
    quantization: Quantization = options.quantization
    with quantised(model, quantization, options.ranks):
        computing = LowPrecision(model, fast_dtype(torch.device(options.device))).copy
        scores = evaluate(
            computing,
            Encoder(options.run / "tokenizer"),
            tuple(options.skills.split(",")),
            options.samples,
            _print_mistake if options.mistakes else None,
        )
    print(table(scores))
    if options.name:
        save(options.run, options.name, scores)


def _print_mistake(sample: Sample, written: str, right: bool) -> None:
    if not right:
        print(f"{sample.skill}: expected {sample.answer!r}, got {written!r}")


if __name__ == "__main__":
    main()
