"""Reads tool calls out of the text of a model while it grows; call_formats.py tells how they are written.  Pure.

The reader advances one character at a time and never looks at where a piece of text ends.  So the pieces that it gives for
any split of a text join to what it gives for the undivided text: a stream cannot differ from an answer in one piece.  Text
that turns out not to be a call is passed on as text.  Slips of a model are forgiven where what it meant is plain: a bracket too
few or too many, a mark that closes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from minisgl.api.parsers.call_formats import FORMATS, SPACE, ToolFormat
from minisgl.api.parsers.json_scan import ObjectScan
from minisgl.api.parsers.python_scan import PythonScan
from minisgl.api.parsers.xml_scan import UNKNOWN, Parameters, XmlScan

__all__ = ["FORMATS", "Argued", "CallReader", "Called", "Piece", "Said"]

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
Scan = ObjectScan | XmlScan | PythonScan


class CallReader:
    """Reads one answer.  `names`: the tools of the request; `parameters`: what is known of theirs.

    `parallel=False` drops every call after the first.
    """

    def __init__(
        self,
        tool_format: ToolFormat,
        names: Collection[str] = (),
        parameters: Mapping[str, Parameters] | None = None,
        *,
        parallel: bool = True,
    ) -> None:
        self._format, self._names, self._parallel = tool_format, names, parallel
        self._parameters = parameters or {}
        self._opening, self._closing, self._bare = tool_format.opening, tool_format.closing, tool_format.bare
        self._marks = tuple(filter(None, (self._closing, self._opening)))
        self._openings = tuple(filter(None, (self._opening, tool_format.also)))
        self._calls = 0
        self._state: Callable[[str, list[Piece]], None] = self._text
        self._held = ""  # characters not yet known to be text: white space, the beginning of an opening, an unnamed call
        self._began = False  # there has been text or a call
        self._first = True  # there has been no call since the opening
        self._between = ""  # the text since the opening or the previous call
        self._closed = False  # a call has been closed just before
        self._unmarked = False  # the answer begins like a call, without an opening
        self._scan: Scan = ObjectScan()
        self._ahead = ""  # characters in the object, outside of strings, that may become a mark
        self._announced = False  # the current object has proved to be a call

    def feed(self, text: str) -> list[Piece]:
        """The pieces that more text completes."""
        out: list[Piece] = []
        for c in text:
            self._state(c, out)
        return self._select(out)

    def begin(self, name: str) -> list[Piece]:
        """A call of this function begins, by a mark that the reader need not find; its arguments are fed next, then `end`."""
        self._scan, self._announced, self._held, self._state = ObjectScan(name), True, "", self._object
        self._began = self._unmarked = True
        self._calls += 1
        return self._select([Called(self._calls - 1, name)])

    def end(self, *, complete: bool = False) -> list[Piece]:
        """The rest, when no more text comes.  `complete`: the model has ended its answer itself, so brackets can be closed."""
        out: list[Piece] = []
        if complete and self._state == self._object:
            self._ahead = "" if self._announced else self._ahead
            self._tell(self._scan.mend(), out)
        rest = "" if self._announced else self._held + self._ahead
        if self._state == self._gap and not self._first:  # separators, and perhaps marks, are held there
            rest = rest.lstrip(SPACE + ",;}]")
            rest = "" if any(m.startswith(rest) or rest.startswith(m) for m in self._format.marks if m) else rest
        elif self._calls and not rest.strip(SPACE):
            rest = ""
        self._held = self._ahead = ""
        if self._announced:
            self._between, self._first, self._announced, self._state = "", False, False, self._gap
        return self._select([*out, Said(rest)])

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
            also = core and core == self._format.also
            if also or (start and start == bare):
                begun = core if also else bare
                self._first, self._between, self._unmarked, self._state = True, begun[:-1], True, self._gap
                self._held = self._held[:-1]
                self._gap(c, out)
                return
            if core == opening:
                self._first, self._between, self._unmarked, self._state = True, "", False, self._gap
                return
            if self._calls and (core == self._closing or (self._closed and core in ("}", "]"))):  # it closes nothing
                self._held = ""
                return
            marks = (*self._openings, self._closing) if self._calls else self._openings
            if not core or any(mark.startswith(core) for mark in marks if mark) or (start and bare.startswith(start)):
                return
            n = len(self._held) - len(core) + 1  # its white space and one character are text
            out.append(Said(self._held[:n]))
            self._began, self._closed, self._held = True, False, self._held[n:]

    def _gap(self, c: str, out: list[Piece]) -> None:
        """Between an opening or a call and the next object."""
        match = self._match() if c == "{" or c in self._format.starts else None
        name = next(filter(None, match.groups()), "").removeprefix("functions.") if match else ""
        if match and (c == "{" or name):
            self._scan, self._state = self._scan_of(name, c), self._object
            self._object(c, out)
            return
        self._held += c
        self._between += c
        if self._closing and not self._first and self._between.endswith(self._closing) and self._match():
            self._held, self._closed, self._state = "", True, self._text
        elif len(self._between) > MAX_BETWEEN or not self._match():
            self._give_up(out)

    def _scan_of(self, name: str, c: str) -> Scan:
        """The scan of a call whose arguments, or whose object, begin with this character."""
        known = self._parameters.get(name, UNKNOWN)
        if c != "{" and self._format.tags:
            return XmlScan(name, self._format.tags, known)
        return ObjectScan(name) if c == "{" else PythonScan(name, tuple(known.declared))

    def _object(self, c: str, out: list[Piece]) -> None:
        """In the object of a call, which a mark ends even if brackets are open."""
        ahead = "" if self._scan.in_string else self._ahead + c
        if ahead in self._marks:
            self._ahead = ""
            self._tell(self._scan.mend(), out)
        elif ahead and any(mark.startswith(ahead) for mark in self._marks):
            self._ahead = ahead
            return
        elif len(ahead) > 1:  # only c can begin a mark now
            ahead, self._ahead = self._ahead, ""
            for early in ahead:
                (self._take if self._state == self._object else self._state)(early, out)
            ahead = c
        else:
            self._take(c, out)
            return
        for again in ahead:
            self._state(again, out)

    def _take(self, c: str, out: list[Piece]) -> None:
        self._held += c
        self._tell(self._scan.feed(c), out)

    def _tell(self, argued: str, out: list[Piece]) -> None:
        """Give what the scan has found out: the name, arguments, the end of the object."""
        scan = self._scan
        if scan.named and not self._announced:
            listed = self._format.python and not self._first and "]" not in self._between  # it follows one in the list
            if self._unmarked and scan.name not in self._names and not listed:  # JSON for the user, not a call
                scan.failed = True
            else:
                self._announced = self._began = True
                out.append(Called(self._calls, scan.name))
                self._calls += 1
        if argued and self._announced:
            out.append(Argued(self._calls - 1, argued))
        if not self._announced and (scan.done or scan.failed):
            self._give_up(out)
            return
        unread, scan.unread = scan.unread, ""
        if scan.done or scan.failed:  # pieces that went out cannot be taken back
            self._held, self._between, self._first, self._announced, self._state = "", "", False, False, self._gap
        for c in unread:
            self._state(c, out)

    def _give_up(self, out: list[Piece]) -> None:
        """Read the held characters again, as text: they may still open a call.  After an opening the first one is text."""
        text, self._held, self._state = self._held, "", self._text
        if self._first:
            n = len(text) - len(text.lstrip(SPACE)) + 1
            out.append(Said(text[:n]))
            self._began, text = True, text[n:]
        else:  # white space behind a call, and brackets that close nothing
            text = text.lstrip(SPACE + "}]")
        for c in text:
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
