"""Calls of tools in the text of a model, read as it grows.  Pure; runs in the api process.

Three ways of writing them, after the models that were taught them:

    hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, several one after the other     Hermes, Qwen2.5, Qwen3
    llama3   {"name": ..., "parameters": {...}} as the whole answer, several separated by ;            Llama 3.1 and later
    mistral  [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], or name[ARGS]{...} of newer ones   Mistral

A reader looks at one character after the other and never at where a piece of text ends, so the pieces that it gives for any
split of a text join to what it gives for the whole: a stream cannot differ from an answer in one piece.  What turns out not to
be a call is text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
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
    """Call number `index` begins: the tool's name."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Argued:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Piece = Said | Called | Argued


def joined(pieces: Iterable[Piece]) -> tuple[str, list[tuple[str, str]]]:
    """(text, [(name, arguments)]) of all pieces of an answer."""
    said: list[str] = []
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, Said):
            said.append(piece.text)
        elif isinstance(piece, Called):
            calls.append((piece.name, ""))
        else:
            name, text = calls[piece.index]
            calls[piece.index] = (name, text + piece.text)
    return "".join(said), calls


class CallReader:
    """Reads one answer.  `names`: the tools there are, `parallel`: whether more than the first call is wanted."""

    opening = ""
    bare = ""  # with this an answer may begin in place of the opening

    def __init__(self, names: Collection[str] = (), *, parallel: bool = True) -> None:
        self._names, self._parallel = names, parallel
        self._calls = 0
        self._state: Callable[[str, list[Piece]], None] = self._text
        self._held = ""  # what is not yet known to be text or not: white space, the beginning of an opening, a whole call
        self._began = False  # there has been text or a call
        self._first = True  # since the opening there has been no call
        self._between = ""  # what came since the opening or the call before
        self._scan = ObjectScan()
        self._told = False  # the object that is being read has proved to be a call

    def feed(self, text: str) -> list[Piece]:
        """The pieces that more text completes."""
        out: list[Piece] = []
        for c in text:
            self._state(c, out)
        return self._wanted(out)

    def end(self) -> list[Piece]:
        """The rest, when nothing more comes."""
        behind = self._state == self._gap and not self._first  # only separators can be held there
        blank = self._calls > 0 and not self._held.strip(SPACE)
        rest = "" if self._told or behind or blank else self._held
        self._held = ""
        return self._wanted([Said(rest)])

    def _wanted(self, pieces: list[Piece]) -> list[Piece]:
        return _merged([p for p in pieces if self._parallel or isinstance(p, Said) or p.index == 0])

    # ---------------- of each way of writing
    def _leads_on(self, between: str) -> bool:
        """Whether an object may still follow upon `between`, what stands behind the opening or (not `_first`) a call."""
        raise NotImplementedError

    def _closed(self, between: str) -> bool:
        """Whether `between`, behind a call, is all of the closing."""
        return False

    def _name(self, between: str) -> str:
        """The name of a call that has it before its object."""
        return ""

    # ---------------- states: one character each
    def _text(self, c: str, out: list[Piece]) -> None:
        self._held += c
        while self._held:
            core = self._held.lstrip(SPACE)
            bare = "" if self._began else "".join(core.split())
            if bare and bare == self.bare:
                self._first, self._between, self._state = True, bare[:-1], self._gap
                self._held = self._held[:-1]
                self._gap(c, out)
                return
            if core == self.opening:
                self._first, self._between, self._state = True, "", self._gap
                return
            if not core or self.opening.startswith(core) or (bare and self.bare.startswith(bare)):
                return
            n = len(self._held) - len(core) + 1  # its white space and one character are text
            out.append(Said(self._held[:n]))
            self._began, self._held = True, self._held[n:]

    def _gap(self, c: str, out: list[Piece]) -> None:
        """Behind an opening or a call."""
        if c == "{" and self._leads_on(self._between):
            self._scan, self._state = ObjectScan(self._name(self._between)), self._object
            self._object(c, out)
            return
        self._held += c
        self._between += c
        if not self._first and self._closed(self._between):
            self._held, self._state = "", self._text
        elif len(self._between) > MAX_BETWEEN or not self._leads_on(self._between):
            self._give_up(out)

    def _object(self, c: str, out: list[Piece]) -> None:
        scan = self._scan
        self._held += c
        argued = scan.feed(c)
        if scan.named and not self._told:
            if self.bare == "{" and scan.name not in self._names:  # JSON, but no call
                scan.failed = True
            else:
                self._told = self._began = True
                out.append(Called(self._calls, scan.name))
                self._calls += 1
        if argued and self._told:
            out.append(Argued(self._calls - 1, argued))
        if self._told and (scan.done or scan.failed):  # what has been told cannot be taken back
            self._held, self._between, self._first, self._told, self._state = "", "", False, False, self._gap
        elif scan.done or scan.failed:
            self._give_up(out)

    def _give_up(self, out: list[Piece]) -> None:
        """It is text after all, one character of it at least; what follows that may still open something."""
        text, self._held, self._state = self._held, "", self._text
        if not self._first:  # white space and separators behind a call
            text = text.lstrip(SPACE)
        out.append(Said(text[:1]))
        self._began = True
        for c in text[1:]:
            self._state(c, out)


class Hermes(CallReader):
    """See the module's table."""

    opening = "<tool_call>"
    closing = "</tool_call>"

    def _leads_on(self, between: str) -> bool:
        rest = between.lstrip(SPACE)
        return not rest or (not self._first and self.closing.startswith(rest))

    def _closed(self, between: str) -> bool:
        return between.lstrip(SPACE) == self.closing


class Llama3(CallReader):
    """See the module's table."""

    opening = "<|python_tag|>"
    bare = "{"

    def _leads_on(self, between: str) -> bool:
        rest = between.lstrip(SPACE + ";")
        return not rest or (not self._first and self.opening.startswith(rest)) or rest == self.opening


class Mistral(CallReader):
    """See the module's table."""

    opening = "[TOOL_CALLS]"
    bare = "[{"
    _FIRST = re.compile(r"\[?[ \n\t\r]*|[\w.-]+(\[(A(R(G(S(\])?)?)?)?)?)?")

    def _leads_on(self, between: str) -> bool:
        if not self._first:
            between = between.lstrip(SPACE + ",]")
            if not between or self.opening.startswith(between):
                return True
            if not between.startswith(self.opening):
                return False
            between = between.removeprefix(self.opening)
        return self._FIRST.fullmatch(between.lstrip(SPACE)) is not None

    def _name(self, between: str) -> str:
        head, args, _ = between.lstrip(SPACE + ",]").removeprefix(self.opening).partition("[ARGS]")
        return head.strip(SPACE) if args else ""


READERS: Mapping[str, type[CallReader]] = {"hermes": Hermes, "llama3": Llama3, "mistral": Mistral}


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of a kind in one piece."""
    out: list[Piece] = []
    for piece in pieces:
        last = out[-1] if out else None
        if isinstance(piece, Said) and isinstance(last, Said):
            out[-1] = Said(last.text + piece.text)
        elif isinstance(piece, Argued) and isinstance(last, Argued) and last.index == piece.index:
            out[-1] = Argued(last.index, last.text + piece.text)
        elif not isinstance(piece, Called) and not piece.text:
            continue
        else:
            out.append(piece)
    return out
