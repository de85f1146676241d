"""`./run.sh quality --model DIR [--quant wint4] [--prompts FILE] [--json OUT]`: what quantisation costs.

A table of relative errors per layer, and the divergence of the whole model's answers from those of its bf16
checkpoint. wint4 is shown with its groups of 64 inputs and with one scale per output channel. What the
columns mean is in quality.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import cuda_ops
from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.model_config import ModelConfig, read_model_config
from workers.device import open_device
from workers.quality import PER_CHANNEL, VARIANTS, VariantQuality, measure
from workers.quality_prompts import read_prompts

_CHOICES = {"wint8": ("wint8",), "wint4": ("wint4", PER_CHANNEL), "wint4-all": ("wint4-all",)}


def main(arguments: Sequence[str]) -> int:
    given = _parse(arguments)
    try:
        model = _read_model(given.model)
        prompts = read_prompts(given.prompts, Path(given.model), model.vocab_size)
        device = open_device(ServerConfig(), 0, lambda: None)
        cuda_ops.set_num_threads(given.cpu_threads or len(os.sched_getaffinity(0)))
        variants = _CHOICES[given.quant] if given.quant else VARIANTS
        found = measure(given.model, model, device, prompts, variants, _say_layer(model.num_layers))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    num_tokens = sum(map(len, prompts))
    print(table(found, num_tokens, len(prompts)))
    if given.json:
        report = {"model": given.model, "tokens": num_tokens, "variants": [asdict(one) for one in found]}
        Path(given.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0


def table(found: Sequence[VariantQuality], num_tokens: int, num_prompts: int) -> str:
    """Layers as rows, three columns per variant, then the whole model."""
    width = 27
    lines = [
        f"relative errors in % (weights, output, stream) of {num_tokens} tokens in {num_prompts} prompts",
        "",
    ]
    lines.append("layer  " + "".join(f"{one.name:>{width}}" for one in found))
    for layer in range(len(found[0].layers)):
        cells = [one.layers[layer] for one in found]
        lines.append(
            f"{layer:>5}  "
            + "".join(
                f"{100 * c.weights:>{width - 16}.2f}{100 * c.output:>8.2f}{100 * c.stream:>8.2f}"
                for c in cells
            )
        )
    lines.append("")
    for name, cell in (
        ("KL, mean", lambda one: f"{one.kl:.5f}"),
        ("KL, worst", lambda one: f"{one.kl_worst:.5f}"),
        ("top-1", lambda one: f"{100 * one.top1:.1f} %"),
    ):
        lines.append(f"{name:<7}".ljust(7) + "".join(f"{cell(one):>{width}}" for one in found))
    return "\n".join(lines)


def _read_model(folder: str) -> ModelConfig:
    if not Path(folder).is_dir():
        raise ConfigError(f"--model {folder} is no folder; quality needs a bf16 checkpoint on this machine")
    model = read_model_config(folder)
    if model.quantization_config:
        raise ConfigError(f"{folder} is quantised already: there is nothing to compare it with")
    return model


def _say_layer(num_layers: int) -> Callable[[int], None]:
    def say(layer: int) -> None:
        if sys.stderr.isatty():
            end = "\r\x1b[K" if layer + 1 == num_layers else ""
            print(f"\r\x1b[Klayer {layer + 1} of {num_layers}", end=end, file=sys.stderr, flush=True)

    return say


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run.sh quality", description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="a bf16 checkpoint")
    parser.add_argument("--quant", "--quantization", choices=tuple(_CHOICES), help="only this format")
    parser.add_argument("--prompts", default="", metavar="FILE", help="one per line: text, or a list of ids")
    parser.add_argument("--json", default="", metavar="OUT", help="also write everything to this file")
    parser.add_argument("--cpu-threads", type=int, default=0, metavar="N")
    return parser.parse_args(list(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
