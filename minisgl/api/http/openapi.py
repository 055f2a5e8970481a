"""Describes the API at GET /openapi.json, from the declarations that requests are checked with; docs_page.py does so at /docs.

Runs in the api process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minisgl.api.endpoints.table import ENDPOINTS
from minisgl.api.http.auth import OPEN
from minisgl.api.http.batch_routes import BATCH, MAX_PAGE, PURPOSES
from minisgl.api.http.journal_routes import JOURNAL
from minisgl.api.http.live_routes import LIVE, STEPS, WATCHER
from minisgl.api.http.openapi_examples import BODIES, PATH_VALUES, UPLOAD
from minisgl.api.http.openapi_schemas import ANSWERS, ERROR, MESSAGE_ERROR
from minisgl.api.http.trace_routes import TRACE
from minisgl.api.requests.fields import Field, Fields, Schema, Support, integer, nullable, string
from minisgl.api.requests.openai import served_names
from minisgl.config import Config
from minisgl.version import __version__


@dataclass(frozen=True, slots=True)
class Route:
    """One operation.

    `fields`: those of its JSON body, None without a body.  `query`: those of its URL.  `refusals`: statuses of its errors, in
    addition to those that every route may have.  `gives`: content types of a 200.
    """

    method: str
    path: str
    summary: str
    fields: Fields | None = None
    query: tuple[Field, ...] = ()
    refusals: tuple[int, ...] = ()
    gives: tuple[str, ...] = ("application/json",)


_BODY = (404, 408, 413)  # of a route with a body: an unknown model, too slow, too large
_ENGINE = (*_BODY, 429, 503, 504)  # of a route that needs the engine: too many requests, not ready, timed out
_STREAMS = ("application/json", "text/event-stream")
_PAGE = (string("after", "The id behind which the list begins."), integer("limit", "So many at most.", 1, MAX_PAGE))
_START, _START_KINDS = "What runs here, and the routes; for browsers a page.", ("application/json", "text/html")
ROUTES = (
    *(
        Route("post", path, e.summary, e.fields, (), _ENGINE, _STREAMS if e.stream else ("application/json",))
        for path, e in ENDPOINTS.items()
    ),
    Route("get", "/tokenizer_info", "Special tokens and chat template.", refusals=(503,)),
    Route("get", "/v1/models", "The names that model may have."),
    Route("get", "/v1/models/{name}", "One of them.", refusals=(404,)),
    Route("post", "/v1/files", "Upload a file (multipart: file, purpose); needs --data-dir.", refusals=_BODY),
    Route(
        "get",
        "/v1/files",
        "All files, newest first; purpose, after, limit.",
        query=(string("purpose", "Only those."), *_PAGE),
        refusals=(404,),
    ),
    Route("get", "/v1/files/{file_id}", "About a file.", refusals=(404,)),
    Route("delete", "/v1/files/{file_id}", "Delete a file.", refusals=(404, 409)),
    Route("get", "/v1/files/{file_id}/content", "What is in a file.", refusals=(404,), gives=("application/octet-stream",)),
    Route("post", "/v1/batches", "Answer a file of requests in the background.", BATCH, refusals=_BODY),
    Route("get", "/v1/batches", "All batches, newest first; after, limit.", query=_PAGE, refusals=(404,)),
    Route("get", "/v1/batches/{batch_id}", "How far a batch is.", refusals=(404,)),
    Route("post", "/v1/batches/{batch_id}/cancel", "Stop a batch; what is answered stays.", refusals=(404, 409)),
    Route(
        "get",
        "/health",
        "200 while the engine works or will work again, 503 when it has given up.",
        query=(string("deep", "1: 503 as well while a process stands still."),),
        refusals=(503,),
    ),
    Route("get", "/ping", "The same as /health.", refusals=(503,)),
    Route("post", "/ping", "The same as /health.", refusals=(503,)),
    Route("get", "/version", "The version of this server."),
    Route("get", "/ready", "200 when requests are served, 503 otherwise.", refusals=(503,)),
    Route("get", "/metrics", "Prometheus text.", gives=("text/plain",)),
    Route("get", "/server_info", "What runs here, and the scheduler's statistics; more for administrators."),
    Route(
        "get",
        "/v1/loads",
        "How much this server has to do, by SGLang's names, for routers.",
        query=(string("include", "Has no effect: everything is there."),),
    ),
    Route("get", "/model_info", "The model by SGLang's names, for routers."),
    Route("get", "/get_model_info", "The same as /model_info."),
    Route("post", "/flush_cache", "Empty the prefix cache; for administrators.", refusals=(401, 403)),
    Route(
        "post",
        "/debug/journal/start",
        "Begin a journal of the scheduler; for administrators.",
        JOURNAL,
        refusals=(401, 403, *_BODY, 409, 503, 507),
    ),
    Route("post", "/debug/journal/stop", "End it; for administrators.", refusals=(401, 403, 409, 503)),
    Route("get", "/debug/journal", "The journal that runs; for administrators.", refusals=(401, 403)),
    Route(
        "post",
        "/debug/trace",
        "A timeline of all processes for ui.perfetto.dev; for administrators.",
        query=TRACE,
        refusals=(401, 403, 409, 413, 503),
        gives=("application/octet-stream",),
    ),
    Route("get", "/debug/trace", "Whether a trace runs; for administrators.", refusals=(401, 403)),
    Route(
        "get",
        "/debug/live",
        "What the scheduler does, as server-sent events; for administrators, with another key of its requests alone.",
        refusals=(401, 403, 404, 429, 503),
        gives=("text/event-stream",),
    ),
    Route("post", "/debug/live", "What such a stream shows.", LIVE, refusals=(401, 403, 404, 408, 413, 503)),
    Route(
        "get",
        "/debug/explain",
        "What the scheduler decides and why, a line of JSON for each of its calls; for administrators.",
        query=(STEPS,),
        refusals=(401, 403, 404, 429, 503),
        gives=("application/x-ndjson",),
    ),
    Route(
        "post",
        "/debug/live/journal",
        "Have a stream show a journal, which is the body (application/octet-stream); for administrators.",
        query=(WATCHER,),
        refusals=(401, 403, 404, 408, 413, 503, 507),
    ),
    Route("get", "/debug/journals", "The journals in --data-dir; for administrators.", refusals=(401, 403, 404)),
    Route("get", "/page/{file}", "A file of the page at /.", refusals=(404,), gives=("text/javascript", "text/css")),
    Route("get", "/", _START, gives=_START_KINDS),
    Route("get", "/v1", _START, gives=_START_KINDS),
    Route("get", "/openapi.json", "This description, for programs."),
    Route("get", "/docs", "This description, for people.", gives=("text/html",)),
)


def document(config: Config) -> dict[str, Any]:
    """The OpenAPI 3.1 description."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route, config)
    out: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "minisgl", "version": __version__, "description": about(config)},
        "paths": paths,
        "components": {"schemas": {"Error": ERROR, "MessageError": MESSAGE_ERROR}},
    }
    if config.server.api_keys or config.server.admin_api_keys:
        out["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        out["security"] = [{"bearer": []}, {"x-api-key": []}, *([] if config.server.api_keys else [{}])]
    return out


_REFUSALS = {
    400: "The request cannot be used; `param` names the field.",
    401: "An API key is needed.",
    403: "Not with this API key.",
    404: "There is no such thing: a model, a file, a batch.",
    408: "The request did not arrive in time.",
    409: "Not in this state.",
    413: "The body is too large.",
    429: "Too many requests; see Retry-After.",
    431: "A header is too long.",
    500: "The server failed.",
    503: "Not ready, or about to end; see Retry-After.",
    504: "The request's timeout has passed.",
    507: "The disk is full.",
}
_ALWAYS = (400, 431, 500)


def _operation(route: Route, config: Config) -> dict[str, Any]:
    out: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method}_{route.path.strip('/').replace('/', '_')}".translate({ord(c): None for c in "{}."}),
        "responses": {"200": _answer(route)},
    }
    shape = "MessageError" if route.path.startswith("/v1/messages") else "Error"
    states = route.path in ("/health", "/ready", "/ping")  # their 503 is an answer
    for status in sorted({*_ALWAYS, *route.refusals, *((401,) if config.server.api_keys else ())}):
        schema = {"$ref": f"#/components/schemas/{shape}"} if status != 503 or not states else ANSWERS[f"get {route.path}"]
        out["responses"][str(status)] = {"description": _REFUSALS[status], "content": {"application/json": {"schema": schema}}}
    names = [part[1:-1] for part in route.path.split("/") if part.startswith("{")]
    if config.server.api_keys and route.path in OPEN:
        out["security"] = []
    parameters: list[dict[str, Any]] = [
        {
            "name": n,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "minLength": 1},
            "example": path_value(n, config),
        }
        for n in names
    ]
    parameters += [{"name": f.name, "in": "query", "required": False, "schema": _schema(f)} for f in route.query]
    if parameters:
        out["parameters"] = parameters
    if route.fields is not None:
        content = {"application/json": {"schema": _body(route.fields, config), "example": example(route, config)}}
        out["requestBody"] = {"required": True, "content": content}
    elif (route.method, route.path) == ("post", "/v1/files"):
        form = {
            "file": {"type": "string", "format": "binary"},
            "purpose": _schema(string("purpose", "What it is for.", *PURPOSES)),
        }
        schema = {"type": "object", "properties": form, "required": list(form)}
        out["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": schema, "example": UPLOAD}}}
    return out


def example(route: Route, config: Config) -> Schema:
    """A small body that the route answers."""
    named = {"model": served_names(config)[0]} if route.fields is not None and "model" in route.fields else {}
    return {**named, **BODIES[route.path]}


def path_value(name: str, config: Config) -> str:
    """An example of a part of a path."""
    return PATH_VALUES.get(name) or served_names(config)[0]


def _answer(route: Route) -> dict[str, Any]:
    answer = {"schema": ANSWERS.get(f"{route.method} {route.path}", {"type": "object"})}
    shapes: dict[str, Schema] = {"application/json": answer, "text/event-stream": {}}  # events differ by dialect
    return {
        "description": "The answer.",
        "content": {kind: shapes.get(kind, {"schema": {"type": "string"}}) for kind in route.gives},
    }


def _schema(field: Field) -> Schema:
    return {"description": field.doc, **field.schema}


def _body(fields: Fields, config: Config) -> Schema:
    properties = {f.name: _schema(f) for f in sorted(fields.having(Support.SUPPORTED), key=lambda f: f.name)}
    if "model" in properties and not config.server.any_model_name:
        properties["model"]["enum"] = list(served_names(config))
    needed = {*fields.required, *fields.either}
    schema: Schema = {
        "type": "object",
        "properties": {name: field if name in needed else nullable(field) for name, field in properties.items()},
    }
    if fields.required:
        schema["required"] = list(fields.required)
    if fields.either:
        schema["oneOf"] = [{"required": [name]} for name in fields.either]
    return schema


def about(config: Config) -> str:
    names = ", ".join(served_names(config))
    return f"Serves {names}; up to {config.max_context} tokens for prompt and answer."
