"""Reads harmony, the format of gpt-oss: messages with headers, each on a channel.  Pure.

    <|channel|>analysis<|message|>...<|end|>                                           a thought
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>   a tool call
    <|start|>assistant<|channel|>final<|message|>...<|return|>                         the answer; so is commentary to nobody

The prompt ends with <|start|>assistant.  Source: OpenAI's "Harmony response format".
"""

from __future__ import annotations

import re

from minisgl.api.parsers.spans import Kind, Span, overlap

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_BEGINNINGS = (_START, _CHANNEL, _CONSTRAIN, *_ENDS, "to=")  # of a header
_MAX_HEADER = 512  # characters


class Harmony:
    """The lexer of an answer in harmony.  `inside`: the prompt has opened a thought."""

    done = False  # another thought may always follow

    def __init__(self, inside: bool) -> None:
        self.held = ""  # text that may be a mark, or a header
        self._kind: Kind = "thought" if inside else "mark"  # of the message's body; "mark": in a header

    @property
    def thinking(self) -> bool:
        """Whether text that is no mark would be a thought's."""
        return self._kind == "thought"

    def feed(self, text: str) -> list[Span]:
        """The spans that more text completes."""
        self.held += text
        out: list[Span] = []
        while self.held and (self._header(out) if self._kind == "mark" else self._body(out)):
            pass
        return out

    def rest(self) -> list[Span]:
        """The spans in the held text, when nothing more comes."""
        out: list[Span] = []
        self._take(self._kind, len(self.held), out)
        return out

    def _header(self, out: list[Span]) -> bool:
        """Read up to the beginning of a message's body; False: more text is needed."""
        core = self.held.lstrip()
        if core and not any(core.startswith(mark) or mark.startswith(core) for mark in _BEGINNINGS):
            self._kind = "text"  # there is no header
            return True
        n = self.held.find(_MESSAGE)
        if n < 0:
            if len(self.held) > _MAX_HEADER:
                self._kind = "text"
            return len(self.held) > _MAX_HEADER
        kind, name = _meaning(self.held[:n])
        self._take("mark", n + len(_MESSAGE), out, name)
        self._kind = kind
        return True

    def _body(self, out: list[Span]) -> bool:
        """Read up to the end of a message; False: more text is needed."""
        found = [(n, mark) for mark in (*_ENDS, _START, _CHANNEL) if (n := self.held.find(mark)) >= 0]
        if not found:
            self._take(self._kind, len(self.held) - max(overlap(self.held, m) for m in (*_ENDS, _START, _CHANNEL)), out)
            return False
        n, mark = min(found)
        self._take(self._kind, n, out)
        self._kind = "mark"
        self._take("mark", len(mark) if mark in _ENDS else 0, out)
        return True

    def _take(self, kind: Kind, n: int, out: list[Span], name: str = "") -> None:
        if n:
            out.append(Span(kind, self.held[:n], name))
            self.held = self.held[n:]


def _meaning(header: str) -> tuple[Kind, str]:
    """(kind, name of the function) of the message behind a header."""
    channel, to = re.search(rf"{re.escape(_CHANNEL)}\s*(\w+)", header), re.search(r"to=([^\s<]+)", header)
    analysis, recipient = channel is not None and channel[1] == "analysis", to[1] if to else ""
    if recipient.startswith("functions.") or (recipient and not analysis):
        return "call", recipient.removeprefix("functions.")
    return ("thought" if analysis else "text"), ""  # what it asks of tools of its own is thought, too
