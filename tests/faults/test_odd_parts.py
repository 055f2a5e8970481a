"""Values of any type inside the fields of a body: each is accepted or refused by name, and none is a failure of the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from test_server import USER, ScriptedEngine

from minisgl.api.endpoints.table import ENDPOINTS
from minisgl.api.http.openapi import BODIES
from minisgl.api.requests.fields import Support
from minisgl.errors import RequestError

ODD: tuple[Any, ...] = ({}, [], [{}], [[]], {"type": {}}, 5, -1.5, "x", "", True, None)


def samples(schema: dict[str, Any]) -> Iterator[Any]:
    """Values that a schema describes: one for each of its alternatives at least."""
    for kind in ("oneOf", "anyOf"):
        if kind in schema:
            for one in schema[kind]:
                yield from samples(one)
            return
    if "const" in schema or "enum" in schema:
        yield from schema.get("enum", [schema.get("const")])
        return
    kinds = schema.get("type", "string")
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind == "object":
            parts = {name: list(samples(part)) for name, part in schema.get("properties", {"x": {}}).items()}
            first = {name: values[0] for name, values in parts.items()}
            yield from ({**first, name: value} for name, values in parts.items() for value in values)
        elif kind == "array":
            yield from ([item] for item in samples(schema.get("items", {})))
        else:
            low = max(schema.get("minimum", 1), 1)
            yield {"string": "a", "integer": low, "number": low, "boolean": True, "null": None}[kind]


def wrecked(value: Any) -> Iterator[Any]:
    """The value with an odd one in the place of each of its parts."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for at, part in parts:
        for other in (*ODD, *wrecked(part)):
            yield {**value, at: other} if isinstance(value, dict) else [other if i == at else p for i, p in enumerate(value)]


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("parsers", [{}, {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}])
def test_whatever_stands_inside_a_field_is_read_or_refused(path: str, parsers: dict[str, str]) -> None:
    config, endpoint = ScriptedEngine(**parsers).config, ENDPOINTS[path]
    tools = {"tools": [{"type": "function", "name": "f", "input_schema": {}, "function": {"name": "f"}}]}
    tried, refused = 0, list[tuple[str, Any, RequestError]]()
    for field in endpoint.fields.having(Support.SUPPORTED):
        least = {k: v for k, v in BODIES[path].items() if k not in endpoint.fields.either} | {field.name: None}
        if endpoint.fields.either and field.name not in endpoint.fields.either:
            least |= {"messages": USER} if "messages" in endpoint.fields.either else {"text": "a"}
        if field.name == "tool_choice" and path != "/v1/messages":
            least |= tools
        for sample in samples(field.schema):
            for value in (sample, *ODD, *wrecked(sample)):
                tried += 1
                try:
                    endpoint.parse(config, {**least, field.name: value})
                except RequestError as e:
                    refused.append((field.name, value, e))
    assert 20 < len(refused) < tried
    assert [case for case in refused if case[2].status not in (400, 404) or case[2].param is None] == []
