"""GET /openapi.json and /docs: the routes and fields of the API, from the tables that requests are checked with.

A field that the checks know is here, under its name; openapi_schemas says what its values are.  Runs in the api process.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minisgl.api.endpoints.anthropic import COUNT_FIELDS, MESSAGE_FIELDS, MESSAGE_UNSUPPORTED
from minisgl.api.endpoints.embeddings import EMBEDDING_FIELDS, EMBEDDING_UNSUPPORTED
from minisgl.api.endpoints.responses import RESPONSE_FIELDS, RESPONSE_UNSUPPORTED
from minisgl.api.endpoints.sglang import GENERATE_FIELDS
from minisgl.api.endpoints.tokenize import DETOKENIZE_FIELDS, TOKENIZE_FIELDS
from minisgl.api.http.batch_routes import BATCH_FIELDS, MAX_PAGE, PURPOSES
from minisgl.api.http.openapi_schemas import ANSWERS, ERROR, MESSAGE_ERROR, SCHEMAS, SPECIAL, Schema, integer, nullable, string
from minisgl.api.requests.openai import CHAT_UNSUPPORTED, CHAT_USED, COMPLETION_UNSUPPORTED, COMPLETION_USED
from minisgl.config import Config
from minisgl.version import __version__


@dataclass(frozen=True, slots=True)
class Route:
    """One operation.  `fields`: of its JSON body, None where it has none; `required`: those that cannot be left out, `either`:
    those of which there must be one; `query`: of its URL; `refusals`: statuses of its errors, beside those that any may have.
    `gives`: what a 200 is."""

    method: str
    path: str
    summary: str
    fields: Iterable[str] | None = None
    unsupported: Iterable[str] = ()
    required: tuple[str, ...] = ()
    either: tuple[str, ...] = ()
    query: Mapping[str, Schema] | None = None
    refusals: tuple[int, ...] = ()
    gives: tuple[str, ...] = ("application/json",)


_BODY = (404, 408, 413)  # of what has a body: an unknown model, too slow, too large
_ASKS = (*_BODY, 429, 503, 504)  # of what asks the engine: too many requests, not ready, timed out
_STREAMS = ("application/json", "text/event-stream")
_PAGE = {
    "after": string("The id behind which the list begins."),
    "limit": integer("So many at most.", 1, MAX_PAGE),
}
ROUTES = (
    Route(
        "post",
        "/v1/chat/completions",
        "Answer a conversation.",
        CHAT_USED,
        CHAT_UNSUPPORTED,
        ("messages",),
        refusals=_ASKS,
        gives=_STREAMS,
    ),
    Route(
        "post",
        "/v1/completions",
        "Continue texts.",
        COMPLETION_USED,
        COMPLETION_UNSUPPORTED,
        ("prompt",),
        refusals=_ASKS,
        gives=_STREAMS,
    ),
    Route(
        "post",
        "/v1/responses",
        "Answer, in the shape of the Responses API; stateless.",
        RESPONSE_FIELDS,
        RESPONSE_UNSUPPORTED,
        ("input",),
        refusals=_ASKS,
        gives=_STREAMS,
    ),
    Route(
        "post",
        "/v1/messages",
        "Answer, in Anthropic's shape.",
        MESSAGE_FIELDS,
        MESSAGE_UNSUPPORTED,
        ("messages", "max_tokens"),
        refusals=_ASKS,
        gives=_STREAMS,
    ),
    Route(
        "post",
        "/v1/messages/count_tokens",
        "How long a prompt would be.",
        COUNT_FIELDS,
        MESSAGE_UNSUPPORTED,
        ("messages",),
        refusals=_ASKS,
    ),
    Route("post", "/v1/embeddings", "Vectors of texts.", EMBEDDING_FIELDS, EMBEDDING_UNSUPPORTED, ("input",), refusals=_ASKS),
    Route(
        "post",
        "/generate",
        "Continue texts or token ids; the answer has the ids, too.",
        GENERATE_FIELDS,
        either=("text", "input_ids"),
        refusals=_ASKS,
        gives=_STREAMS,
    ),
    Route(
        "post", "/tokenize", "Text or messages to token ids.", TOKENIZE_FIELDS, either=("prompt", "messages"), refusals=_ASKS
    ),
    Route("post", "/detokenize", "Token ids to text.", DETOKENIZE_FIELDS, (), ("tokens",), refusals=_ASKS),
    Route("get", "/tokenizer_info", "Special tokens and chat template.", refusals=(503,)),
    Route("get", "/v1/models", "The names that model may have."),
    Route("get", "/v1/models/{name}", "One of them.", refusals=(404,)),
    Route("post", "/v1/files", "Upload a file (multipart: file, purpose); needs --data-dir.", refusals=_BODY),
    Route(
        "get",
        "/v1/files",
        "All files, newest first; purpose, after, limit.",
        query={"purpose": string("Only those."), **_PAGE},
        refusals=(404,),
    ),
    Route("get", "/v1/files/{file_id}", "About a file.", refusals=(404,)),
    Route("delete", "/v1/files/{file_id}", "Delete a file.", refusals=(404, 409)),
    Route("get", "/v1/files/{file_id}/content", "What is in a file.", refusals=(404,), gives=("application/octet-stream",)),
    Route(
        "post",
        "/v1/batches",
        "Answer a file of requests in the background.",
        BATCH_FIELDS,
        (),
        ("input_file_id", "endpoint", "completion_window"),
        refusals=_BODY,
    ),
    Route("get", "/v1/batches", "All batches, newest first; after, limit.", query=_PAGE, refusals=(404,)),
    Route("get", "/v1/batches/{batch_id}", "How far a batch is.", refusals=(404,)),
    Route("post", "/v1/batches/{batch_id}/cancel", "Stop a batch; what is answered stays.", refusals=(404, 409)),
    Route("get", "/health", "200 while the process can become or be useful, 503 when the engine is dead.", refusals=(503,)),
    Route("get", "/ready", "200 when requests are served, 503 otherwise.", refusals=(503,)),
    Route("get", "/metrics", "Prometheus text.", gives=("text/plain",)),
    Route("get", "/server_info", "What runs here, and the scheduler's statistics."),
    Route("post", "/flush_cache", "Empty the prefix cache."),
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
        "info": {"title": "minisgl", "version": __version__, "description": _about(config)},
        "paths": paths,
        "components": {"schemas": {"Error": ERROR, "MessageError": MESSAGE_ERROR}},
    }
    if config.server.api_keys:
        out["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        out["security"] = [{"bearer": []}]
    return out


_REFUSALS = {
    400: "The request cannot be used; `param` names the field.",
    401: "An API key is needed.",
    404: "There is no such thing: a model, a file, a batch.",
    408: "The request did not arrive in time.",
    409: "Not in this state.",
    413: "The body is too large.",
    429: "Too many requests; see Retry-After.",
    431: "A header is too long.",
    500: "The server failed.",
    503: "Not ready, or about to end; see Retry-After.",
    504: "The request's timeout has passed.",
}
_ALWAYS = (400, 431, 500)


def _operation(route: Route, config: Config) -> dict[str, Any]:
    out: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method}_{route.path.strip('/').replace('/', '_')}".translate({ord(c): None for c in "{}."}),
        "responses": {"200": _answer(route)},
    }
    shape = "MessageError" if route.path.startswith("/v1/messages") else "Error"
    states = route.path in ("/health", "/ready")  # whose 503 is an answer
    for status in sorted({*_ALWAYS, *route.refusals, *((401,) if config.server.api_keys else ())}):
        schema = {"$ref": f"#/components/schemas/{shape}"} if status != 503 or not states else ANSWERS[f"get {route.path}"]
        out["responses"][str(status)] = {"description": _REFUSALS[status], "content": {"application/json": {"schema": schema}}}
    names = [part[1:-1] for part in route.path.split("/") if part.startswith("{")]
    parameters = [{"name": n, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for n in names]
    parameters += [{"name": n, "in": "query", "required": False, "schema": schema} for n, schema in (route.query or {}).items()]
    if parameters:
        out["parameters"] = parameters
    if route.fields is not None:
        out["requestBody"] = {"required": True, "content": {"application/json": {"schema": _body(route, config)}}}
    elif (route.method, route.path) == ("post", "/v1/files"):
        form = {"file": {"type": "string", "format": "binary"}, "purpose": string("What it is for.", *PURPOSES)}
        schema = {"type": "object", "properties": form, "required": list(form)}
        out["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    return out


def _answer(route: Route) -> dict[str, Any]:
    schema = ANSWERS.get(f"{route.method} {route.path}", {"type": "object"})
    return {
        "description": "The answer.",
        "content": {kind: {"schema": schema if kind == "application/json" else {"type": "string"}} for kind in route.gives},
    }


def _field(route: Route, name: str) -> Schema:
    return SPECIAL.get((route.path, name)) or SCHEMAS.get(name, {})


def _body(route: Route, config: Config) -> Schema:
    needed = {*route.required, *route.either}
    names = config.server.served_names or (config.model.name,)
    properties = {n: _field(route, n) for n in sorted(route.fields or ())}
    if "model" in properties and not config.server.any_model_name:
        properties["model"] = {**properties["model"], "enum": list(names)}
    schema: Schema = {
        "type": "object",
        "properties": {n: field if n in needed else nullable(field) for n, field in properties.items()},
    }
    if route.required:
        schema["required"] = list(route.required)
    if route.either:
        schema["oneOf"] = [{"required": [name]} for name in route.either]
    return schema


def _about(config: Config) -> str:
    names = ", ".join(config.server.served_names or (config.model.name,))
    return f"Serves {names}; up to {config.max_context} tokens for prompt and answer."


# ---------------- for people
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
code { font: 14px ui-monospace, monospace; background: #8881; padding: .1em .3em; border-radius: 3px }
summary { cursor: pointer; padding: .4rem 0 } details { border-top: 1px solid #8884 }
summary b { display: inline-block; width: 4.5rem; text-transform: uppercase; font-size: 13px; color: #06c }
table { border-collapse: collapse; margin: .3rem 0 1rem } td { padding: .15rem .8rem .15rem 0; vertical-align: top }
.less { color: #777 }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #ddd } summary b { color: #6af } }
"""


def page(config: Config) -> str:
    """One self-contained page of HTML."""
    return "".join(_page(config))


def _page(config: Config) -> Iterator[str]:
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>minisgl API</title><style>{_STYLE}</style>'
    yield f"<h1>minisgl {html.escape(__version__)}</h1><p>{html.escape(_about(config))}</p>"
    yield "<p>Unknown fields are "
    yield "refused" if config.server.strict else "ignored, and named in the header <code>X-Ignored-Params</code>"
    yield ". <code>null</code> is the same as leaving a field out. For programs: <a href=openapi.json>openapi.json</a>.</p>"
    for route in ROUTES:
        yield f"<details><summary><b>{route.method}</b> <code>{html.escape(route.path)}</code> "
        yield f"{html.escape(route.summary)}</summary>"
        yield from _fields(route)
        yield "</details>"
    yield "</html>"


def _fields(route: Route) -> Iterator[str]:
    if route.fields is None:
        yield "<p class=less>No fields.</p>"
        return
    yield "<table>"
    for name in sorted(route.fields, key=lambda n: (n not in route.required, n)):
        schema = _field(route, name)
        kind = schema.get("type", "")
        if "minimum" in schema or "maximum" in schema:
            kind += f" {schema.get('minimum', '')}..{schema.get('maximum', '')}"
        need = " (required)" if name in route.required else ""
        text = html.escape(schema.get("description", ""))
        yield f"<tr><td><code>{name}</code><td class=less>{html.escape(kind)}<td>{text}{need}"
    yield "</table>"
    if refused := ", ".join(sorted(route.unsupported)):
        yield f"<p class=less>Refused, unless they ask for nothing: {refused}.</p>"
