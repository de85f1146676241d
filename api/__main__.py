"""`python -m api <run_dir>`: one api process, a child of the supervisor.

Listens at once, is ready when the engine is, drains on SIGTERM, and dies with its parent.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys

import uvloop

from api.app import ApiServer
from api.services import open_services
from engine.channels import RunDirectory
from engine.config import ServerConfig, read_config
from engine.errors import ConfigError
from engine.process import begin_child

_log = logging.getLogger("octet.api")


def main(arguments: list[str]) -> int:
    """Exit status: 0 after SIGTERM, 1 when the server could not start."""
    if len(arguments) != 1:
        print("usage: python -m api RUN_DIRECTORY", file=sys.stderr)
        return 2
    begin_child("api")
    directory = RunDirectory(arguments[0])
    try:
        uvloop.run(serve(read_config(directory.config), directory))
    except ConfigError as error:
        _log.error("%s", error)
        return 1
    return 0


async def serve(config: ServerConfig, directory: RunDirectory) -> None:
    """Serve until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with open_services(config, directory) as services:
        server = ApiServer(services)
        try:
            port = await server.start()
            _log.info("listening on %s port %d", config.host, port)
            _keep_collector_calm()
            await stop.wait()
            await server.drain(config.drain_timeout)
        finally:
            await server.close()


def _keep_collector_calm() -> None:
    """What start-up made stays: the collector need not look at a tokenizer's tables again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
