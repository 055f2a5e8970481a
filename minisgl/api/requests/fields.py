"""Declares the fields of request bodies, and parses bodies by those declarations.

A `Field` is declared once, in one line, next to the code that uses it.  The declaration has the field's name, its description,
its JSON schema, its check and its support.  `Fields.read` checks a body by it, and openapi.py describes the endpoint from it.

`null` means the same as leaving a field out, everywhere.  A refusal is an InvalidParam that names the field; it never repeats
the value, which can be megabytes.  Pure functions; run in the api process.
"""

from __future__ import annotations

import enum
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import UnionType
from typing import Any, NoReturn

from minisgl.errors import InvalidParam, RequestError

INT32 = (1 << 31) - 1  # the largest integer of a step plan
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Schema = dict[str, Any]
Check = Callable[[str, Any], Any]  # (name, value other than None) -> the value to use; raises InvalidParam


# ---------------- declarations
class Support(enum.Enum):
    """How an endpoint treats a field.  Fields without a declaration are unknown (see unknown_fields.py)."""

    SUPPORTED = enum.auto()  # becomes part of the prompt or of the parameters
    HARMLESS = enum.auto()  # cannot change the answer (bookkeeping, cache hints): accepted, and reported as ignored
    REFUSED = enum.auto()  # would change the answer: only its neutral values are accepted


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a body.

    `doc`: what it does; for a refused field, the error message.  `schema`: JSON schema without the description.  `neutral`: the
    values of a refused field that ask for nothing.
    """

    name: str
    doc: str
    schema: Schema
    check: Check
    required: bool = False
    support: Support = Support.SUPPORTED
    neutral: tuple[Any, ...] = ()


class Fields:
    """The fields of one endpoint.  `either`: two fields; a body must have exactly one of them."""

    def __init__(self, *fields: Field, either: tuple[str, ...] = ()) -> None:
        self._fields = {field.name: field for field in fields}
        if len(self._fields) < len(fields):
            raise ValueError("a field is declared twice")
        self.required = tuple(field.name for field in fields if field.required)
        self.either = either

    def __iter__(self) -> Iterator[Field]:
        return iter(self._fields.values())

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def having(self, support: Support) -> tuple[Field, ...]:
        """The fields with that support, in the order of their declarations."""
        return tuple(field for field in self if field.support is support)

    def read(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """(the checked values of the fields that a body has, the names of those that are ignored: unknown, or harmless and
        not empty).  Raises InvalidParam."""
        for name in self.required:
            if body.get(name) is None:
                raise missing(name)
        if self.either and sum(body.get(name) is not None for name in self.either) != 1:
            raise InvalidParam(self.either[0], f"give either {' or '.join(self.either)}.", "missing_required_parameter")
        values: dict[str, Any] = {}
        unknown, harmless = [], []
        for name, value in body.items():
            field = self._fields.get(name)
            if field is None:
                unknown.append(name)
            elif value is not None:
                values[name] = field.check(name, value)
                if value and field.support is Support.HARMLESS:
                    harmless.append(name)
        return values, (*unknown, *harmless)


def without(fields: Iterable[Field], *names: str) -> tuple[Field, ...]:
    """The fields with other names."""
    return tuple(field for field in fields if field.name not in names)


# ---------------- checks
def _accept(_: str, value: Any) -> Any:
    return value


def of_type(kind: type | UnionType, expected: str, then: Check = _accept) -> Check:
    """The check of a value's type, and `then` another."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise wrong_type(name, expected, value)
        return then(name, value)

    return check


check_object = of_type(dict, "an object")
check_string = of_type(str, "a string")


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(name, "an integer", value)
    if not low <= value <= high:
        raise InvalidParam(name, f"{name} must be between {low} and {high}.")
    return value


def _check_number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_type(name, "a number", value)
    if not low <= value <= high:
        raise InvalidParam(name, f"{name} must be between {low:g} and {high:g}.")
    return float(value)


def _check_choice(name: str, value: Any, values: tuple[str, ...]) -> Any:
    check_string(name, value)
    if value not in values:
        raise InvalidParam(name, f"{name} must be {' or '.join(values) if len(values) < 3 else 'one of ' + ', '.join(values)}.")
    return value


def _check_neutral(name: str, value: Any, neutral: tuple[Any, ...], text: str) -> Any:
    """Python holds that 0 == False; a field with the neutral value false does not accept 0."""
    if not any(isinstance(value, bool) == isinstance(same, bool) and value == same for same in neutral):
        raise InvalidParam(name, text, "unsupported_parameter")
    return value


def missing(name: str) -> InvalidParam:
    return InvalidParam(name, f"{name} is required.", "missing_required_parameter")


def wrong_type(name: str, expected: str, value: object) -> InvalidParam:
    return InvalidParam(name, f"{name} must be {expected}, not {json_type(value)}.", "invalid_type")


def json_type(value: object) -> str:
    """The JSON type of a value, with its article."""
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value)) or ("null" if value is None else type(value).__name__)


# ---------------- kinds of fields
def required(field: Field) -> Field:
    return replace(field, required=True)


def integer(name: str, doc: str, low: int, high: int = INT32) -> Field:
    schema = {"type": "integer", "minimum": low} | ({} if high == INT32 else {"maximum": high})
    return Field(name, doc, schema, partial(check_integer, low=low, high=high))


def number(name: str, doc: str, low: float, high: float) -> Field:
    return Field(name, doc, {"type": "number", "minimum": low, "maximum": high}, partial(_check_number, low=low, high=high))


def boolean(name: str, doc: str) -> Field:
    return Field(name, doc, {"type": "boolean"}, of_type(bool, "a boolean"))


def string(name: str, doc: str, *values: str) -> Field:
    """`values`: the strings that are allowed, if not all are."""
    if not values:
        return Field(name, doc, {"type": "string"}, of_type(str, "a string"))
    return Field(name, doc, {"type": "string", "enum": list(values)}, partial(_check_choice, values=values))


def array(name: str, doc: str, items: Schema, expected: str = "an array of strings", then: Check = _accept) -> Field:
    return Field(name, doc, {"type": "array", "items": items}, of_type(list, expected, then))


def json_object(name: str, doc: str, then: Check = _accept, schema: Schema | None = None) -> Field:
    return Field(name, doc, {"type": "object", **(schema or {})}, of_type(dict, "an object", then))


def anything(name: str, doc: str, schema: Schema | None = None) -> Field:
    """The code that uses the value checks it."""
    return Field(name, doc, schema or {}, _accept)


def harmless(*names: str) -> tuple[Field, ...]:
    return tuple(Field(name, "", {}, _accept, support=Support.HARMLESS) for name in names)


def refused(name: str, *neutral: Any, sentence: str = "") -> Field:
    """`sentence`: the error message, if another than the usual one."""
    text = sentence or f"{name} is not supported by this server; leave it out."
    return Field(name, text, {}, partial(_check_neutral, neutral=neutral, text=text), support=Support.REFUSED, neutral=neutral)


# ---------------- schemas
STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
LOOSE_STRING: Schema = {"title": "string"}  # nobody looks at what it is
JSON_SCHEMA: Schema = {"type": ["object", "string"], "title": "JSON schema"}  # or its text


def nullable(schema: Schema) -> Schema:
    """The same, or null, which means the same as leaving the field out."""
    out = dict(schema)
    if "type" in out:
        out["type"] = [*(out["type"] if isinstance(out["type"], list) else [out["type"]]), "null"]
    if "enum" in out:
        out["enum"] = [*out["enum"], None]
    if "oneOf" in out:
        out["oneOf"] = [*out["oneOf"], {"type": "null"}]
    return out


def an_object(needed: Mapping[str, Schema], /, **more: Schema) -> Schema:
    """An object with these keys, and `more` that may be left out."""
    properties = {**needed, **{name: nullable(schema) for name, schema in more.items()}}
    return {"type": "object", **({"required": list(needed)} if needed else {}), "properties": properties}


def tagged(kind: str, needed: Mapping[str, Schema] | None = None, /, **more: Schema) -> Schema:
    """An object whose `type` is `kind`."""
    return an_object({"type": {"const": kind}, **(needed or {})}, **more)


def list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


# ---------------- parts of a value
def function_of(value: Any, at: str) -> dict[str, Any]:
    """The inner object of `{"type": "function", "function": {...}}`, a tool or a call.  Raises InvalidParam naming `at`."""
    check_object(at, value)
    if value.get("type", "function") != "function":
        raise InvalidParam(f"{at}.type", f'{at}.type must be "function".', "unsupported_value")
    function: dict[str, Any] = check_object(f"{at}.function", value.get("function"))
    return function


# ---------------- strict JSON
def parse_json(raw: bytes) -> dict[str, Any]:
    """A request body -> its JSON object.

    Stricter than `json.loads`: UTF-8 only, no NaN or infinite numbers, no lone surrogates, an object at the top.  Raises
    RequestError (400, `invalid_json`) whose text says where the fault is and never repeats the body.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise _bad_json(f"byte {e.start} is not UTF-8") from None
    body = loads(text, _bad_json)
    if not isinstance(body, dict):
        raise _bad_json(f"the top level must be an object, not {json_type(body)}")
    return body


def _bad_json(fault: str) -> RequestError:
    return RequestError(f"The request body could not be parsed as JSON: {fault}.", code="invalid_json")


def loads(text: str, error: Callable[[str], RequestError]) -> Any:
    """`json.loads` without its extensions to JSON.  Raises `error(fault)`."""

    def constant(name: str) -> NoReturn:
        raise error(f"{name} is not JSON")

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise error("a number is too large")
        return value

    try:
        value = json.loads(text, parse_constant=constant, parse_float=number)
        if _SURROGATE.search(text):  # usually a pair: an escaped emoji
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as e:
        raise error(f"{e.msg} (line {e.lineno}, column {e.colno})") from None
    except RecursionError:
        raise error("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise error("a string holds half of a surrogate pair") from None
    except ValueError:
        raise error("a number has too many digits") from None
