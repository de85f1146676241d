"""How many streamed tokens one api process delivers in a second, and what each costs it.

Method      the real `python -m api` with a tiny checkpoint's tokenizer; this process plays the engine, which
            sends one token per stream and step at a fixed pace over the real sockets, and the clients, which
            read bytes. The answer is checked first: one stream's text is its decoded tokens, and the usage of
            every stream counts them. Streams are chat completions with include_usage.
How to read offered: what the engine sends. delivered: what clients have received by the wall clock, drain
            included. per CPU second: tokens over the api's own CPU time, which ignores how busy the machine
            is. tokens/chunk: 1 while the api keeps up, more when it joins what is already queued. first
            token: from the engine's send to the client's first byte; lag: from the last step to the last
            byte.
Reference   vLLM, Python front end with a mock engine: 413k tokens/s (GB200 host). Design figure: 500k.
Run         python -m tests.bench.bench_api [--streams 64] [--tokens 2000] [--save]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import uvloop
import zmq

from api.tokenizer import Tokenizer, load_tokenizer
from engine.channels import Codec, RunDirectory, open_socket
from engine.config import ServerConfig, write_config
from engine.messages import AddRequest, EngineState, RequestOutput, ToApi, ToEngine, TokenBatch
from tests.bench.result_files import save, save_option

ROOT = Path(__file__).resolve().parents[2]
OFFERED = (5_000, 50_000, 200_000, 500_000, 800_000)  # tokens per second


class Engine:
    """Sends one token to every stream, step by step."""

    def __init__(self, directory: RunDirectory) -> None:
        context = zmq.Context.instance()
        self._requests = open_socket(context, zmq.ROUTER, directory.api_address, bind=True)
        self._tokens = open_socket(context, zmq.XPUB, directory.tokens_address, bind=True)
        self._from_api: Codec[ToEngine] = Codec(ToEngine)
        self._to_api: Codec[ToApi] = Codec(ToApi)
        self._topic = b""
        self._sequence = 0

    async def greet(self) -> None:
        frame = await _receive(self._tokens)
        self._topic = frame[0][1:]
        self._send(EngineState("ready"))

    async def requests(self, count: int) -> list[str]:
        """Ids of the next `count` sequences."""
        ids: list[str] = []
        while len(ids) < count:
            message = self._from_api.decode((await _receive(self._requests))[1])
            if isinstance(message, AddRequest):
                ids.append(message.request_id)
        return ids

    async def generate(self, ids: list[str], tokens: list[int], pace: float) -> tuple[float, float]:
        """All steps at `pace` tokens per second; the times of the first and the last."""
        started = time.perf_counter()
        for step, token_id in enumerate(tokens):
            due = started + step * len(ids) / pace
            while (ahead := due - time.perf_counter()) > 0:  # noqa: ASYNC110
                await asyncio.sleep(ahead if ahead > 2e-3 else 0)
            if step < len(tokens) - 1:
                batch = TokenBatch(self._sequence, decoded=ids, token_ids=[token_id] * len(ids))
            else:
                last = [RequestOutput(i, [token_id], finish_reason="length") for i in ids]
                batch = TokenBatch(self._sequence, last)
            self._send(batch)
            self._sequence += 1
            if step % 16 == 0:
                await asyncio.sleep(0)  # the clients live on this loop too
        return started, time.perf_counter()

    def _send(self, message: ToApi) -> None:
        self._tokens.send_multipart([self._topic, self._to_api.encode(message)])


@dataclass
class Client(asyncio.Protocol):
    """One stream, as bytes with their times."""

    body: bytes
    done: asyncio.Future[None]
    first: float = 0.0
    last: float = 0.0
    num_bytes: int = 0
    num_chunks: int = 0
    tail: bytes = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(self.body)
        transport.write(head + self.body)

    def data_received(self, data: bytes) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.num_bytes += len(data)
        self.num_chunks += data.count(b'"choices":[{')
        self.tail = (self.tail + data)[-600:]
        if b"data: [DONE]" in self.tail and not self.done.done():
            self.done.set_result(None)
            self.transport.close()


async def measure(
    engine: Engine, port: int, pid: int, tokens: list[int], num_streams: int, pace: float
) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    fields = {"max_tokens": len(tokens), "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps({"messages": [{"role": "user", "content": "Go"}], **fields}).encode()
    clients = [Client(body, loop.create_future()) for _ in range(num_streams)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
    ids = await engine.requests(num_streams)
    cpu = cpu_seconds(pid)
    started, ended = await engine.generate(ids, tokens, pace)
    await asyncio.wait_for(asyncio.gather(*[client.done for client in clients]), 120)
    cpu = cpu_seconds(pid) - cpu
    check(clients, len(tokens))
    finished, total = max(client.last for client in clients), num_streams * len(tokens)
    firsts = sorted((client.first - started) * 1e3 for client in clients)
    return {
        "offered_per_second": pace,
        "delivered_per_second": total / (finished - started),
        "per_cpu_second": total / cpu,
        "tokens_per_chunk": total / sum(client.num_chunks for client in clients),
        "bytes_per_token": sum(client.num_bytes for client in clients) / total,
        "first_token_ms_median": statistics.median(firsts),
        "first_token_ms_worst": firsts[-1],
        "lag_ms": (finished - ended) * 1e3,
    }


def check(clients: list[Client], num_tokens: int) -> None:
    for client in clients:
        counted = re.search(rb'"completion_tokens":(\d+)', client.tail)
        assert counted and int(counted.group(1)) == num_tokens, client.tail


async def check_answer(engine: Engine, port: int, tokens: list[int], tokenizer: Tokenizer) -> None:
    """One stream, token by token, against the tokenizer's own text."""
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
        messages: Any = [{"role": "user", "content": "Go"}]
        asked = asyncio.create_task(client.chat.completions.create(model="x", messages=messages, stream=True))
        ids = await engine.requests(1)
        await engine.generate(ids, tokens, 1e6)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in await asked])
    assert text == tokenizer.decode(tokens), "the stream is not the text of its tokens"


def make_checkpoint(folder: Path) -> Path:
    checkpoint = folder / "tiny"
    options = ["--layout", "paddle", "--preset", "embedded"]
    command = [sys.executable, "-m", "models.tiny", str(checkpoint), *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return checkpoint


@contextlib.contextmanager
def running_process(directory: RunDirectory, checkpoint: Path) -> Iterator[tuple[int, int]]:
    """The api's port and process id, once it listens."""
    directory.media.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": port,
        "media_workers": 1,
        "max_concurrency": 4096,
    }
    config = ServerConfig(model=str(checkpoint), run_directory=str(directory.root), **settings)
    write_config(config, directory.config)
    command = [sys.executable, "-m", "api", str(directory.root)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        while b"listening" not in (line := process.stderr.readline()):
            assert line, "the api did not start"
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(30)


async def run(
    directory: RunDirectory, port: int, pid: int, tokenizer: Tokenizer, num_streams: int, num_tokens: int
) -> list[dict[str, Any]]:
    engine = Engine(directory)
    await engine.greet()
    plain = [i for i in range(300, tokenizer.vocab_size) if i not in tokenizer.markers.values()]
    tokens = random.Random(0).choices(plain, k=num_tokens)
    await check_answer(engine, port, tokens[:200], tokenizer)
    return [await measure(engine, port, pid, tokens, num_streams, pace) for pace in OFFERED]


async def _receive(zmq_socket: Any) -> list[bytes]:
    while not zmq_socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    return list(zmq_socket.recv_multipart(zmq.NOBLOCK))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2000, help="per stream")
    save_option(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="octet-bench-") as folder:
        directory, checkpoint = RunDirectory(folder), make_checkpoint(Path(folder))
        with running_process(directory, checkpoint) as (port, pid):
            tokenizer = load_tokenizer(checkpoint)
            rows = uvloop.run(run(directory, port, pid, tokenizer, arguments.streams, arguments.tokens))
    print(f"{arguments.streams} streams of {arguments.tokens} tokens")
    print("offered/s  delivered/s  per CPU s  tokens/chunk  bytes/token  first ms (worst)  lag ms")
    for row in rows:
        print(
            f"{row['offered_per_second']:9,.0f} {row['delivered_per_second']:12,.0f} "
            f"{row['per_cpu_second']:10,.0f} {row['tokens_per_chunk']:13.2f} {row['bytes_per_token']:12.1f} "
            f"{row['first_token_ms_median']:9.1f} ({row['first_token_ms_worst']:.1f}) {row['lag_ms']:9.1f}"
        )
    if arguments.save:
        figures = {f"{row['offered_per_second']:.0f} offered": row for row in rows}
        save("api", figures, {"streams": arguments.streams, "tokens": arguments.tokens})


if __name__ == "__main__":
    main()
