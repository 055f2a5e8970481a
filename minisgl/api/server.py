"""The HTTP routes.  Runs in the api process, on the thread of its event loop, beside the gateway.

POST /v1/chat/completions, /v1/completions     generate; `stream: true` answers with server-sent events
GET  /v1/models, /v1/models/{name}             the names that `model` may have
GET  /health                                   200 while the process can still become or be useful, 503 when dead
GET  /ready                                    200 when requests are served, 503 otherwise
GET  /server_info                              what runs here, and the scheduler's statistics
POST /flush_cache                              empty the prefix cache
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aiohttp import HttpVersion11, web

from minisgl.api import serving
from minisgl.api.errors import body_too_large, errors, name_response
from minisgl.api.openai import GenerationRequest, parse_json
from minisgl.api.pipe import Pipe
from minisgl.api.requests import Engine
from minisgl.errors import RequestError

# For web.AppRunner.  A client that leaves cancels its handler, and with it its request in the engine; compressed bodies are
# refused, so nothing may inflate them first.
RUN_KWARGS: Mapping[str, Any] = {"handler_cancellation": True, "auto_decompress": False, "keepalive_timeout": 75.0}

_BODY_SECONDS = 30.0  # how long a client may take to send a body
_MAX_IGNORED = 32  # names in X-Ignored-Params
_SSE_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
Parse = Callable[[Engine, Mapping[str, Any]], GenerationRequest]


def build_app(engine: Engine, batch_socket: str | None = None) -> web.Application:
    """The application; run it with `web.AppRunner(app, **RUN_KWARGS)`.  `batch_socket`: address reported to batch clients."""
    routes = _Routes(engine, batch_socket)
    app = web.Application(client_max_size=engine.config.server.max_body_bytes, middlewares=[errors])
    app.on_response_prepare.append(name_response)
    app.router.add_post("/v1/chat/completions", routes.chat)
    app.router.add_post("/v1/completions", routes.completion)
    app.router.add_get("/v1/models", routes.models)
    app.router.add_get("/v1/models/{name:.+}", routes.model)
    app.router.add_get("/health", routes.health)
    app.router.add_get("/ready", routes.ready)
    app.router.add_get("/server_info", routes.server_info)
    app.router.add_post("/flush_cache", routes.flush_cache)
    return app


class _Routes:
    """The handlers.  Raised RequestErrors are rendered by the middleware."""

    def __init__(self, engine: Engine, batch_socket: str | None) -> None:
        self._engine = engine
        self._batch_socket = batch_socket

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, serving.chat_request)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, serving.completion_request)

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response(serving.list_models(self._engine.config))

    async def model(self, request: web.Request) -> web.Response:
        return web.json_response(serving.retrieve_model(self._engine.config, request.match_info["name"]))

    async def health(self, request: web.Request) -> web.Response:
        state = self._engine.state
        return web.json_response({"status": state}, status=200 if state in ("starting", "ready", "draining") else 503)

    async def ready(self, request: web.Request) -> web.Response:
        state = self._engine.state
        return web.json_response({"status": state}, status=200 if state == "ready" else 503)

    async def server_info(self, request: web.Request) -> web.Response:
        info = serving.server_info(self._engine)
        return web.json_response({**info, "pid": os.getpid(), "batch_socket": self._batch_socket})

    async def flush_cache(self, request: web.Request) -> web.Response:
        self._engine.flush_cache()
        return web.json_response({"flushed": True})

    async def _generate(self, request: web.Request, parse: Parse) -> web.StreamResponse:
        body = parse_json(await self._body(request))
        parsed = parse(self._engine, body)
        headers = _ignored_header(parsed.ignored)
        if parsed.stream:
            return await self._stream(request, parsed, headers)
        return web.json_response(await serving.answer(self._engine, parsed), headers=headers)

    async def _stream(self, request: web.Request, parsed: GenerationRequest, headers: dict[str, str]) -> web.StreamResponse:
        answer = await serving.stream(self._engine, parsed)
        try:
            first = await answer.first()  # an error up to here is still an ordinary answer
            response = web.StreamResponse(headers={**_SSE_HEADERS, **headers})
            if request.version >= HttpVersion11:
                response.enable_chunked_encoding()
            try:
                await response.prepare(request)
                await response.write(first)
                await Pipe(request, response, answer).run()
                await response.write_eof()
            except ConnectionResetError:
                pass  # the client has left
            return response
        finally:
            answer.close()

    async def _body(self, request: web.Request) -> bytes:
        """The raw body.  Raises RequestError for what is not plain JSON, too large, or too slow."""
        if request.content_type != "application/json":
            raise RequestError("The Content-Type header must be application/json.", code="unsupported_content_type")
        if "Content-Encoding" in request.headers:
            raise RequestError("Compressed request bodies are not supported.", code="unsupported_content_encoding")
        limit = self._engine.config.server.max_body_bytes
        if (request.content_length or 0) > limit:
            raise body_too_large(limit)
        try:
            return await asyncio.wait_for(request.read(), _BODY_SECONDS)
        except asyncio.TimeoutError:
            text = f"The request body did not arrive within {_BODY_SECONDS:.0f} seconds."
            raise RequestError(text, status=408, code="request_timeout") from None
        except web.HTTPRequestEntityTooLarge:
            raise body_too_large(limit) from None


def _ignored_header(names: Sequence[str]) -> dict[str, str]:
    """Field names come from the client: only plain ones may enter a header."""
    plain = [n for n in names if len(n) <= 64 and n.isascii() and n.replace(".", "_").isidentifier()]
    return {"X-Ignored-Params": ",".join(plain[:_MAX_IGNORED])} if plain else {}
