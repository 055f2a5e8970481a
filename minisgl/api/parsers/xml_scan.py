"""Scans a call whose arguments stand as text between tags, character by character, and gives them as JSON.

A text becomes the JSON of the type that the tool's schema gives the parameter, as in the parsers of vLLM and SGLang.  Strings
go out as they come, other values when they are complete.  A closing tag counts only where a call can go on behind it: a value
may hold one.  Pure; runs in the api process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from minisgl.api.parsers.python_scan import literal

_SPACE = " \n\t\r"
_MOST = 256  # characters of a key, or held at the end of a value
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
Kinds = Sequence[str]  # the JSON types that a value may have; none: any


@dataclass(frozen=True, slots=True)
class Parameters:
    """The types of a tool's parameters by name, in the order of its schema; `others`: of those that it does not declare."""

    declared: Mapping[str, Kinds]
    others: Kinds | None = None


UNKNOWN = Parameters({})


@dataclass(frozen=True)
class Tags:
    """What stands around the parts of a call: `head` around the name, `key` around a parameter's name, `value` around its
    value, and `tail` behind the last.  `outer`: the closing mark of the call.

    `breaks`: one line break behind the opening tag of a value and one before the closing one belong to the tags.  `others`: the
    types of parameters that no schema declares.
    """

    head: tuple[str, str]
    key: tuple[str, str]
    value: tuple[str, str]
    tail: str
    outer: str
    breaks: bool = True
    others: Kinds = ("string",)

    @cached_property
    def end(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """(the end of a value with the beginning of what follows, every beginning of such a text)."""
        space, gap = "\n" if self.breaks else "", "[ \n\t\r]*"
        follow = [mark for mark in (self.key[0], self.tail, self.outer) if mark]
        ways = [(space, self.value[1], gap, mark) for mark in follow]
        if self.tail:  # the tag is forgotten
            ways.append((space, self.tail, gap, self.outer))
        whole = [f"(?:{re.escape(a)})?{re.escape(b)}{gap}{re.escape(d)}" for a, b, _, d in ways]
        begun = [f"(?:{re.escape(a)})?{_begun(b, gap + _begun(d))}" for a, b, _, d in ways]
        return re.compile("|".join(whole)), re.compile("|".join(begun))


def _begun(text: str, rest: str = "") -> str:
    """A regular expression for every beginning of a text, and for all of it with the rest."""
    return "".join(f"(?:{re.escape(c)}" for c in text) + rest + ")?" * len(text)


class XmlScan:
    """Scans the arguments of a call of `name`, from the last character of the tag with the name on.

    `named`, `done`, `failed`, `unread`, `in_string`: as in ObjectScan; text in `unread` is to be fed again.
    """

    def __init__(self, name: str, tags: Tags, parameters: Parameters) -> None:
        self.name, self.named = name, True
        self.done = self.failed = False
        self.unread = ""
        self._tags, self._parameters = tags, parameters
        self._phase = "head" if tags.head[1] else "between"  # head | between arguments | key | open, before a value | value
        self._held = ""  # what may become a tag
        self._count = 0  # arguments so far
        self._kinds: Kinds = ()  # of the value
        self._value: list[str] = []  # characters of one that is no string
        self._begun = False  # the value has begun behind its line break

    @property
    def in_string(self) -> bool:
        return self._phase in ("key", "value")

    def feed(self, c: str) -> str:
        """Take the next character; returns the part of the arguments that may go out now."""
        if self._phase == "value":
            return self._in_value(c)
        if self._phase == "key":
            self._held += c
            if self._held.endswith(self._tags.key[1]):
                return self._end_key(self._held[: -len(self._tags.key[1])].strip())
            return self._fail(self._held) if len(self._held) > _MOST else ""
        if self._phase == "head":
            self._phase = "between"
            return ""
        if c in _SPACE and not self._held:
            return ""
        self._held += c
        expected = (self._tags.value[0],) if self._phase == "open" else (self._tags.key[0], self._tags.tail)
        if self._held not in expected:
            return "" if any(mark.startswith(self._held) for mark in expected) else self._fail(self._held)
        mark, self._held = self._held, ""
        if self._phase == "open":
            self._phase = "value"
        elif mark == self._tags.key[0]:
            self._phase = "key"
        else:
            return self._finish()
        return ""

    def mend(self) -> str:
        """End the call here; returns the rest of the arguments."""
        out = ""
        if self._phase == "value":
            held = self._held.removeprefix("\n" if self._tags.breaks else "")
            out = self._end_value("" if held.startswith(self._tags.value[1]) or not held else self._held)
        elif self._phase == "open":
            out = '"' if self._streamed else "null"
        return out + self._finish()

    def _fail(self, text: str) -> str:
        """What does not belong to a call ends it."""
        self.failed, self._held = True, ""
        out = self.mend()
        self.unread = text
        return out

    def _finish(self) -> str:
        self.done = True
        return "}" if self._count else "{}"

    def _end_key(self, key: str) -> str:
        kinds = self._parameters.declared.get(key, self._parameters.others)
        self._kinds = self._tags.others if kinds is None else kinds
        self._held, self._value, self._begun = "", [], not self._tags.breaks
        self._phase = "open" if self._tags.value[0] else "value"
        self._count += 1
        head = "{" if self._count == 1 else ", "
        return head + json.dumps(key, ensure_ascii=False) + (': "' if self._streamed else ": ")

    @property
    def _streamed(self) -> bool:
        return tuple(self._kinds) == ("string",)

    # ---------------- values
    def _in_value(self, c: str) -> str:
        if not self._begun:
            self._begun = True
            if c == "\n":
                return ""
        if not self._held and c not in "\n<":
            return self._take(c)
        self._held += c
        whole, begun = self._tags.end
        if whole.fullmatch(self._held):
            rest = self._held.removeprefix("\n" if self._tags.breaks else "").removeprefix(self._tags.value[1])
            out = self._end_value("")
            self.unread = rest
            return out
        out = ""
        while self._held and (len(self._held) > _MOST or not begun.fullmatch(self._held)):
            out += self._take(self._held[0])
            self._held = self._held[1:]
        return out

    def _take(self, text: str) -> str:
        if self._streamed:
            return json.dumps(text, ensure_ascii=False)[1:-1]
        self._value.append(text)
        return ""

    def _end_value(self, rest: str) -> str:
        out = self._take(rest)
        self._held, self._phase = "", "between"
        return out + '"' if self._streamed else as_json("".join(self._value), self._kinds)


# ---------------- values of a type
def as_json(text: str, kinds: Kinds) -> str:
    """The JSON text of a value that is written as a text.  What fits none of its types becomes a string."""
    rendered = text.strip()
    if tuple(kinds) != ("string",):
        if fitting := _fits(rendered, kinds):
            return fitting
        if "string" not in kinds:
            for other in _spelled(rendered, kinds):
                if fitting := _fits(other, kinds):
                    return fitting
    return json.dumps(text, ensure_ascii=False)


def _fits(text: str, kinds: Kinds) -> str:
    """The text, if it is the JSON of a value of one of the types; "" if not."""
    try:
        kind = _KINDS[type(json.loads(text, parse_int=_Integer, parse_float=float, parse_constant=_refuse))]
    except (ValueError, RecursionError):
        return ""
    return text if not kinds or kind in kinds or (kind == "integer" and "number" in kinds) else ""


def _spelled(text: str, kinds: Kinds) -> list[str]:
    """Other spellings of a value: Python's, and numbers as people write them."""
    out = []
    if text.lower() in ("true", "false", "null", "none"):
        out.append(text.lower().replace("none", "null"))
    if kinds and _NUMBER.fullmatch(text) and len(text) < 100:
        number = float(text)
        out += [str(int(text))] if text.lstrip("+-").isdigit() else []
        out += [str(int(number))] if number.is_integer() and "integer" in kinds else []
        out.append(repr(number))
    if text[:1] in ("[", "{", "("):
        with suppress(RecursionError):
            out.append(literal(text) or "")
    return out


class _Integer(int):
    """Stands for an integer of any size, whose digits are not read."""

    def __new__(cls, _: str) -> _Integer:
        return super().__new__(cls, 0)


def _refuse(name: str) -> None:
    raise ValueError(name)  # NaN and infinities are no JSON


_KINDS: Mapping[type, str] = {
    **{str: "string", _Integer: "integer", float: "number", bool: "boolean"},
    **{type(None): "null", list: "array", dict: "object"},
}
