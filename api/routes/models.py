"""GET /v1/models and /v1/models/{model}: the one model this server has."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from api.services import SERVICES, Services
from engine.errors import RequestError


async def list_models(request: web.Request) -> web.Response:
    return _json({"object": "list", "data": [_card(request.app[SERVICES])]})


async def show_model(request: web.Request) -> web.Response:
    services, name = request.app[SERVICES], request.match_info["model"]
    if name != services.model_name:
        services.check_model(name)
        raise RequestError(
            f"There is no model {name[:200]!r} here; this server serves {services.model_name!r}.",
            param="model",
            status=404,
            code="model_not_found",
        )
    return _json(_card(services))


def _card(services: Services) -> dict[str, Any]:
    return {
        "id": services.model_name,
        "object": "model",
        "created": services.started,
        "owned_by": "octet",
        "root": services.model_name,
        "max_model_len": services.max_model_len,
        "quantization": services.config.quantization,
        "modalities": ["text", "image", "video"] if services.model.vision is not None else ["text"],
    }


def _json(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
