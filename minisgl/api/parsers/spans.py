"""Declares the spans into which the lexers of answers (thoughts.py, harmony.py) cut a text.  Pure."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

Kind = Literal["mark", "thought", "text", "call"]


class Span(NamedTuple):
    """A piece of an answer, all of one kind: the spans of an answer join to it.

    A mark is for nobody's eyes; with a `name` it begins a call of that function, whose arguments are spans of kind "call".
    """

    kind: Kind
    text: str
    name: str = ""


class Lexer(Protocol):
    """Cuts one answer into spans while it grows.  `held`: text that may be a mark, or become one."""

    held: str

    @property
    def done(self) -> bool:
        """Whether no thought follows."""

    @property
    def thinking(self) -> bool:
        """Whether text that is no mark would be a thought's."""

    def feed(self, text: str) -> list[Span]:
        """The spans that more text completes."""

    def rest(self) -> list[Span]:
        """The spans in the held text, when nothing more comes."""


def overlap(text: str, tag: str) -> int:
    """The number of characters at the end of a text that may be the beginning of a tag."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
