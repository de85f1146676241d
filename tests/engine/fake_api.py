"""An api process that only knows /ready, plus one decoding process as the real one has.

`python -m tests.engine.fake_api <behaviour> <run_dir>`; behaviours: well, die (when ready), stubborn
(ignores SIGTERM), open-stream (leaves 0.5 s after SIGTERM, as with a request that goes on).
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from typing import cast

import zmq
import zmq.asyncio

from engine.channels import Codec, RunDirectory, open_socket
from engine.config import read_config
from engine.messages import EngineState, ToApi
from engine.process import begin_child, environment_for_child

SLEEPER = "from engine.process import begin_child; begin_child('media'); import time; time.sleep(1000)"


class ReadyAnswer(asyncio.Protocol):
    """Answers one request and closes; no task, so none is cut off when a question comes with the end."""

    def __init__(self, state: dict[str, bool]) -> None:
        self._state = state

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"HTTP/1.1 %d x\r\n\r\n" % (200 if self._state["ready"] else 503))
        self._transport.close()


async def serve(run: RunDirectory, behaviour: str) -> None:
    config = read_config(run.config)
    stopped, state = asyncio.Event(), {"ready": False}
    if behaviour != "stubborn":
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    tokens = open_socket(zmq.asyncio.Context(), zmq.SUB, run.tokens_address, bind=False)
    tokens.setsockopt(zmq.SUBSCRIBE, b"api-0 ")

    async def follow_engine() -> None:
        codec: Codec[ToApi] = Codec(ToApi)
        while True:
            _, payload = await tokens.recv_multipart()
            message = codec.decode(payload)
            if isinstance(message, EngineState):
                state["ready"] = message.state == "ready"
            if state["ready"] and behaviour == "die":
                sys.exit(1)

    following = asyncio.create_task(follow_engine())
    await asyncio.get_running_loop().create_server(lambda: ReadyAnswer(state), config.host, config.port)
    await asyncio.wait([asyncio.create_task(stopped.wait()), following], return_when=asyncio.FIRST_COMPLETED)
    if behaviour == "open-stream":
        await asyncio.sleep(0.5)


def main(behaviour: str, run_directory: str) -> int:
    begin_child("api")
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", SLEEPER, run_directory], env=environment_for_child())
    asyncio.run(serve(RunDirectory(run_directory), behaviour))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
