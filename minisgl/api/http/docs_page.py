"""Writes the page at GET /docs: each route with its fields, and its example to be sent.  Runs in the api process."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

from minisgl.api.http.openapi import ROUTES, Route, about, example, path_value
from minisgl.api.http.openapi_examples import UPLOAD
from minisgl.api.requests.fields import Fields, Schema, Support
from minisgl.config import Config


def docs_values(config: Config, known: bool) -> dict[str, str]:
    """The values of the page, in HTML.  `known`: the caller may know more than the names of the model."""
    unknown = "refused" if config.server.strict else "ignored, and named in the header <code>X-Ignored-Params</code>"
    said = f"Unknown fields are {unknown}." if known else ""
    return {
        "about": html.escape(about(config) if known else "This server needs an API key."),
        "unknown": said,
        "keys": "" if config.server.api_keys or config.server.admin_api_keys else "hidden",
        "routes": "".join(part for route in ROUTES for part in _route(route, config)),
    }


def _route(route: Route, config: Config) -> Iterator[str]:
    yield f"<details><summary><b>{route.method}</b> <code>{html.escape(route.path)}</code> "
    yield f"<span>{html.escape(route.summary)}</span></summary>"
    yield from _try(route, config)
    yield from _fields(route.fields)
    yield "</details>"


def _try(route: Route, config: Config) -> Iterator[str]:
    """A form that sends the example; the page's script does it."""
    yield f'<form data-method="{route.method.upper()}" data-path="{html.escape(route.path)}">'
    for name in (part[1:-1] for part in route.path.split("/") if part.startswith("{")):
        yield f'<label>{name} <input data-part="{name}" value="{html.escape(path_value(name, config))}"></label>'
    for field in route.query:
        kind = html.escape(written(field.schema))
        yield f'<label>{field.name} <input data-query="{field.name}" placeholder="{kind}"></label>'
    body = ""
    if route.fields is not None:
        body = json.dumps(example(route, config), indent=2, ensure_ascii=False)
    elif (route.method, route.path) == ("post", "/v1/files"):
        yield f'<label>purpose <input data-form="purpose" value="{UPLOAD["purpose"]}"></label>'
        body = UPLOAD["file"]
    if body:
        yield f'<textarea rows="{body.count(chr(10)) + 2}" spellcheck="false" aria-label="Body">{html.escape(body)}</textarea>'
    yield '<p><button>Try it</button> <button type="button" class="stop" hidden>Stop</button> '
    yield '<button type="button" class="curl">As curl</button></p><pre class="answer" aria-live="polite" hidden></pre></form>'


def _fields(fields: Fields | None) -> Iterator[str]:
    if fields is None:
        yield "<p class=less>No body.</p>"
        return
    yield '<div class="wide"><table>'
    for field in sorted(fields.having(Support.SUPPORTED), key=lambda f: (not f.required, f.name)):
        need = " (required)" if field.required else " (one of them is required)" if field.name in fields.either else ""
        yield f"<tr><td><code>{field.name}</code><td>{html.escape(field.doc)}{need}"
        yield f"<div class=less>{html.escape(written(field.schema))}</div>"
    yield "</table></div>"
    if refused := ", ".join(sorted(field.name for field in fields.having(Support.REFUSED))):
        yield f"<p class=less>Refused, unless they ask for nothing: {refused}.</p>"


# ---------------- types
_NOTHING = ("[]", "null | false")  # other ways to leave something out


def written(schema: Mapping[str, Any]) -> str:
    """A JSON schema as people write types: `string | {type: "text", text: string}[]`."""
    if "title" in schema:
        return str(schema["title"])
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return " | ".join(map(json.dumps, schema["enum"]))
    for kind in ("oneOf", "anyOf"):
        if kind in schema:
            texts = [text for text in map(written, schema[kind]) if text not in _NOTHING]
            return " | ".join(dict.fromkeys(texts))
    kinds = schema.get("type", "any JSON")
    return " | ".join(_simple(kind, schema) for kind in ([kinds] if isinstance(kinds, str) else kinds))


def _simple(kind: str, schema: Mapping[str, Any]) -> str:
    if kind == "array":
        if schema.get("maxItems") == 0:
            return "[]"
        if "items" not in schema:
            return "array"
        items = written(schema["items"])
        return f"({items})[]" if " | " in _outside(items) else f"{items}[]"
    if kind == "object":
        return _object(schema)
    if "minimum" in schema:
        return f"{kind} {schema['minimum']}..{schema.get('maximum', '')}"
    return kind


def _object(schema: Mapping[str, Any]) -> str:
    needed = schema.get("required", ())
    keys = [
        f"{n}: {written(s)}" if n in needed else f"{n}?: {written(_given(s))}" for n, s in schema.get("properties", {}).items()
    ]
    if isinstance(values := schema.get("additionalProperties"), dict):
        keys.append(f"[name]: {written(values)}")
    return f"{{{', '.join(keys)}}}" if keys else "object"


def _given(schema: Mapping[str, Any]) -> Schema:
    """The schema of a key that is not null: that it may be is said by its question mark."""
    out = dict(schema)
    if isinstance(out.get("type"), list):
        out["type"] = [kind for kind in out["type"] if kind != "null"]
    if "enum" in out:
        out["enum"] = [value for value in out["enum"] if value is not None]
    if "oneOf" in out:
        out["oneOf"] = [one for one in out["oneOf"] if one != {"type": "null"}]
    return out


def _outside(text: str) -> str:
    """The part of a type that stands in no braces or brackets."""
    out, depth = "", 0
    for c in text:
        depth += (c in "{(") - (c in "})")
        out += c if depth == 0 else ""
    return out
