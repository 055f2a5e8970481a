"""Builds the HTTP application: routes and middlewares.

A running server shows itself at GET / (see pages.py), and describes its routes and fields at GET /docs, and for programs at GET
/openapi.json (see openapi.py).  Runs in the api process, on the thread of its event loop, next to the gateway.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from minisgl.api.batches.store import Store
from minisgl.api.batches.worker import Batches
from minisgl.api.caller import Callers
from minisgl.api.endpoints import responses
from minisgl.api.endpoints.table import ENDPOINTS
from minisgl.api.engine import Engine
from minisgl.api.http import openapi
from minisgl.api.http.auth import NOBODY, OPEN, TENANT, Keys, authenticate
from minisgl.api.http.batch_routes import FileRoutes
from minisgl.api.http.body import KEPT, json_handler, read_checked, respond, stream, timing_header
from minisgl.api.http.connection import connection_of
from minisgl.api.http.cors import preflights, sharing
from minisgl.api.http.docs_page import docs_values
from minisgl.api.http.door import DOOR, Door
from minisgl.api.http.errors import ACCOUNT, account_of, errors, for_anthropic, name_response, request_id
from minisgl.api.http.exposition import Exposition
from minisgl.api.http.journal_routes import JournalRoutes
from minisgl.api.http.keep_alive import KEEP_ALIVE, KeepAlive
from minisgl.api.http.live_routes import LiveRoutes, page_off
from minisgl.api.http.metrics import Metered
from minisgl.api.http.pages import Page, about, chat_values, page_file, page_files, wants_page
from minisgl.api.http.router_routes import RouterRoutes, sizes
from minisgl.api.http.stream_writer import TURN, Turn
from minisgl.api.http.trace_routes import TraceRoutes
from minisgl.api.http.watchers import Watchers
from minisgl.api.reader import Reader
from minisgl.api.request_log import RequestLog
from minisgl.api.requests import generate as serving
from minisgl.api.requests.unknown_fields import approximated_header, ignored_header
from minisgl.api.spans import TRACE_HEADERS
from minisgl.config import Config
from minisgl.errors import model_loading
from minisgl.events.addresses import described
from minisgl.version import __version__

# For web.AppRunner.  A client that leaves cancels its handler, and with it its request in the engine.  Compressed bodies are
# refused, so aiohttp must not inflate them first.
RUN_KWARGS: Mapping[str, Any] = {"handler_cancellation": True, "auto_decompress": False, "keepalive_timeout": 75.0}
STILL_SECONDS = 5.0  # without a sign of life, or for one step: /health shows it
BATCHES = web.AppKey("batches", Batches)  # only with a store
WATCHERS = web.AppKey("watchers", Watchers)


def build_app(
    engine: Engine,
    batch_socket: str | None = None,
    store: Store | None = None,
    request_log: RequestLog | None = None,
    keys: Keys | None = None,
) -> web.Application:
    """The application; run it with `web.AppRunner(app, **RUN_KWARGS)`.

    `batch_socket`: address reported to batch clients.  `store`: where files and batches are kept; closed with the application.
    `request_log`: told of every request.  `keys`: those of the configuration, which the caller may replace while it runs.
    """
    metered = engine if isinstance(engine, Metered) else Metered(engine)
    server, request_log = engine.config.server, request_log or RequestLog(engine.config.server.log_requests)
    keys = keys or keys_of(engine.config, store)
    middlewares = [_count(metered, request_log), errors, preflights(server.allow_origins), authenticate(keys)]
    app = web.Application(client_max_size=server.max_body_bytes, middlewares=middlewares)
    app._router = _Paths()  # the constructor's argument for it is deprecated
    app[TURN], app[KEEP_ALIVE], app[KEPT] = Turn(), KeepAlive(), metered.kept
    app.on_response_prepare.extend((name_response, _last_answer(metered)))
    if server.allow_origins:
        app.on_response_prepare.append(sharing(server.allow_origins))
    if store is not None:
        app[BATCHES] = Batches(store, metered, request_log)
        app.cleanup_ctx.append(_run_batches)
    routes = _Routes(metered, batch_socket, keys)
    routes.add_to(app.router)
    app.on_cleanup.append(routes.close)
    app[DOOR] = Door(metered, keys, routes.callers, request_log)
    RouterRoutes(metered).add_to(app.router)
    JournalRoutes(metered, keys).add_to(app.router)
    TraceRoutes(metered, keys).add_to(app)
    live = LiveRoutes(metered, keys, routes.callers)
    live.add_to(app.router)
    app.on_shutdown.append(live.close)
    app[WATCHERS] = live.watchers
    FileRoutes(engine.config, app.get(BATCHES)).add_to(app.router)
    return app


def _last_answer(engine: Engine) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """`on_response_prepare`: says with an answer that no other can follow on its connection."""

    async def prepare(request: web.Request, response: web.StreamResponse) -> None:
        connection = connection_of(request)
        if engine.state in ("draining", "stopped", "dead") or (connection is not None and connection.ending):
            response.force_close()
            response.headers["Connection"] = "close"

    return prepare


def keys_of(config: Config, store: Store | None) -> Keys:
    """The API keys of the configuration, whose tenants have the same names at every start on a store.  Raises UserError."""
    users, admins = config.server.api_keys, config.server.admin_api_keys
    return Keys(users, admins, store.salt() if store is not None and (users or admins) else b"")


async def _run_batches(app: web.Application) -> AsyncIterator[None]:
    app[BATCHES].start()
    yield
    await app[BATCHES].close()
    app[BATCHES].store.close()


def _count(engine: Metered, request_log: RequestLog) -> Middleware:
    """Middleware that counts answers by route and status, with 499 for clients that have left, and keeps their accounts.

    Probes and scrapes have no account in the request_log: they come again and again, whether or not there is load.
    """
    unnoticed = RequestLog()

    @web.middleware
    async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        route, method = (resource.canonical, request.method) if resource is not None else ("unknown", "unknown")
        kept = unnoticed if route in OPEN else request_log
        with kept.request(f"{method} {route}" if resource is not None else route, "http", request_id(request)) as account:
            request[ACCOUNT] = account
            if kept.on_end is not None:
                account.caller = {name: request.headers[name] for name in TRACE_HEADERS if name in request.headers}
            try:
                response = await handler(request)
                account.status = response.status
                return response
            finally:
                engine.metrics.responses[method, route, account.status] += 1

    return count


class _Paths(web.UrlDispatcher):
    """Routes that are also found with a slash at the end, as some clients join their base URL and a path."""

    async def resolve(self, request: web.Request) -> web.UrlMappingMatchInfo:
        found = await super().resolve(request)
        if found.http_exception is None or not request.path.endswith("/") or request.path == "/":
            return found
        return await super().resolve(request.clone(rel_url=request.rel_url.with_path(request.path.rstrip("/") or "/")))


class _Routes:
    """The handlers.  The middleware renders the RequestErrors that they raise."""

    def __init__(self, engine: Metered, batch_socket: str | None, keys: Keys) -> None:
        self._engine = engine
        self._config = engine.config
        self.callers = Callers(engine)
        self._batch_socket = batch_socket
        self._reader = Reader()
        self._keys = keys
        self._exposition = Exposition(engine)
        self._chat_page, self._docs_page, self._page_files = Page("page/index.html"), Page("docs.html"), page_files()

    async def close(self, _: web.Application) -> None:
        self._reader.close()

    def add_to(self, router: web.UrlDispatcher) -> None:
        config = self._config
        for path in ENDPOINTS:
            router.add_post(path, self.post)
        router.add_get("/", self.start)
        router.add_get("/v1", self.start)
        router.add_route("*", r"/v1/responses/{response_id:(?!input_tokens$).+}", self.no_response)
        router.add_get("/v1/models", json_handler(lambda request: serving.list_models(config, for_anthropic(request))))
        router.add_get("/v1/models/{name:.*[^/]}", json_handler(self.model))
        router.add_get("/tokenizer_info", json_handler(self.tokenizer_info))
        router.add_get("/server_info", json_handler(self.server_info))
        router.add_post("/flush_cache", json_handler(self.flush_cache))
        router.add_get("/openapi.json", json_handler(lambda _: openapi.document(config)))
        router.add_get("/docs", self.docs)
        router.add_get("/page/{file}", self.page)
        router.add_get("/version", json_handler(lambda _: {"version": __version__}))
        router.add_get("/health", self.health)
        router.add_get("/ping", self.health)
        router.add_post("/ping", self.health)
        router.add_get("/ready", self.ready)
        router.add_get("/metrics", self.metrics)

    async def post(self, request: web.Request) -> web.StreamResponse:
        """Any of the endpoints with a JSON body.  Who would find no place is refused before the body is read."""
        endpoint = ENDPOINTS[request.path.rstrip("/")]
        tenant = request[TENANT].name
        engine = self.callers.call(tenant or request.remote or "", account=account_of(request), tenant=tenant)
        engine.check_open(generates=endpoint.generates)
        parsed = await read_checked(request, self._config, self._reader)
        streams = parsed.stream and endpoint.stream is not None
        if (connection := connection_of(request)) is not None:
            connection.generates(streams)
        headers = ignored_header(self._config, endpoint.fields, parsed.ignored)
        headers |= approximated_header(parsed.relaxed)
        if streams and endpoint.stream is not None:
            account_of(request).kind = "stream"
            return await stream(request, await endpoint.stream(engine, parsed), headers)
        answer = await endpoint.answer(engine, parsed)
        return await respond(request, answer, {**headers, **timing_header(answer)})

    async def no_response(self, request: web.Request) -> web.Response:
        raise responses.not_stored(request.match_info["response_id"])

    def model(self, request: web.Request) -> Any:
        return serving.retrieve_model(self._config, request.match_info["name"], for_anthropic(request))

    def tokenizer_info(self, _: web.Request) -> Any:
        if not self._engine.tokenizer_info:
            raise model_loading()
        return self._engine.tokenizer_info

    def server_info(self, request: web.Request) -> Any:
        """What an administrator may have goes beyond what everybody with a key may."""
        more = {"pid": os.getpid(), "batch_socket": self._batch_socket} if self._keys.may_administer(request) else {}
        facts = {**serving.server_info(self._engine), **sizes(self._config, self._engine.stats)}
        return {**facts, "kv_events": described(self._config), **more}

    def flush_cache(self, request: web.Request) -> Any:
        self._keys.check_admin(request)
        self._engine.flush_cache()
        return {"flushed": True}

    async def health(self, request: web.Request) -> web.Response:
        """200 while the engine works, or will work again; with ?deep=1 only while no process stands still."""
        engine = self._engine
        still = engine.still(STILL_SECONDS)
        bad = engine.state in ("dead", "stopped") or (still and request.query.get("deep", "0") not in ("0", "false", ""))
        body = {"status": engine.state, "down": engine.down, "still": still}
        return web.json_response(body, status=503 if bad else 200)

    async def ready(self, _: web.Request) -> web.Response:
        """200 while requests are taken and served at once."""
        state = self._engine.state
        return web.json_response({"status": state}, status=200 if state == "ready" else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        body, content_type = await self._exposition.render(",".join(request.headers.getall("Accept", ())))
        return web.Response(body=body, headers={"Content-Type": content_type, "Vary": "Accept"})

    async def start(self, request: web.Request) -> web.Response:
        """What runs: a page with a chat for browsers, JSON for programs."""
        facts = about(self._engine, request[TENANT] is not NOBODY)
        if wants_page(",".join(request.headers.getall("Accept", ()))):
            if self._config.server.no_page:
                raise page_off()
            up = "../" if request.path.rstrip("/") != request.path and request.path != "/" else ""
            response = self._chat_page.response({**chat_values(facts), "up": up})
        else:
            response = web.json_response(facts)
        response.headers["Vary"] = "Accept"
        return response

    async def page(self, request: web.Request) -> web.Response:
        """A file that the page loads: a module or its style."""
        if self._config.server.no_page:
            raise page_off()
        return page_file(self._page_files, request.match_info["file"])

    async def docs(self, request: web.Request) -> web.Response:
        return self._docs_page.response(docs_values(self._config, request[TENANT] is not NOBODY))
