"""What holds for every route: error shape, ids, keys, CORS, limits, and no library's name."""

from __future__ import annotations

import asyncio
import gzip
import logging
from typing import Any

import openai
import pytest

from api.middleware import PUBLIC_ROUTES
from tests.api.builders import Api, running_api
from tests.api.fakes import say

SHAPE = {"message", "type", "param", "code"}


def all_routes(api: Api) -> list[tuple[str, str]]:
    """(method, path) of the whole router, with something put into each pattern."""
    app = api.server._runner.app
    return [
        (r.method, r.resource.canonical.replace("{model}", "tiny").replace("{file}", "style.css"))
        for r in app.router.routes()
        if r.resource
    ]


async def test_every_error_has_openais_shape() -> None:
    async with running_api(max_body_bytes=1000) as api:
        answers = [
            (404, await api.get("/nope")),
            (404, await api.get("/v1/models/other")),
            (405, await api.get("/v1/chat/completions")),
            (413, await api.post("/v1/completions", {"prompt": "x" * 2000})),
            (400, await api.post("/v1/completions", [])),
        ]
    for expected, (status, body, headers) in answers:
        assert status == expected, body
        assert set(body["error"]) == SHAPE and body["error"]["message"], body
        assert headers["Content-Type"].startswith("application/json")
        assert headers["X-Request-Id"].startswith("req-")
    assert answers[2][1][2]["Allow"] == "POST"


async def test_a_small_body_that_unpacks_to_a_large_one_is_refused() -> None:
    packed = gzip.compress(b" " * 20_000_000)
    async with running_api(max_body_bytes=1_000_000) as api:
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        async with api.http.post(api.url + "/v1/completions", data=packed, headers=headers) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (413, "body_too_large")


async def test_an_unexpected_failure_shows_only_its_id(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_api() as api:

        def fail(*_: object) -> None:
            raise ZeroDivisionError("secret inner detail")

        monkeypatch.setattr(api.services.prompts, "build_text", fail)
        with caplog.at_level(logging.ERROR):
            status, body, headers = await api.complete()
    assert status == 500 and body["error"]["type"] == "server_error"
    assert headers["X-Request-Id"] in body["error"]["message"]
    assert "secret" not in str(body) and "ZeroDivision" not in str(body)
    assert "secret inner detail" in caplog.text and headers["X-Request-Id"] in caplog.text


async def test_every_route_but_the_probes_and_the_page_needs_a_key() -> None:
    async with running_api(say("ok"), api_keys=("first", "second")) as api:
        for method, path in [*all_routes(api), ("GET", "/nope"), ("POST", "/health")]:
            async with api.http.request(method, api.url + path) as answer:
                needs_key = path not in {*PUBLIC_ROUTES, "/", "/static/style.css"}
                assert (answer.status == 401) == needs_key, (method, path, answer.status)
                if needs_key and method != "HEAD":
                    error = (await answer.json())["error"]
                    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
        for key in ("first", "second"):
            status, _, _ = await api.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert status == 200


@pytest.mark.parametrize(
    "header", ["Bearer wrong", "Bearer ", "Basic first", "first", "Bearer firs\u00fc", "Bearer first second"]
)
async def test_a_wrong_key_is_refused(header: str) -> None:
    async with running_api(api_keys=("first",)) as api:
        status, _, _ = await api.get("/v1/models", headers={"Authorization": header})
    assert status == 401


async def test_openais_client_raises_authentication_error() -> None:
    async with running_api(api_keys=("first",)) as api, api.client(api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


async def test_request_ids_are_ours_and_a_sane_one_of_the_client_is_echoed() -> None:
    async with running_api() as api:
        _, _, first = await api.get("/live", headers={"X-Request-Id": "trace-1.a"})
        _, _, second = await api.get("/live", headers={"X-Request-Id": "odd <id>"})
    assert first["X-Request-Id"] != second["X-Request-Id"]
    assert first["X-Client-Request-Id"] == "trace-1.a" and "X-Client-Request-Id" not in second


async def test_browsers_of_any_origin_may_call() -> None:
    preflight = {
        "Origin": "http://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, x-stainless-os",
    }
    async with running_api(api_keys=("first",)) as api:
        url = api.url + "/v1/chat/completions"
        async with api.http.options(url, headers=preflight) as answer:
            assert answer.status == 204
            assert answer.headers["Access-Control-Allow-Origin"] == "*"
            assert answer.headers["Access-Control-Allow-Headers"] == "authorization, x-stainless-os"
            assert "POST" in answer.headers["Access-Control-Allow-Methods"]
        async with api.http.post(url) as answer:
            assert answer.status == 401 and answer.headers["Access-Control-Allow-Origin"] == "*"


async def test_requests_beyond_max_concurrency_get_429_until_a_place_is_free() -> None:
    async with running_api(max_concurrency=1) as api, api.client() as client:
        first = asyncio.create_task(api.chat())
        request = await api.engine.next_request()
        status, body, headers = await api.chat()
        assert status == 429 and headers["Retry-After"] == "1"
        assert body["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model="any", prompt="x")
        await api.engine.send(request.request_id, [65], finish_reason="stop")
        assert (await first)[0] == 200
        api.engine.script = say("ok")
        assert (await api.chat())[0] == 200


async def test_only_the_served_name_is_known_when_one_is_set() -> None:
    async with running_api(say("ok"), served_model_name="ernie") as api:
        assert [(await api.chat(model=name))[0] for name in ("ernie", "tiny", "other")] == [200, 200, 404]
        _, body, _ = await api.chat(model="other")
        assert (body["error"]["code"], body["error"]["param"]) == ("model_not_found", "model")
        _, models, _ = await api.get("/v1/models")
        assert [model["id"] for model in models["data"]] == ["ernie"]


async def test_answers_name_the_model_as_it_was_typed() -> None:
    async with running_api(say("ok"), display_name="octet-tiny") as api:
        _, body, _ = await api.chat(model="anything")
        _, models, _ = await api.get("/v1/models")
    assert (body["model"], models["data"][0]["id"]) == ("octet-tiny", "octet-tiny")


async def test_the_model_card_says_how_long_prompts_may_be() -> None:
    async with running_api(max_model_len=2048) as api, api.client() as client:
        [model] = [model async for model in client.models.list()]
        one: Any = await client.models.retrieve(model.id)
    assert one.max_model_len == 2048 and one.object == "model"


async def test_malformed_http_is_answered_in_the_same_shape() -> None:
    async with running_api() as api:
        host, port = api.url.removeprefix("http://").split(":")
        for sent in (b"NONSENSE\r\n\r\n", b"GET /live HTTP/1.1\r\nX: " + b"y" * 20_000 + b"\r\n\r\n"):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(sent)
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            assert answer.startswith(b"HTTP/1.") and b" 400 " in answer.split(b"\r\n")[0]
            assert b'"code":"bad_http"' in answer and b"aiohttp" not in answer


async def test_no_answer_names_a_library() -> None:
    async with running_api() as api:
        for path in ("/live", "/nope"):
            _, _, headers = await api.get(path)
            assert headers["Server"] == "octet"


async def test_finished_requests_are_reported_by_pattern_not_by_path() -> None:
    async with running_api(say("ok")) as api:
        await api.chat(temperature=9)
        await api.get("/v1/models/whatever")
        await api.get("/made/up")
        await api.chat()
        await api.engine.until(lambda: len(api.engine.observed) == 4, "four observations")
        seen = [(o.route, o.status, o.error_type) for o in api.engine.observed]
    assert seen == [
        ("/v1/chat/completions", 400, "out_of_range"),
        ("/v1/models/{model}", 404, "model_not_found"),
        ("unmatched", 404, "not_found"),
        ("/v1/chat/completions", 200, ""),
    ]


async def test_a_connection_serves_many_requests() -> None:
    async with running_api(say("ok")) as api:
        ports = set()
        for _ in range(3):
            async with api.http.post(api.url + "/v1/completions", json={"prompt": "x"}) as answer:
                await answer.read()
                assert answer.connection is None or ports.add(answer.connection) is None
        assert len(api.server._runner.server.connections) == 1  # type: ignore[union-attr]
