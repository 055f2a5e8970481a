"""Reads tool calls out of the text of a model while it grows.  Pure; runs in the api process.

Each way of writing calls is a row of FORMATS:

    hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, several in sequence             Hermes, Qwen2.5, Qwen3
    llama3   {"name": ..., "parameters": {...}} as the complete answer, several separated by ;         Llama 3.1 and later
    mistral  [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], or name[ARGS]{...} in newer models Mistral

The reader advances one character at a time and never looks at where a piece of text ends.  So the pieces that it gives for
any split of a text join to what it gives for the undivided text: a stream cannot differ from an answer in one piece.  Text
that turns out not to be a call is passed on as text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from minisgl.api.parsers.json_scan import ObjectScan

SPACE = " \n\t\r"
MAX_BETWEEN = 256  # characters between an opening and its object


@dataclass(frozen=True, slots=True)
class Said:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """The beginning of call number `index`: the tool's name."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Argued:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Piece = Said | Called | Argued


def _begins(text: str) -> str:
    """A regular expression for every beginning of `text`, the empty and the complete one included."""
    return "".join(f"(?:{re.escape(c)}" for c in text) + ")?" * len(text)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way of writing calls.

    `opening` comes before the first call; an answer may begin with `bare` instead.  `before` matches the text between an
    opening and the object of the call, `between` the text between one call and the next object; both also match every
    beginning of such a text, and their group `name` is the name of a call that has it before its object.  `closing` ends a
    call.  `arguments`: the key of the arguments, as templates teach it.  A list of calls stands in `brackets`, its calls
    are separated by `separator`.  `special`: further marks that may be special tokens.  `id_length`: hexadecimal digits in the
    id of a call, which has the prefix `id_prefix`.
    """

    opening: str
    before: re.Pattern[str]
    between: re.Pattern[str]
    closing: str = ""
    bare: str = ""
    arguments: str = "arguments"
    separator: str = "\n"
    brackets: tuple[str, str] = ("", "")
    special: tuple[str, ...] = ()
    id_prefix: str = "call_"
    id_length: int = 24

    @property
    def marks(self) -> tuple[str, ...]:
        """What may be a special token."""
        return (self.opening, self.closing, *self.special)


_SPACES = f"[{SPACE}]*"
_MISTRAL = rf"{_SPACES}(?:\[?{_SPACES}|(?P<name>[\w.-]+)\[ARGS\]|[\w.-]+{_begins('[ARGS]')})"
FORMATS: Mapping[str, ToolFormat] = {
    "hermes": ToolFormat(
        opening="<tool_call>",
        before=re.compile(_SPACES),
        between=re.compile(_SPACES + _begins("</tool_call>")),
        closing="</tool_call>",
    ),
    "llama3": ToolFormat(
        opening="<|python_tag|>",
        before=re.compile(f"[{SPACE};]*"),
        between=re.compile(f"[{SPACE};]*" + _begins("<|python_tag|>")),
        bare="{",
        arguments="parameters",
        separator="; ",
    ),
    "mistral": ToolFormat(
        opening="[TOOL_CALLS]",
        before=re.compile(_MISTRAL),
        between=re.compile(rf"[{SPACE},\]]*(?:{_begins('[TOOL_CALLS]')}|\[TOOL_CALLS\]{_MISTRAL})"),
        bare="[{",
        separator=", ",
        brackets=("[", "]"),
        special=("[ARGS]", "[CALL_ID]"),
        id_prefix="",
        id_length=9,  # as its templates demand
    ),
}


class CallReader:
    """Reads one answer.  `names`: the tools of the request.  `parallel=False` drops every call after the first."""

    def __init__(self, tool_format: ToolFormat, names: Collection[str] = (), *, parallel: bool = True) -> None:
        self._format, self._names, self._parallel = tool_format, names, parallel
        self._opening, self._bare = tool_format.opening, tool_format.bare
        self._calls = 0
        self._state: Callable[[str, list[Piece]], None] = self._text
        self._held = ""  # characters not yet known to be text: white space, the beginning of an opening, an unnamed call
        self._began = False  # there has been text or a call
        self._first = True  # there has been no call since the opening
        self._between = ""  # the text since the opening or the previous call
        self._scan = ObjectScan()
        self._announced = False  # the current object has proved to be a call

    def feed(self, text: str) -> list[Piece]:
        """The pieces that more text completes."""
        out: list[Piece] = []
        for c in text:
            self._state(c, out)
        return self._select(out)

    def end(self) -> list[Piece]:
        """The rest, when no more text comes."""
        behind = self._state == self._gap and not self._first  # only separators can be held there
        blank = self._calls > 0 and not self._held.strip(SPACE)
        rest = "" if self._announced or behind or blank else self._held
        self._held = ""
        return self._select([Said(rest)])

    def _select(self, pieces: list[Piece]) -> list[Piece]:
        return _merged([p for p in pieces if self._parallel or isinstance(p, Said) or p.index == 0])

    def _match(self) -> re.Match[str] | None:
        """The match of the text since the opening or the previous call, None if no object can follow it."""
        pattern = self._format.before if self._first else self._format.between
        return pattern.fullmatch(self._between)

    # ---------------- states: each takes one character
    def _text(self, c: str, out: list[Piece]) -> None:
        opening, bare = self._opening, self._bare
        self._held += c
        while self._held:
            core = self._held.lstrip(SPACE)
            start = "" if self._began else "".join(core.split())
            if start and start == bare:
                self._first, self._between, self._state = True, bare[:-1], self._gap
                self._held = self._held[:-1]
                self._gap(c, out)
                return
            if core == opening:
                self._first, self._between, self._state = True, "", self._gap
                return
            if not core or opening.startswith(core) or (start and bare.startswith(start)):
                return
            n = len(self._held) - len(core) + 1  # its white space and one character are text
            out.append(Said(self._held[:n]))
            self._began, self._held = True, self._held[n:]

    def _gap(self, c: str, out: list[Piece]) -> None:
        """Between an opening or a call and the next object."""
        if c == "{" and (match := self._match()):
            self._scan, self._state = ObjectScan(match.groupdict().get("name") or ""), self._object
            self._object(c, out)
            return
        self._held += c
        self._between += c
        closing = self._format.closing
        if closing and not self._first and self._between.lstrip(SPACE) == closing:
            self._held, self._state = "", self._text
        elif len(self._between) > MAX_BETWEEN or not self._match():
            self._give_up(out)

    def _object(self, c: str, out: list[Piece]) -> None:
        scan = self._scan
        self._held += c
        argued = scan.feed(c)
        if scan.named and not self._announced:
            if self._bare == "{" and scan.name not in self._names:  # JSON for the user, not a call
                scan.failed = True
            else:
                self._announced = self._began = True
                out.append(Called(self._calls, scan.name))
                self._calls += 1
        if argued and self._announced:
            out.append(Argued(self._calls - 1, argued))
        if self._announced and (scan.done or scan.failed):  # pieces that went out cannot be taken back
            self._held, self._between, self._first, self._announced, self._state = "", "", False, False, self._gap
        elif scan.done or scan.failed:
            self._give_up(out)

    def _give_up(self, out: list[Piece]) -> None:
        """Pass the first held character on as text and read the others again: they may still open a call."""
        text, self._held, self._state = self._held, "", self._text
        if not self._first:  # white space and separators behind a call
            text = text.lstrip(SPACE)
        out.append(Said(text[:1]))
        self._began = True
        for c in text[1:]:
            self._state(c, out)


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Join neighbours of the same kind."""
    out: list[Piece] = []
    for piece in pieces:
        last = out[-1] if out else None
        if isinstance(piece, Said) and isinstance(last, Said):
            out[-1] = Said(last.text + piece.text)
        elif isinstance(piece, Argued) and isinstance(last, Argued):
            out[-1] = Argued(piece.index, last.text + piece.text)
        elif isinstance(piece, Called) or piece.text:
            out.append(piece)
    return out
