"""The HTTP application: routes and middlewares.  Runs in the api process, on the thread of its event loop, beside the gateway.

What there is, with every field, is at GET /docs of a running server, and for programs at GET /openapi.json (see openapi.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from minisgl.api.batches.store import Store
from minisgl.api.batches.worker import Batches
from minisgl.api.endpoints import responses
from minisgl.api.endpoints.table import ENDPOINTS
from minisgl.api.engine import Engine
from minisgl.api.http import openapi
from minisgl.api.http.auth import authenticate
from minisgl.api.http.batch_routes import FileRoutes
from minisgl.api.http.body import read_json, stream, timing_header
from minisgl.api.http.errors import errors, name_response
from minisgl.api.http.metrics import CONTENT_TYPE, Metered
from minisgl.api.http.stream_writer import TURN, Turn
from minisgl.api.requests import generate as serving
from minisgl.api.requests.unknown_fields import ignored_header
from minisgl.errors import model_loading

# For web.AppRunner.  A client that leaves cancels its handler, and with it its request in the engine; compressed bodies are
# refused, so nothing may inflate them first.
RUN_KWARGS: Mapping[str, Any] = {"handler_cancellation": True, "auto_decompress": False, "keepalive_timeout": 75.0}
BATCHES = web.AppKey("batches", Batches)  # only with a store


def build_app(engine: Engine, batch_socket: str | None = None, store: Store | None = None) -> web.Application:
    """The application; run it with `web.AppRunner(app, **RUN_KWARGS)`.

    `batch_socket`: address reported to batch clients.  `store`: where files and batches are kept; closed with the application.
    """
    metered = engine if isinstance(engine, Metered) else Metered(engine)
    server = engine.config.server
    guards = [authenticate(server.api_keys)] if server.api_keys else []
    app = web.Application(client_max_size=server.max_body_bytes, middlewares=[_count(metered), errors, *guards])
    app[TURN] = Turn()
    app.on_response_prepare.append(name_response)
    batches = None
    if store is not None:
        batches = app[BATCHES] = Batches(store, metered)

        async def start(app: web.Application) -> None:
            app[BATCHES].start()

        async def stop(app: web.Application) -> None:
            await app[BATCHES].close()
            store.close()

        app.on_startup.append(start)
        app.on_cleanup.append(stop)
    _Routes(metered, batch_socket).add_to(app.router)
    FileRoutes(metered, store, batches).add_to(app.router)
    return app


def _count(engine: Metered) -> Middleware:
    """Middleware: answers by route and status, 499 for clients that have left."""

    @web.middleware
    async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        route, status = resource.canonical if resource is not None else "unknown", 499
        method = request.method if resource is not None else "unknown"
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            engine.metrics.responses[method, route, status] += 1

    return count


class _Routes:
    """The handlers.  Raised RequestErrors are rendered by the middleware."""

    def __init__(self, engine: Metered, batch_socket: str | None) -> None:
        self._engine = engine
        self._config = engine.config
        self._batch_socket = batch_socket

    def add_to(self, router: web.UrlDispatcher) -> None:
        for path in ENDPOINTS:
            router.add_post(path, self.generate)
        router.add_route("*", "/v1/responses/{response_id:.+}", self.no_response)
        router.add_get("/v1/models", self.models)
        router.add_get("/v1/models/{name:.+}", self.model)
        router.add_get("/tokenizer_info", self.tokenizer_info)
        router.add_get("/health", self.health)
        router.add_get("/ready", self.ready)
        router.add_get("/metrics", self.metrics)
        router.add_get("/server_info", self.server_info)
        router.add_post("/flush_cache", self.flush_cache)
        router.add_get("/openapi.json", self.openapi)
        router.add_get("/docs", self.docs)

    # ---------------- requests to the model
    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Any of the endpoints with a JSON body."""
        endpoint = ENDPOINTS[request.path]
        parsed = endpoint.parse(self._engine, await read_json(request, self._config.server.max_body_bytes))
        headers = ignored_header(self._config, parsed.ignored)
        if parsed.stream and endpoint.stream is not None:
            return await stream(request, await endpoint.stream(self._engine, parsed), headers)
        answer = await endpoint.answer(self._engine, parsed)
        return web.json_response(answer, headers={**headers, **timing_header(answer)})

    async def no_response(self, request: web.Request) -> web.Response:
        raise responses.not_stored(request.match_info["response_id"])

    async def tokenizer_info(self, request: web.Request) -> web.Response:
        if not self._engine.tokenizer_info:
            raise model_loading()
        return web.json_response(self._engine.tokenizer_info)

    # ---------------- about the server
    async def models(self, request: web.Request) -> web.Response:
        return web.json_response(serving.list_models(self._config))

    async def model(self, request: web.Request) -> web.Response:
        return web.json_response(serving.retrieve_model(self._config, request.match_info["name"]))

    async def health(self, request: web.Request) -> web.Response:
        state = self._engine.state
        return web.json_response({"status": state}, status=200 if state in ("starting", "ready", "draining") else 503)

    async def ready(self, request: web.Request) -> web.Response:
        state = self._engine.state
        return web.json_response({"status": state}, status=200 if state == "ready" else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._engine.render().encode(), headers={"Content-Type": CONTENT_TYPE})

    async def server_info(self, request: web.Request) -> web.Response:
        info = serving.server_info(self._engine)
        return web.json_response({**info, "pid": os.getpid(), "batch_socket": self._batch_socket})

    async def flush_cache(self, request: web.Request) -> web.Response:
        self._engine.flush_cache()
        return web.json_response({"flushed": True})

    async def openapi(self, request: web.Request) -> web.Response:
        return web.json_response(openapi.document(self._config))

    async def docs(self, request: web.Request) -> web.Response:
        return web.Response(text=openapi.page(self._config), content_type="text/html", charset="utf-8")
