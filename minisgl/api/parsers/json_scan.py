"""A JSON object that is read a character at a time: the call of a tool, whose arguments are told while they grow.

Only the outermost object is understood; what is inside a value is passed on as it is, whether or not it is JSON.  Pure; runs in
the api process.
"""

from __future__ import annotations

import json

_SPACE = " \n\t\r"
_ARGUMENTS = ("arguments", "parameters")


class ObjectScan:
    """Of {"name": ..., "arguments": {...}} or, where the `name` is known before, of the arguments themselves.

    `named`: that it is a call, and of what, can be told; `done`, `failed`: the object ended, or is none.
    """

    def __init__(self, name: str = "") -> None:
        self.name, self.named = name, False
        self.done = self.failed = False
        self._whole = bool(name)  # the object is the arguments
        self._phase = "value" if name else "object"
        self._key = "arguments" if name else ""
        self._value: list[str] = []
        self._depth = 0
        self._string = self._escaped = False  # inside a value
        self._kept = ""  # arguments that came before the name

    def feed(self, c: str) -> str:
        """Take the next character; returns what can be told of the arguments."""
        phase = self._phase
        if phase in ("key", "text", "container"):
            return self._inside(c)
        if phase == "scalar":
            return self._scalar(c)
        if c in _SPACE:
            return ""
        if phase == "value":
            return self._begin(c)
        if (phase, c) == ("object", "{"):
            self._phase = "first"
        elif phase in ("first", "next") and c == '"':
            self._phase, self._value = "key", [c]
        elif (phase, c) == ("colon", ":"):
            self._phase = "value"
        elif (phase, c) == ("comma", ","):
            self._phase = "next"
        elif phase in ("first", "comma") and c == "}":
            return self._finish()
        else:
            self.failed = True
        return ""

    def _begin(self, c: str) -> str:
        """The first character of a value."""
        self._value = [c]
        self._phase = "text" if c == '"' else "container" if c in "{[" else "scalar"
        if c in ",:}]":
            self.failed = True
        self._depth = int(self._phase == "container")
        self._string = self._escaped = False
        if self._key in _ARGUMENTS and c == "{" and self.name:
            self.named = True
            return c
        return ""

    @property
    def _telling(self) -> bool:
        """The value is that of the arguments, and goes out as it comes."""
        return self.named and self._key in _ARGUMENTS and self._value[0] == "{"

    def _inside(self, c: str) -> str:
        """A character of a key, of a string, of an object or array."""
        telling = self._phase == "container" and self._telling
        self._value.append(c)
        ends = False
        if self._phase != "container" or self._string:
            if self._escaped:
                self._escaped = False
            elif c == "\\":
                self._escaped = True
            elif c == '"':
                self._string, ends = False, self._phase != "container"
        elif c == '"':
            self._string = True
        elif c in "{[":
            self._depth += 1
        elif c in "}]":
            self._depth -= 1
            ends = self._depth == 0
        told = c if telling else ""
        if not ends:
            return told
        if self._phase == "key":
            self._key, self._phase = self._decoded() or "", "colon"
            return ""
        return told + self._complete(telling)

    def _scalar(self, c: str) -> str:
        if c not in _SPACE and c not in ",}]":
            self._value.append(c)
            return ""
        self._phase = "comma"
        return self._complete(False) + self.feed(c)

    def _complete(self, told: bool) -> str:
        """A value has ended; `told`: it has gone out already."""
        self._phase = "comma"
        if self._whole:
            self.done = True
        if self._key == "name" and not self.name:
            self.name = self._decoded() or ""
            self.failed = not self.name
            if self.name and self._kept:
                self.named = True
                return self._kept
        elif self._key in _ARGUMENTS and not told and not self.named:
            text = "".join(self._value)
            if text[0] == '"':
                text = self._decoded() or "{}"  # the arguments as JSON text in a string
            self._kept = "{}" if text == "null" else text
            if self.name:
                self.named = True
                return self._kept
        return ""

    def _finish(self) -> str:
        """The object has ended: a call with no arguments at all has empty ones."""
        self.done = True
        if self.name and not self.named:
            self.named = True
            return "{}"
        return ""

    def _decoded(self) -> str | None:
        """The string just read; None, and the scan has failed, if it is none."""
        try:
            text = json.loads("".join(self._value))
        except ValueError:
            text = None
        if not isinstance(text, str):
            self.failed = True
            return None
        return text
