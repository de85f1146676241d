"""`./run.sh plan [flags]`: says whether a model fits a machine, with the flags the server would get.

    ./run.sh plan --model ernie-4.5-vl-424b-a47b --tp 8 --quant wint4 --device a100-80g

Needs only a config: a preset by name, a folder, a hub id. All flags of the server are taken, so that `plan`
can be put before a command that is known; --device says where instead of how. Leaves with 0 when it fits,
1 when it does not, 2 when a flag is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.flags import parse_command_line
from engine.model_config import ModelConfig, read_model_config
from engine.model_source import preset_file, preset_names, resolve_model
from engine.plan import alternatives, make_plan
from engine.plan_checkpoint import decide_by_tensors
from engine.plan_machine import named_machine, this_host
from engine.plan_report import as_json, table
from engine.settle import settle

_USAGE = "usage: ./run.sh plan --model NAME|FOLDER [--device a100-80g|cpu-24g|...] [--json] [server flags]"
_HERE = ("", "auto", "cpu")  # --device as the server takes it: this machine


def main(arguments: Sequence[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(__doc__, _USAGE, sep="\n")
        return 0
    try:
        return _plan(list(arguments))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _plan(arguments: list[str]) -> int:
    as_text, arguments = "--json" not in arguments, [one for one in arguments if one != "--json"]
    device, arguments = take_device(arguments)
    machine = this_host() if device in _HERE else named_machine(device)
    config, model = read_settings(parse_command_line(arguments).config)
    plan = make_plan(config, model, machine)
    others = [] if plan.fits else list(alternatives(config, model, machine))
    print(table(plan, others) if as_text else json.dumps(as_json(plan, others), indent=2))
    return 0 if plan.fits else 1


def take_device(arguments: list[str]) -> tuple[str, list[str]]:
    """The value of --device, and the arguments without it; the server's own --device knows no machines."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != "--device":
            continue
        if equals:
            return value, arguments[:index] + arguments[index + 1 :]
        if index + 1 == len(arguments):
            raise ConfigError("--device needs a value")
        return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
    return "", arguments


def read_settings(config: ServerConfig) -> tuple[ServerConfig, ModelConfig]:
    """Settled settings and the model's numbers; its weights may be anywhere."""
    if config.model in preset_names() and not Path(config.model).exists():
        source = preset_file(config.model)
    else:
        source = resolve_model(
            config.model, load_format="dummy", offline=config.offline, needs_tokenizer=False
        )
    model = decide_by_tensors(read_model_config(source, config.config_overrides), source)
    settled, _ = settle(config, model, source)
    return settled, model


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
