"""Scans the JSON object of a tool call character by character and passes the arguments on while they grow.

Only the outermost object is parsed; the contents of its values are passed on unchanged, whether or not they are JSON, apart
from brackets that a model has forgotten to close.  Pure; runs in the api process.
"""

from __future__ import annotations

import json

_SPACE = " \n\t\r"
_NAMES, _ARGUMENTS = ("name", "tool_name"), ("arguments", "parameters")
_CLOSERS = {"{": "}", "[": "]"}
_NEXT = {
    ("object", "{"): "first",
    ("first", "{"): "first",  # a brace too many
    ("first", '"'): "key",
    ("next", '"'): "key",
    ("colon", ":"): "value",
    ("comma", ","): "next",
}


class ObjectScan:
    """Scans {"name": ..., "arguments": {...}} or, if the `name` is known before, the arguments themselves.

    `named`: the object has proved to be a call of `name`.  `done`, `failed`: the object has ended, or is not a call; the last
    character, if it is `unread`, does not belong to it.
    """

    def __init__(self, name: str = "") -> None:
        self.name, self.named = name, False
        self.done = self.failed = False
        self.unread = ""
        self._bare = bool(name)  # the object is the arguments
        self._phase = "value" if name else "object"
        self._key = "arguments" if name else ""
        self._value: list[str] = []  # characters of the key or value that is being read
        self._open: list[str] = []  # the brackets that close those open in the value
        self.in_string = self._escaped = False
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
            if not self._phase:
                self._fail(c)
            if self._phase != "key":
                return ""
        if c in ",:}]":
            self._fail(c)
            return ""
        self._value = [c]
        self.in_string, self._open = c == '"', [_CLOSERS[c]] if c in _CLOSERS else []
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
        if c in "}]" and not self.in_string:
            return self._close(c)
        self._value.append(c)
        if self._escaped:
            self._escaped = False
        elif self.in_string:
            self._escaped, self.in_string = c == "\\", c != '"'
        else:
            self.in_string = c == '"'
            self._open += _CLOSERS.get(c, "")
        text = c if self._streamed else ""
        return text if self.in_string or self._open else text + self._complete(self._streamed)

    def _close(self, c: str) -> str:
        """A closing bracket in a value: brackets that are open inside of it are closed before it, all if it is none of them."""
        mine, closed = c in self._open, ""
        while self._open and self._open[-1] != c:
            closed += self._open.pop()
        closed += self._open.pop() if mine else ""
        self._value.append(closed)
        streamed = self._streamed
        text = closed if streamed else ""
        if self._open:
            return text
        text += self._complete(streamed)
        if not mine and self.done:
            self.unread = c
        return text if mine or self.done else text + self.feed(c)

    def mend(self) -> str:
        """End the object here: close the brackets that are open; returns the rest of the arguments.  Not inside a string."""
        text = ""
        if self._value and not self.in_string:
            closed, streamed = "".join(reversed(self._open)), self._streamed
            self._open = []
            self._value.append(closed)
            text = (closed if streamed else "") + self._complete(streamed)
        return text if self.in_string or self.done else text + self._finish()

    @property
    def _streamed(self) -> bool:
        """Whether the characters of the value go out as they come."""
        return self._phase == "value" and self.named and self._key in _ARGUMENTS and self._value[0] == "{"

    def _fail(self, c: str) -> None:
        self.failed, self.unread = True, c

    def _complete(self, streamed: bool) -> str:
        """A key or value has ended.  `streamed`: its characters have already gone out."""
        text, self._value = "".join(self._value), []
        if self._phase == "key":
            self._phase, self._key = "colon", self._decode(text)
            return ""
        self._phase = "comma"
        self.done = self._bare
        if self._key in _NAMES and not self.name:
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
