"""`python -m engine [flags]`: the supervisor, from command line to exit code.

0 after a signal, 1 when a process failed, 2 with one sentence when a flag, the model or the machine is wrong.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from engine.config import ServerConfig, write_config
from engine.errors import ConfigError
from engine.flags import check_ports_are_free, describe_config, parse_command_line
from engine.model_config import read_model_config
from engine.model_source import resolve_model
from engine.plan_server import plan_server
from engine.preflight import check_machine, choose_device
from engine.process import configure_logging
from engine.progress import seconds_since
from engine.run_directory import SHARED_MEMORY, OwnedRunDirectory
from engine.settle import settle
from engine.supervisor import supervise

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """The whole life of a server; returns its exit code."""
    began = time.monotonic()
    configure_logging("server")
    signal.signal(signal.SIGTERM, _interrupt)  # until the supervisor listens itself
    try:
        line = parse_command_line(arguments)
        if line.print_config:
            print(describe_config(line.config))
            return 0
        _tell(line.notes)
        config = find_model(line.config)
        return _serve(config, began)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        log.info("stopped before serving")
        return 0


def find_model(config: ServerConfig) -> ServerConfig:
    """Download what has to be, read the model's numbers, settle the settings with them, plan the memory."""
    check_ports_are_free(config)
    began = time.monotonic()
    folder = resolve_model(
        config.model,
        load_format=config.load_format,
        offline=config.offline,
        needs_tokenizer=not config.tokenizer,
        say=log.info,
    )
    model = read_model_config(folder, config.config_overrides)
    settled, notes = settle(config, model, folder)
    log.info("model files found in %s: %s", seconds_since(began), folder)
    _tell(notes)
    settled, notes = choose_device(settled)
    _tell(notes)
    machine = check_machine(settled)
    planned, plan_notes = plan_server(settled, model, machine, asked_context=config.max_model_len)
    _tell(plan_notes)
    return planned


def _serve(config: ServerConfig, began: float) -> int:
    with OwnedRunDirectory() as run:
        if run.root.parent != SHARED_MEMORY:
            log.info("%s has little room; shared files lie in %s", SHARED_MEMORY, run.root.parent)
        config = msgspec.structs.replace(config, run_directory=str(run.root))
        write_config(config, run.config)
        return supervise(config, run, began)


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        log.info("%s", note)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
