"""The chat page as it is served: types, caching, policy, keys; what it does is in tests/e2e/test_page.py."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping

import pytest

from api.routes.page import FOLDER
from tests.api.builders import Api, running_api

LINK = re.compile(r'(?:src|href)="([^"#][^"]*)"')
IMPORT = re.compile(r'^(?:import|export) .*?from "\./([^"]+)"', re.M)
MAX_SAMPLE_BYTES = 200_000  # of all samples together


async def fetch(api: Api, path: str, **headers: str) -> tuple[int, bytes, Mapping[str, str]]:
    async with api.http.get(api.url + path, headers=headers, skip_auto_headers=["Accept-Encoding"]) as answer:
        return answer.status, await answer.read(), answer.headers


async def test_every_file_of_the_folder_is_served_with_its_type() -> None:
    types = {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".json": "application/json",
        ".svg": "image/svg+xml",
        ".png": "image/png",
        ".jpg": "image/jpeg",
        ".mp4": "video/mp4",
    }
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert len(files) > 5
    async with running_api() as api:
        for path in files:
            status, body, headers = await fetch(api, f"/static/{path.relative_to(FOLDER).as_posix()}")
            assert (status, headers.get("Content-Type")) == (200, types[path.suffix]), path
            assert body == path.read_bytes(), path


async def test_the_page_is_at_the_root_and_its_policy_allows_only_this_server() -> None:
    async with running_api() as api:
        status, body, headers = await fetch(api, "/")
    assert status == 200 and body.startswith(b"<!doctype html>")
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in str(policy) and "http" not in str(policy) and "*" not in str(policy)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


async def test_every_address_in_the_page_is_a_file_of_ours() -> None:
    async with running_api() as api:
        _, body, _ = await fetch(api, "/")
        for address in LINK.findall(body.decode()):
            assert not re.match(r"[a-z]+:|//", address), f"{address} leaves this server"
            assert (await fetch(api, f"/{address}"))[0] == 200, address
    for module in FOLDER.glob("*.js"):
        for name in IMPORT.findall(module.read_text()):
            assert (FOLDER / name).is_file(), f"{module.name} imports {name}"


async def test_an_unchanged_file_is_a_304() -> None:
    async with running_api() as api:
        _, _, first = await fetch(api, "/static/style.css")
        assert first["Cache-Control"] == "no-cache"
        status, body, again = await fetch(api, "/static/style.css", **{"If-None-Match": first["ETag"]})
        assert (status, body, again["ETag"]) == (304, b"", first["ETag"])
        weak = await fetch(api, "/static/style.css", **{"If-None-Match": f'"other", W/{first["ETag"]}'})
        assert weak[0] == 304
        changed = await fetch(api, "/static/style.css", **{"If-None-Match": '"other"'})
        assert changed[0] == 200


async def test_head_has_the_headers_without_the_body() -> None:
    async with running_api() as api, api.http.head(api.url + "/") as answer:
        assert answer.status == 200 and int(answer.headers["Content-Length"]) > 1000
        assert await answer.read() == b""


@pytest.mark.parametrize(
    "path",
    ["nope.js", "", "samples/", "samples", "../app.py", "%2e%2e/app.py", "..%2fapp.py",
     "samples/../../app.py", "/etc/passwd", "%2fetc%2fpasswd", "style.css%00", "style.css/"],
)  # fmt: skip
async def test_nothing_else_is_served(path: str) -> None:
    async with running_api() as api:
        host, port = api.url.removeprefix("http://").split(":")
        status, body = await raw_get(host, int(port), f"/static/{path}")
    assert status == 404, body
    assert b'"code":"not_found"' in body


async def test_without_the_page_its_paths_are_unknown() -> None:
    async with running_api(page=False) as api:
        for path in ("/", "/static/style.css"):
            status, body, _ = await fetch(api, path)
            assert status == 404 and json.loads(body)["error"]["code"] == "not_found"
        assert (await fetch(api, "/v1/models"))[0] == 200


async def test_the_page_loads_without_a_key_but_gives_no_access() -> None:
    async with running_api(api_keys=("first",)) as api:
        host, port = api.url.removeprefix("http://").split(":")
        assert (await fetch(api, "/"))[0] == 200
        assert (await fetch(api, "/static/style.css"))[0] == 200
        for path in ("/static/../v1/models", "/static/%2e%2e/v1/models", "/static/..%2fv1/models"):
            status, body = await raw_get(host, int(port), path)
            assert status in (401, 404) and b"max_model_len" not in body, (path, status)


def test_samples_name_their_files_and_stay_small() -> None:
    samples = json.loads((FOLDER / "samples" / "samples.json").read_text())
    used = {name for sample in samples for name in sample["files"]}
    stored = [path for path in (FOLDER / "samples").iterdir() if path.name != "samples.json"]
    assert used == {path.name for path in stored}
    assert any(name.endswith(".mp4") for name in used) and len(samples) >= 4
    assert all(sample["question"] and sample["answer"] for sample in samples)
    assert sum(path.stat().st_size for path in stored) < MAX_SAMPLE_BYTES


async def raw_get(host: str, port: int, path: str) -> tuple[int, bytes]:
    """A GET whose path no client library has tidied up."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    await writer.wait_closed()
    return int(answer.split(b" ", 2)[1]), answer
