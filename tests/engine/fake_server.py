"""The real supervisor over the real core, fake ranks and a fake api.

`python -m tests.engine.fake_server <rank behaviour> <api behaviour> <config.json>`
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec

from engine.config import read_config, write_config
from engine.process import configure_logging
from engine.run_directory import OwnedRunDirectory
from engine.supervisor import Commands, supervise


def main(rank_behaviour: str, api_behaviour: str, config_file: str) -> int:
    configure_logging("server")
    python = sys.executable
    commands = Commands(
        core=[python, "-m", "tests.engine.fake_core", rank_behaviour],
        api=[python, "-m", "tests.engine.fake_api", api_behaviour],
    )
    with OwnedRunDirectory() as run:
        config = msgspec.structs.replace(read_config(Path(config_file)), run_directory=str(run.root))
        write_config(config, run.config)
        return supervise(config, run, time.monotonic(), commands)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
