"""The real api before an engine that says what a test wants, on a thread of its own; for a browser."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from typing import Any

from tests.api.builders import Api, running_api
from tests.api.fakes import PATIENCE, Script


class ScriptedApi:
    """An api and the loop it runs in."""

    def __init__(self, api: Api, loop: asyncio.AbstractEventLoop) -> None:
        self.api, self._loop = api, loop

    @property
    def address(self) -> str:
        return self.api.url

    def say(self, script: Script) -> None:
        """What the engine answers from now on."""
        self.api.engine.script = script

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    def fail_all(self, error: BaseException) -> None:
        """End every open request with this error."""
        self._loop.call_soon_threadsafe(self.api.services.engine.fail_all, error)


@contextlib.contextmanager
def scripted_api(script: Script | None = None, **settings: Any) -> Iterator[ScriptedApi]:
    started: Future[tuple[ScriptedApi, asyncio.Event]] = Future()

    async def serve() -> None:
        try:
            async with running_api(script, **settings) as api:
                end = asyncio.Event()
                started.set_result((ScriptedApi(api, asyncio.get_running_loop()), end))
                await end.wait()
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        scripted, end = started.result(PATIENCE)
        try:
            yield scripted
        finally:
            scripted._loop.call_soon_threadsafe(end.set)
    finally:
        thread.join(PATIENCE)
