"""Scans the JSON object of a tool call character by character and passes the arguments on while they grow.

Only the outermost object is parsed; the contents of its values are passed on unchanged, whether or not they are JSON.  Pure;
runs in the api process.
"""

from __future__ import annotations

import json

_SPACE = " \n\t\r"
_ARGUMENTS = ("arguments", "parameters")
_NEXT = {("object", "{"): "first", ("first", '"'): "key", ("next", '"'): "key", ("colon", ":"): "value", ("comma", ","): "next"}


class ObjectScan:
    """Scans {"name": ..., "arguments": {...}} or, if the `name` is known before, the arguments themselves.

    `named`: the object has proved to be a call of `name`.  `done`, `failed`: the object has ended, or is not a call.
    """

    def __init__(self, name: str = "") -> None:
        self.name, self.named = name, False
        self.done = self.failed = False
        self._bare = bool(name)  # the object is the arguments
        self._phase = "value" if name else "object"
        self._key = "arguments" if name else ""
        self._value: list[str] = []  # characters of the key or value that is being read
        self._depth = 0  # of open brackets in the value
        self._string = self._escaped = False  # inside a string
        self._kept = ""  # arguments that came before the name

    def feed(self, c: str) -> str:
        """Take the next character; returns the part of the arguments that may go out now."""
        if self._value:
            return self._inside(c)
        if c in _SPACE:
            return ""
        if c == "}" and self._phase in ("first", "comma"):
            return self._finish()
        if self._phase != "value":
            self._phase = _NEXT.get((self._phase, c), "")
            self.failed = self.failed or not self._phase
            if self._phase != "key":
                return ""
        self._value = [c]
        self._string, self._depth = c == '"', int(c in "{[")
        self.failed = self.failed or c in ",:}]"
        if self._phase == "value" and self._key in _ARGUMENTS and c == "{" and self.name:
            self.named = True
            return c
        return ""

    def _inside(self, c: str) -> str:
        """A character of a key or a value."""
        first = self._value[0]
        if first not in '"{[':
            if c in _SPACE or c in ",}]":  # the end of a number or literal
                return self._complete(False) + self.feed(c)
            self._value.append(c)
            return ""
        streamed = self._phase == "value" and self.named and self._key in _ARGUMENTS and first == "{"
        self._value.append(c)
        if self._escaped:
            self._escaped = False
        elif self._string:
            self._escaped, self._string = c == "\\", c != '"'
        else:
            self._string = c == '"'
            self._depth += (c in "{[") - (c in "}]")
        text = c if streamed else ""
        return text if self._string or self._depth else text + self._complete(streamed)

    def _complete(self, streamed: bool) -> str:
        """A key or value has ended.  `streamed`: its characters have already gone out."""
        text, self._value = "".join(self._value), []
        if self._phase == "key":
            self._phase, self._key = "colon", self._decode(text)
            return ""
        self._phase = "comma"
        self.done = self._bare
        if self._key == "name" and not self.name:
            self.name = self._decode(text)
            self.failed = not self.name
        elif self._key in _ARGUMENTS and not streamed and not self.named:
            if text[0] == '"':
                text = self._decode(text) or "{}"  # the arguments as JSON text in a string
            self._kept = "{}" if text == "null" else text
        else:
            return ""
        if not self.name or not self._kept:
            return ""
        self.named = True
        return self._kept

    def _finish(self) -> str:
        """The object has ended.  A call without arguments has empty ones."""
        self.done = True
        if self.name and not self.named:
            self.named = True
            return "{}"
        return ""

    def _decode(self, text: str) -> str:
        """The value of a JSON string; "", and the scan has failed, if it is not one."""
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        self.failed = self.failed or not isinstance(value, str)
        return value if isinstance(value, str) else ""
