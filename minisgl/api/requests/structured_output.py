"""Structured output: turns the fields that prescribe the form of an answer into a grammar.

`response_format` is OpenAI's field; `guided_*` and `structured_outputs` are vLLM's names, `regex`, `ebnf` and `json_schema`
SGLang's.  A request may have one of them.  Pure functions; run in the api process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from minisgl import grammar
from minisgl.api.requests.fields import (
    BOOLEAN,
    JSON_SCHEMA,
    LOOSE_STRING,
    STRING,
    Field,
    Schema,
    an_object,
    check_object,
    check_string,
    json_object,
    list_of,
    loads,
    missing,
    tagged,
    wrong_type,
)
from minisgl.api.requests.json_schemas import portable
from minisgl.errors import InvalidParam, RequestError

MAX_OPTIONS = 4096


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar ("" for none), the name of the field that prescribes it, and the keywords of its schema that it relaxes."""

    grammar: str = ""
    field: str = ""
    relaxed: tuple[str, ...] = ()


Make = Callable[[str, Any], Constraint]  # (where a source stands, the source) -> what it prescribes


def constraint(values: Mapping[str, Any]) -> Constraint:
    """The constraint among the values of a body.  The grammar itself is tried out later, in the checker process.

    Raises InvalidParam naming the field.
    """
    found: list[Constraint] = [c for field in FIELDS for c in values.get(field.name, ())]
    if len(found) > 1:
        names = f"{found[0].field} and {found[1].field}"
        raise InvalidParam(found[1].field, f"{names} exclude each other: an answer can have one form.")
    return found[0] if found else Constraint()


# ---------------- checks: of a grammar's source, and of the fields that hold one or more
def _schema(at: str, value: Any, *, strict: bool = False, field: str = "") -> Constraint:
    """An object, or its JSON text.  `field`: the name of the field in which it stands, if that is another."""
    if isinstance(value, str):
        grammar.check_size(at, len(value))

        def broken(fault: str) -> RequestError:
            return InvalidParam(at, f"{at} must be a JSON schema: {fault}.")

        value = loads(value, broken)
    check_object(at, value)
    schema, relaxed = portable(value, field or at, strict=strict)
    return Constraint(grammar.json_schema(schema), field or at, relaxed)


def _text(make: Callable[[str], str]) -> Make:
    def check(at: str, value: Any) -> Constraint:
        check_string(at, value)
        grammar.check_size(at, len(value))
        try:
            return Constraint(make(value), at)
        except InvalidParam as e:
            raise InvalidParam(at, e.message) from e

    return check


def _choice(at: str, value: Any) -> Constraint:
    if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
        raise wrong_type(at, "an array of strings", value)
    if len(value) > MAX_OPTIONS:
        raise InvalidParam(at, f"{at} may hold at most {MAX_OPTIONS} strings.")
    grammar.check_size(at, sum(map(len, value)))
    return Constraint(grammar.choice(value), at)


def _any_object(at: str, value: Any) -> Constraint:
    if value is not True:
        raise wrong_type(at, "a boolean", value)
    return Constraint(grammar.json_object(), at)


def _response_format(at: str, value: dict[str, Any]) -> tuple[Constraint, ...]:
    kind = value.get("type")
    if not value or kind == "text":
        return ()
    if kind == "json_object":
        return (Constraint(grammar.json_object(), at),)
    if kind != "json_schema":
        raise InvalidParam(f"{at}.type", f"{at}.type must be text, json_object or json_schema.")
    inner: Any = value.get("json_schema")
    check_object(f"{at}.json_schema", inner)
    schema, strict = inner.get("schema"), inner.get("strict")
    if schema is None:
        raise missing(f"{at}.json_schema.schema")
    if not isinstance(strict, bool | None):
        raise wrong_type(f"{at}.json_schema.strict", "a boolean", strict)
    return (_schema(f"{at}.json_schema.schema", schema, strict=bool(strict), field=at),)


_NONE: Schema = {"type": "array", "maxItems": 0}


class _Source(NamedTuple):
    """A kind of grammar source."""

    doc: str
    schema: Schema
    make: Make

    def field(self, name: str) -> Field:
        """The declaration of a field with such a source; [] stands for none."""

        def check(at: str, value: Any) -> tuple[Constraint, ...]:
            return () if value == [] else (self.make(at, value),)

        return Field(name, self.doc, self.schema, check)


_JSON = _Source("A JSON schema that the answer follows.", {"oneOf": [JSON_SCHEMA, _NONE]}, _schema)
_REGEX = _Source("A regular expression that the whole answer matches.", STRING, _text(grammar.regex))
_CHOICE = _Source("Texts of which the answer is one.", list_of(STRING), _choice)
_GRAMMAR = _Source("A grammar (GBNF or Lark) that the answer follows.", STRING, _text(grammar.unread))
_OUTPUTS: Mapping[str, Make] = {
    "json": _JSON.make,
    "regex": _REGEX.make,
    "choice": _CHOICE.make,
    "grammar": _GRAMMAR.make,
    "json_object": _any_object,
}


def _structured_outputs(name: str, value: dict[str, Any]) -> tuple[Constraint, ...]:
    found = []
    for inner, source in value.items():
        if source is None or source is False or source == []:
            continue
        at = f"{name}.{inner}"
        if inner not in _OUTPUTS:
            raise InvalidParam(at, f"{at[:80]} is not supported; use one of {', '.join(_OUTPUTS)}.", "unsupported_parameter")
        found.append(_OUTPUTS[inner](at, source))
    return tuple(found)


# ---------------- declarations
_FORMAT = "The form of the answer: text, json_object, or json_schema with a schema."
_OUTPUT = "The form of the answer, as vLLM names it: json, regex, choice or grammar."
_NAMED_SCHEMA = an_object({"schema": JSON_SCHEMA}, name=LOOSE_STRING, strict=BOOLEAN)
FORMS: tuple[Schema, ...] = (an_object({}, type={"enum": ["text"]}), tagged("json_object"))  # without a schema; {} is text
RESPONSE_FORMAT: Schema = {"oneOf": [*FORMS, tagged("json_schema", {"json_schema": _NAMED_SCHEMA})]}
_SKIPPED = ({"enum": [None, False]}, _NONE)  # a source that is none
_OUTPUT_SCHEMA: Schema = {
    "properties": {
        "json": {"oneOf": [JSON_SCHEMA, *_SKIPPED]},
        "regex": {"oneOf": [STRING, *_SKIPPED]},
        "choice": {"oneOf": [list_of(STRING), *_SKIPPED[:1]]},
        "grammar": {"oneOf": [STRING, *_SKIPPED]},
        "json_object": {"oneOf": [BOOLEAN, {"type": "null"}, _NONE]},
    }
}
NATIVE = (_JSON.field("json_schema"), _REGEX.field("regex"), _GRAMMAR.field("ebnf"))
FIELDS = (
    json_object("response_format", _FORMAT, _response_format, RESPONSE_FORMAT),
    _JSON.field("guided_json"),
    _REGEX.field("guided_regex"),
    _CHOICE.field("guided_choice"),
    _GRAMMAR.field("guided_grammar"),
    *NATIVE,
    _CHOICE.field("choice"),
    json_object("structured_outputs", _OUTPUT, _structured_outputs, _OUTPUT_SCHEMA),
)
