"""Defaults of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from api.params import Defaults, read_defaults
from tests.api.builders import running_api
from tests.api.fakes import say


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (None, Defaults()),
        ({"eos_token_id": 2}, Defaults()),
        ({"temperature": 0.8, "top_p": 0.7, "top_k": 20}, Defaults(temperature=0.8, top_p=0.7, top_k=20)),
        ({"repetition_penalty": 1.05, "min_p": None}, Defaults(repetition_penalty=1.05)),
        ({"do_sample": False, "temperature": 0.8}, Defaults(temperature=0.0)),
    ],
)
def test_defaults_are_what_the_generation_config_states(
    tmp_path: Path, stated: Any, expected: Defaults
) -> None:
    if stated is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert read_defaults(tmp_path) == expected


async def test_a_request_overrides_the_defaults_field_by_field() -> None:
    defaults = Defaults(temperature=0.8, top_p=0.7, top_k=20, min_p=0.1, repetition_penalty=1.05)
    async with running_api(say("ok"), defaults=defaults) as api:
        await api.chat()
        await api.chat(temperature=0.1, top_k=0)
        first, second = (request.sampling for request in api.engine.added)
    assert (first.temperature, first.top_p, first.top_k, first.min_p) == (0.8, 0.7, 20, 0.1)
    assert (second.temperature, second.top_p, second.top_k) == (0.1, 0.7, 0)
