"""Coroutine tests run on uvloop, and fail when something blocks the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
from collections.abc import Iterator
from functools import partial

import openai
import pytest

from tests.api.loop_guard import run_guarded


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    run_guarded(partial(pyfuncitem.obj, **{name: pyfuncitem.funcargs[name] for name in names}))
    return True


async def _import_what_the_client_imports_late() -> None:
    """Its first request imports half a second of modules, which no watched loop should have to wait for."""
    async with openai.AsyncOpenAI(base_url="http://127.0.0.1:9", api_key="none", max_retries=0) as client:
        with contextlib.suppress(openai.APIConnectionError):
            await client.chat.completions.create(model="none", messages=[])


@pytest.fixture(scope="session", autouse=True)
def _only_the_apis_own_garbage() -> Iterator[None]:
    """Keep the collector off what the other folders' tests imported.

    With torch among it, one full collection in the middle of a test is deaf for 0.4 s; the api's own
    process has none of that in memory.
    """
    asyncio.run(_import_what_the_client_imports_late())
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
