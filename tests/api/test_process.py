"""`python -m api RUN_DIRECTORY` as the supervisor starts it, with a checkpoint's tokenizer and template."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.channels import RunDirectory
from engine.config import ServerConfig, write_config
from tests.api.fakes import PATIENCE, FakeEngine, say
from tests.e2e.media import image_part

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    command = [sys.executable, "-m", "models.tiny", str(folder), "--layout", "paddle", "--preset", "embedded"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60, stdout=subprocess.DEVNULL)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def api_process(checkpoint: Path, port: int) -> AsyncIterator[tuple[Any, FakeEngine, RunDirectory]]:
    """The process, the engine it talks to, and their directory."""
    directory = RunDirectory(tempfile.mkdtemp(prefix="octet-api-test-"))
    directory.media.mkdir()
    config = ServerConfig(
        model=str(checkpoint), host="127.0.0.1", port=port, media_workers=1, run_directory=str(directory.root)
    )
    write_config(config, directory.config)
    engine = FakeEngine(directory, say("Hi", " there"))
    arguments = ["-m", "api", str(directory.root)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process, engine, directory
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await engine.close()
        shutil.rmtree(directory.root)


async def until_ready(http: aiohttp.ClientSession, url: str, process: Any) -> None:
    """Poll as an orchestrator does."""
    deadline = time.monotonic() + PATIENCE
    while process.returncode is None and time.monotonic() < deadline:
        with contextlib.suppress(aiohttp.ClientConnectionError):
            async with http.get(f"{url}/ready") as answer:
                if answer.status == 200:
                    return
        await asyncio.sleep(0.05)
    process.kill()
    raise AssertionError((await process.stderr.read()).decode())


async def test_it_serves_an_image_and_ends_on_sigterm(checkpoint: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with api_process(checkpoint, port) as (process, engine, directory), aiohttp.ClientSession() as http:
        await until_ready(http, url, process)
        content = [image_part(), {"type": "text", "text": "What is it?"}]
        body = {"messages": [{"role": "user", "content": content}], "n": 2}
        async with http.post(f"{url}/v1/chat/completions", json=body) as response:
            answer = await response.json()
        assert [choice["message"]["content"] for choice in answer["choices"]] != ["", ""], answer
        # 160 x 120 becomes 168 x 112: 12 x 8 patches, a quarter as many tokens.
        assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 24
        files = {item.file for request in engine.added for item in request.media}
        assert {path.name for path in directory.media.iterdir()} == files and len(files) == 2
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), PATIENCE) == 0


async def test_a_taken_port_ends_it_with_one_sentence(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with api_process(checkpoint, port) as (process, _, _):
            _, errors = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 1
    assert f"port {port}" in errors.decode() and "Traceback" not in errors.decode()
