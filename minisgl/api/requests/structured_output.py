"""The fields of a request body that bind its answer to a form -> a grammar.  Pure functions; run in the api process.

`response_format` is OpenAI's; `guided_*` and `structured_outputs` are vLLM's names, `regex`, `ebnf` and `json_schema` SGLang's.
A request may have one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from minisgl import grammar
from minisgl.api.requests.fields import Fields, loads, wrong_type
from minisgl.errors import InvalidParam, RequestError

MAX_OPTIONS = 4096


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar, "" for none, and the field that asked for it."""

    grammar: str = ""
    field: str = ""


def constraint(fields: Fields) -> Constraint:
    """What a body asks for.  That the grammar is in order is checked later, beside the event loop (minisgl.grammar.check).

    Raises InvalidParam naming the field.
    """
    found: list[Constraint] = []
    if text := _response_format(fields.get("response_format", dict, "an object")):
        found.append(Constraint(text, "response_format"))
    for name, make in _FIELDS.items():
        value = fields.get(name, object, "")
        if value is not None and value != []:
            found.append(Constraint(make(value, name), name))
    outputs = fields.get("structured_outputs", dict, "an object") or {}
    for name, value in outputs.items():
        if value is None or value is False or value == []:
            continue
        at = f"structured_outputs.{name}"
        if name not in _OUTPUTS:
            raise InvalidParam(at, f"{at[:80]} is not supported; use one of {', '.join(_OUTPUTS)}.", "unsupported_parameter")
        found.append(Constraint(_OUTPUTS[name](value, at), at))
    if len(found) > 1:
        names = f"{found[0].field} and {found[1].field}"
        raise InvalidParam(found[1].field, f"{names} exclude each other: an answer can have one form.")
    return found[0] if found else Constraint()


def _response_format(value: Mapping[str, Any] | None) -> str:
    if not value:
        return ""
    kind, at = value.get("type"), "response_format"
    if kind == "text":
        return ""
    if kind == "json_object":
        return grammar.json_object()
    if kind != "json_schema":
        raise InvalidParam(f"{at}.type", f"{at}.type must be text, json_object or json_schema.")
    inner = value.get("json_schema")
    if not isinstance(inner, dict):
        raise wrong_type(f"{at}.json_schema", "an object", inner)
    schema = inner.get("schema")
    if schema is None:
        raise InvalidParam(f"{at}.json_schema.schema", f"{at}.json_schema.schema is required.", "missing_required_parameter")
    return _schema(schema, f"{at}.json_schema.schema")


def _schema(value: Any, at: str) -> str:
    """An object, or its JSON text."""
    if isinstance(value, str):

        def broken(fault: str) -> RequestError:
            return InvalidParam(at, f"{at} must be a JSON schema: {fault}.")

        value = loads(value, broken)
    if not isinstance(value, dict):
        raise wrong_type(at, "an object", value)
    return grammar.json_schema(value)


def _text(make: Callable[[str], str]) -> Callable[[Any, str], str]:
    def read(value: Any, at: str) -> str:
        if not isinstance(value, str):
            raise wrong_type(at, "a string", value)
        try:
            return make(value)
        except InvalidParam as e:
            raise InvalidParam(at, e.message) from e

    return read


def _choice(value: Any, at: str) -> str:
    if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
        raise wrong_type(at, "an array of strings", value)
    if len(value) > MAX_OPTIONS:
        raise InvalidParam(at, f"{at} may hold at most {MAX_OPTIONS} strings.")
    return grammar.choice(value)


def _any_object(value: Any, at: str) -> str:
    if value is not True:
        raise wrong_type(at, "a boolean", value)
    return grammar.json_object()


_FIELDS: Mapping[str, Callable[[Any, str], str]] = {
    "guided_json": _schema,
    "guided_regex": _text(grammar.regex),
    "guided_choice": _choice,
    "guided_grammar": _text(grammar.ebnf),
    "json_schema": _schema,
    "regex": _text(grammar.regex),
    "choice": _choice,
    "ebnf": _text(grammar.ebnf),
}
_OUTPUTS: Mapping[str, Callable[[Any, str], str]] = {
    "json": _schema,
    "regex": _text(grammar.regex),
    "choice": _choice,
    "grammar": _text(grammar.ebnf),
    "json_object": _any_object,
}
USED = frozenset({"response_format", "structured_outputs", *_FIELDS})
