"""The HTTP routes, one file per resource; `add_routes` is the table of all of them."""

from __future__ import annotations

from aiohttp import web

from api.routes import chat, completions, health, models, page
from api.services import SERVICES


def add_routes(app: web.Application) -> None:
    app.router.add_post("/v1/chat/completions", chat.create)
    app.router.add_post("/v1/completions", completions.create)
    app.router.add_get("/v1/models", models.list_models)
    app.router.add_get("/v1/models/{model:.+}", models.show_model)
    app.router.add_get("/health", health.health)
    app.router.add_get("/ready", health.ready)
    app.router.add_get("/live", health.live)
    app.router.add_get("/version", health.version)
    if app[SERVICES].config.page:
        page.add_page(app)
