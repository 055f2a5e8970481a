"""Follows one answer a token at a time: counts the tokens of its thoughts, and sees where stop strings count.  Pure.

Runs in the detokenizer process, beside the readers of the api process (reply.py), and means the same thoughts and calls.
"""

from __future__ import annotations

import re
from collections import deque

from minisgl.api.parsers.call_formats import FORMATS, ToolFormat
from minisgl.api.parsers.spans import Lexer, Span, overlap
from minisgl.api.parsers.thoughts import lexer
from minisgl.reasoning import STYLES

_MOST = 256  # characters of a name
Part = tuple[bool, str]  # whether stop strings count in it, the text


def marks(reasoning: str, tools: str) -> tuple[str, ...]:
    """The marks that readers look for: tokens with these names have a text, even if the tokenizer calls them special."""
    return tuple(filter(None, (STYLES[reasoning].marks if reasoning else ()) + (FORMATS[tools].marks if tools else ())))


class Outline:
    """The outline of one answer: parts that join to its text.

    Stop strings count in what the user is told: neither in thoughts nor in tool calls, of which half would be worth nothing.

    A token is the thought's if its text begins in the thought: the tags are not counted, line breaks next to them are, and a
    thought that is never closed reaches to the end.  vLLM's reasoning parsers count the same tokens (`count_reasoning_tokens`)
    by the ids of the tags; here a tag may have several tokens.
    """

    def __init__(self, reasoning: str = "", thinking: bool = False, tools: str = "") -> None:
        """`reasoning`, `tools`: how thoughts and calls are written, "" for none.  `thinking`: it begins inside a thought."""
        self.thought_tokens = 0
        self._lexer: Lexer | None = lexer(reasoning, thinking) if reasoning else None
        self._calls = _Calls(FORMATS[tools]) if tools else None
        self._at = self._size = 0  # characters that are in spans; characters in all
        self._starts: deque[int] = deque()  # where tokens begin that are in no span so far

    @property
    def over(self) -> bool:
        """Whether stop strings count in everything that follows, and no thought comes."""
        return self._calls is None and self.thought_over

    @property
    def thought_over(self) -> bool:
        """Whether `thought_tokens` is final, although the answer goes on."""
        return self._lexer is None or self._lexer.done

    def feed(self, text: str) -> list[Part]:
        """One more token, by the text that it completes (perhaps none) -> the parts that are known."""
        if self._lexer is None:
            return self._parts([Span("text", text)])
        if not self._lexer.done:
            self._starts.append(self._size)
        self._size += len(text)
        return self._parts(self._count(self._lexer.feed(text)))

    def end(self, text: str) -> list[Part]:
        """The last parts, when nothing more comes than a `text` of no token."""
        spans = [Span("text", text)]
        if self._lexer is not None:
            spans = self._count(self._lexer.feed(text) + self._lexer.rest())
            self.thought_tokens += len(self._starts) if self._lexer.thinking else 0  # tokens without a text
            self._starts.clear()
        return self._parts(spans) + (self._calls.rest() if self._calls is not None else [])

    def _count(self, spans: list[Span]) -> list[Span]:
        for span in spans:
            self._at += len(span.text)
            while self._starts and self._starts[0] < self._at:
                self._starts.popleft()
                self.thought_tokens += span.kind == "thought"
        return spans

    def _parts(self, spans: list[Span]) -> list[Part]:
        out: list[Part] = []
        for kind, text, _ in spans:
            if kind != "text" or self._calls is None:
                out.append((kind == "text", text))
            else:
                out += self._calls.feed(text)
        return out


_LISTED = re.compile(r"\[([\w.-]+(\()?)?")  # the beginning of a list of calls in Python's syntax


class _Calls:
    """Finds tool calls in the text behind the thought by their marks alone: from an opening to its closing, or to the end."""

    def __init__(self, tool_format: ToolFormat) -> None:
        self._bare, self._python = tool_format.bare, tool_format.python
        openings = (tool_format.opening, "" if self._python else tool_format.also)
        self._marks = [[mark for mark in marks if mark] for marks in (openings, (tool_format.closing,))]  # outside, inside
        self._held = ""
        self._inside = False
        self._began = False  # there has been text or a call

    def feed(self, text: str) -> list[Part]:
        self._held += text
        out: list[Part] = []
        if not self._began:
            start = "".join(self._held.split())
            listed = _LISTED.match(start) if self._python else None
            if (self._bare.startswith(start) and start != self._bare) or (self._python and not start):
                return out
            if listed and not listed[2] and listed.end() == len(start) < _MOST:
                return out
            self._began = True
            self._inside = bool(self._bare and start.startswith(self._bare)) or bool(listed and listed[2])
        while marks := self._marks[self._inside]:
            found = [(n, mark) for mark in marks if (n := self._held.find(mark)) >= 0]
            if not found:
                break
            n, mark = min(found)
            self._take(n + len(mark) if self._inside else n, out)
            self._inside = not self._inside
        self._take(len(self._held) - max((overlap(self._held, mark) for mark in marks), default=0), out)
        return out

    def rest(self) -> list[Part]:
        out: list[Part] = []
        self._take(len(self._held), out)
        return out

    def _take(self, n: int, out: list[Part]) -> None:
        if n:
            out.append((not self._inside, self._held[:n]))
            self._held = self._held[n:]
