"""Separates the thought of a reasoning model from its answer, and counts the thought's tokens.  Pure; imports nothing.

`ThoughtReader` runs in the api process, on pieces of text that are not tokens; `ThoughtCounter` in the detokenizer process, on
the text of each token.  Both follow the tags with `_Tags`, so they always mean the same thought.
"""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


# How families of models write their thoughts -> whether the chat template ends the prompt with the opening tag; if not, the
# model writes the tag, or no thought.
STYLES = {"qwen3": False, "deepseek_r1": True}
_NEVER = 1 << 62  # an offset behind the end of every text


class _Tags:
    """Finds the tags in one answer, whose text comes in pieces.  Offsets count characters from its beginning."""

    __slots__ = ("_opened", "begin", "end", "held", "settled", "stage")

    def __init__(self, style: str) -> None:
        self._opened = STYLES[style]  # by the prompt
        self.stage = "before"  # of the text that comes next: "before" a thought | "inside" | "after" it, or there is none
        self.begin = 0 if self._opened else _NEVER  # of the thought, behind its opening tag
        self.end = _NEVER  # of the thought, before its closing tag
        self.settled = 0  # offset up to which all text is known to be thought, answer or tag
        self.held = ""  # the text behind `settled`: it may be a tag, or become one

    def feed(self, text: str) -> tuple[str, str]:
        """(thought, answer) that more text settles, with the line breaks around the tags."""
        self.held += text
        if self.stage == "before":
            self._look_for_thought()
        thought = self._read_thought() if self.stage == "inside" else ""
        return thought, self._settle(len(self.held)) if self.stage == "after" else ""

    def rest(self) -> tuple[str, str]:
        """(thought, answer) in the held text, when nothing more comes."""
        text = self._settle(len(self.held))
        if self.begin == _NEVER:
            return "", text
        return text.lstrip() if self.stage == "before" else text, ""

    def _look_for_thought(self) -> None:
        core = self.held.lstrip()
        lead = len(self.held) - len(core)
        if core.startswith(OPEN):
            self._settle(lead, OPEN)
            self.begin, self.stage = self.settled, "inside"
        elif not OPEN.startswith(core):
            self.stage = "inside" if self._opened else "after"
            self._settle(lead if self._opened else 0)

    def _read_thought(self) -> str:
        n = self.held.find(CLOSE)
        if n >= 0:
            self.end, self.stage = self.settled + n, "after"
            return self._settle(n, CLOSE)
        tag = self.held.rfind(CLOSE[0])
        return self._settle(tag if tag >= 0 and CLOSE.startswith(self.held[tag:]) else len(self.held))

    def _settle(self, n: int, tag: str = "") -> str:
        """Take `n` characters of the held text, and drop the tag behind them."""
        text, self.held = self.held[:n], self.held[n + len(tag) :]
        self.settled += n + len(tag)
        return text


class ThoughtReader:
    """Splits one answer.  The line breaks around a thought belong to neither side."""

    def __init__(self, style: str) -> None:
        self._tags = _Tags(style)
        self._breaks = ""  # line breaks at the end of the thought so far
        self._thinking = self._answering = False  # it has begun

    def feed(self, text: str) -> tuple[str, str]:
        """(thought, answer) that more text completes."""
        return ("", text) if self._answering else self._trim(*self._tags.feed(text))

    def end(self) -> tuple[str, str]:
        """The rest, when nothing more comes."""
        return self._trim(*self._tags.rest())

    def _trim(self, thought: str, answer: str) -> tuple[str, str]:
        if thought:
            text = self._breaks + thought if self._thinking else thought.lstrip("\n")
            thought = text.rstrip("\n")
            self._breaks = text[len(thought) :]
            self._thinking = bool(text)
        if answer:
            answer = answer if self._tags.begin == _NEVER else answer.lstrip("\n")
            self._answering = bool(answer)
        return thought, answer


class ThoughtCounter:
    """Counts the tokens of the thought in one answer, whose text comes a token at a time.

    A token is the thought's if its text begins behind the opening tag and before the closing one: the tags are not counted,
    line breaks next to them are, and a thought that is never closed reaches to the end.  vLLM's reasoning parsers count the
    same tokens (`count_reasoning_tokens`) by the ids of the tags; here a tag may have several tokens.
    """

    __slots__ = ("_starts", "_tags", "_tokens")

    def __init__(self, style: str) -> None:
        self._tags = _Tags(style)
        self._tokens = 0
        self._starts: dict[int, int] = {}  # where tokens begin that are not settled -> how many (some have no text)

    @property
    def done(self) -> bool:
        """Whether the thought is closed, or there is none."""
        return self._tags.stage == "after"

    def feed(self, text: str) -> None:
        """One more token, by the text that it completes (perhaps none)."""
        start = self._tags.settled + len(self._tags.held)
        self._starts[start] = self._starts.get(start, 0) + 1
        self._tags.feed(text)
        self._settle(self._tags.settled)

    def count(self) -> int:
        """Tokens of the thought, when it is closed or nothing more comes."""
        self._settle(_NEVER)
        return self._tokens

    def _settle(self, offset: int) -> None:
        """Count the tokens that begin before `offset`."""
        for start in [start for start in self._starts if start < offset]:
            n = self._starts.pop(start)
            if self._tags.begin <= start < self._tags.end:
                self._tokens += n
