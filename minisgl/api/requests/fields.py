"""Strict JSON, and typed access to the fields of a request body.  Pure functions; run in the api process."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, NoReturn

from minisgl.errors import InvalidParam, RequestError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


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
    """`json.loads` without its extensions to JSON; raises `error(what is wrong)`."""

    def constant(name: str) -> NoReturn:
        raise error(f"{name} is not JSON")

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise error("a number is too large")
        return value

    try:
        value = json.loads(text, parse_constant=constant, parse_float=number)
        if _SURROGATE.search(text):  # paired, mostly: an escaped emoji
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


def json_type(value: object) -> str:
    """What JSON calls a value, with its article."""
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "null")


class Fields:
    """Typed access to a body.  Absent and null give the default; a wrong type or range raises InvalidParam.

    Refused values are not repeated in messages: they can be megabytes.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self._body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(name, "an integer", value)
        if not low <= value <= high:
            raise InvalidParam(name, f"{name} must be between {low} and {high}.")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self._body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong_type(name, "a number", value)
        if not low <= value <= high:
            raise InvalidParam(name, f"{name} must be between {low:g} and {high:g}.")
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self._body.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong_type(name, "a boolean", value)
        return value

    def get(self, name: str, kind: type | UnionType, expected: str) -> Any:
        value = self._body.get(name)
        if value is not None and not isinstance(value, kind):
            raise wrong_type(name, expected, value)
        return value


def wrong_type(name: str, expected: str, value: object) -> InvalidParam:
    return InvalidParam(name, f"{name} must be {expected}, not {json_type(value)}.", "invalid_type")


def function_of(value: Any, at: str) -> dict[str, Any]:
    """What `{"type": "function", "function": {...}}` holds: a tool, or a call of one.  Raises InvalidParam naming `at`."""
    if not isinstance(value, dict):
        raise wrong_type(at, "an object", value)
    if value.get("type", "function") != "function":
        raise InvalidParam(f"{at}.type", f'{at}.type must be "function".', "unsupported_value")
    function = value.get("function")
    if not isinstance(function, dict):
        raise wrong_type(f"{at}.function", "an object", function)
    return function
