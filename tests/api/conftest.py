"""Coroutine tests run on uvloop, and fail when something blocks the event loop."""

from __future__ import annotations

import inspect

import pytest

from tests.api.loop_guard import run_guarded


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    run_guarded(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True
