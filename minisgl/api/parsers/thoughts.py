"""Tells the thoughts of a model from its answer while the text grows.  Pure.

A lexer cuts the text into spans.  The api process makes items of them (`ThoughtReader`); the detokenizer process counts tokens
with them and looks for stop strings in some of them (outline.py).  So both always mean the same thought.
"""

from __future__ import annotations

from minisgl.api.parsers.harmony import Harmony
from minisgl.api.parsers.spans import Kind, Lexer, Span, overlap
from minisgl.reasoning import HARMONY, STYLES


class Tagged:
    """The lexer of an answer that may begin with one thought between tags.  `inside`: the prompt has opened it."""

    def __init__(self, style: str, inside: bool) -> None:
        self._open, self._close, self._inside = STYLES[style].open, STYLES[style].close, inside
        self._stage = "before"  # of the text that comes next: "before" a thought | "inside" | "after" it, or there is none
        self.held = ""  # text that may be a tag, or become one

    @property
    def done(self) -> bool:
        """Whether the thought is closed, or there is none."""
        return self._stage == "after"

    @property
    def thinking(self) -> bool:
        """Whether text that is no tag would be the thought's."""
        return self._stage == "inside" or (self._stage == "before" and self._inside)

    def feed(self, text: str) -> list[Span]:
        """The spans that more text completes."""
        self.held += text
        out: list[Span] = []
        if self._stage == "before":
            self._look_for_thought(out)
        if self._stage == "inside":
            self._read_thought(out)
        if self._stage == "after":
            self._take("text", len(self.held), out)
        return out

    def rest(self) -> list[Span]:
        """The spans in the held text, when nothing more comes."""
        out: list[Span] = []
        self._take("thought" if self.thinking else "text", len(self.held), out)
        return out

    def _look_for_thought(self, out: list[Span]) -> None:
        core = self.held.lstrip()
        lead = len(self.held) - len(core)
        if core.startswith(self._open):
            self._take("mark", lead + len(self._open), out)
            self._stage = "inside"
        elif core.startswith(self._close) and not self._inside:  # what the prompt has closed is closed again
            self._take("mark", lead + len(self._close), out)
            self._stage = "after"
        elif not self._open.startswith(core) and (self._inside or not self._close.startswith(core)):
            self._stage = "inside" if self._inside else "after"

    def _read_thought(self, out: list[Span]) -> None:
        n = self.held.find(self._close)
        if n < 0:
            self._take("thought", len(self.held) - overlap(self.held, self._close), out)
            return
        self._take("thought", n, out)
        self._take("mark", len(self._close), out)
        self._stage = "after"

    def _take(self, kind: Kind, n: int, out: list[Span]) -> None:
        if n:
            out.append(Span(kind, self.held[:n]))
            self.held = self.held[n:]


def lexer(style: str, inside: bool) -> Lexer:
    """The lexer for a style of thoughts."""
    return Harmony(inside) if style == HARMONY else Tagged(style, inside)


class ThoughtReader:
    """Splits one answer into thoughts, text and calls; gives neither empty spans nor marks, but for those that begin a call.

    The line breaks around a thought belong to neither side; a further message of one kind begins on a new line.
    `inside`: whether the prompt ends inside a thought; None: as the style assumes.
    """

    def __init__(self, style: str, inside: bool | None = None) -> None:
        self._lexer = lexer(style, STYLES[style].assumed if inside is None else inside)
        self._marked = self._lexer.thinking  # there is or was a thought, or another message
        self._breaks = ""  # line breaks at the end of the thought so far
        self._begun = False  # the present thought or text
        self._told: set[Kind] = set()  # kinds of which there has been something

    def feed(self, text: str) -> list[Span]:
        """The spans that more text completes."""
        return self._trimmed(self._lexer.feed(text))

    def end(self) -> list[Span]:
        """The rest, when nothing more comes."""
        return self._trimmed(self._lexer.rest())

    def _trimmed(self, spans: list[Span]) -> list[Span]:
        out = []
        for span in spans:
            if span.kind == "mark":
                self._marked, self._begun, self._breaks = True, False, ""
            if span.kind == "call" or span.name:
                out.append(span)
            elif span.kind != "mark" and (text := self._trim(span.kind, span.text)):
                out.append(Span(span.kind, text))
        return out

    def _trim(self, kind: Kind, text: str) -> str:
        if not self._begun:
            text = text.lstrip() if kind == "thought" else text.lstrip("\n") if self._marked else text
            self._begun = bool(text)
            text = "\n" + text if text and kind in self._told else text
            self._told |= {kind} if text else set()
        if kind == "thought":
            text = self._breaks + text
            self._breaks = text[len(text.rstrip("\n")) :] if self._begun else ""
            text = text[: len(text) - len(self._breaks)]
        return text
