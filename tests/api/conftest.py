"""Coroutine tests run on uvloop, and fail when something blocks the event loop."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator

import pytest

from tests.api.loop_guard import run_guarded


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    run_guarded(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.fixture(scope="session", autouse=True)
def _only_the_apis_own_garbage() -> Iterator[None]:
    """Keep the collector off what the other folders' tests imported.

    With torch among it, one full collection in the middle of a test is deaf for 0.4 s; the api's own
    process has none of that in memory.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
