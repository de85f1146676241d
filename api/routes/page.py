"""GET / and /static/...: the chat page, exactly the files of api/static, read once.

The page asks the API like any other client; nothing here knows what it does. Its policy lets it load only
its own files and talk only to this server, so what a model writes can neither run nor call anybody.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

FOLDER = Path(__file__).resolve().parent.parent / "static"
INDEX = "index.html"

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".mp4": "video/mp4",
}

_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data: blob:",  # blob: thumbnails of what the user picked
    "media-src": "'self' data: blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",  # no text ever becomes markup: innerHTML and the like throw
    "trusted-types": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {sources}" for name, sources in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",  # ask each time; the ETag makes the answer a 304
}


@dataclass(frozen=True)
class PageFile:
    """One file as it is sent."""

    body: bytes
    content_type: str
    etag: str  # without quotes

    async def serve(self, request: web.Request) -> web.Response:
        headers = {**HEADERS, "ETag": f'"{self.etag}"'}
        known = request.if_none_match or ()
        if any(tag.value in (self.etag, "*") for tag in known):
            return web.Response(status=304, headers=headers)
        return web.Response(body=self.body, headers={**headers, "Content-Type": self.content_type})


@functools.cache
def page_files() -> dict[str, PageFile]:
    """All files below api/static by their path there; other kinds of file are not served."""
    paths = [path for path in sorted(FOLDER.rglob("*")) if path.suffix in CONTENT_TYPES]
    return {path.relative_to(FOLDER).as_posix(): _read(path) for path in paths}


def _read(path: Path) -> PageFile:
    body = path.read_bytes()
    return PageFile(body, CONTENT_TYPES[path.suffix], hashlib.sha256(body).hexdigest()[:32])


def add_page(app: web.Application) -> None:
    """Routes for the page. Files are looked up by name in what was read, so no path leaves the folder."""
    app.router.add_get("/", _serve_index(page_files()))
    app.router.add_get("/static/{file:.+}", _serve_named(page_files()))


def _serve_index(files: dict[str, PageFile]) -> Handler:
    return files[INDEX].serve


def _serve_named(files: dict[str, PageFile]) -> Handler:
    async def serve(request: web.Request) -> web.Response:
        file = files.get(request.match_info["file"])
        if file is None:
            raise web.HTTPNotFound
        return await file.serve(request)

    return serve
