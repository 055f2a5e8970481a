"""How many tokens a thought has, which a model writes before its answer.  Pure; runs in the detokenizer process.

The api process takes the text apart (api/parsers/thoughts.py), but there it comes in pieces that are not tokens.
"""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


class ThoughtCounter:
    """Counts the tokens of the thought in one answer, whose text comes a token at a time.

    A token is the thought's if its text begins behind the opening tag and before the closing one: the tags are not counted,
    line breaks beside them are, and a thought that is never closed reaches to the end.  vLLM's reasoning parsers count the
    same tokens (`count_reasoning_tokens`), by the ids of the tags; by their text they may have several tokens.
    `style`: one of api.reasoning.STYLES.
    """

    __slots__ = ("_held", "_inside", "_starts", "_style", "_tokens", "done")

    def __init__(self, style: str) -> None:
        self.done = False  # the thought is closed, or there is none
        self._style = style
        self._tokens = 0  # that are certain
        self._inside = False
        self._held = ""  # text that may be, or become, a tag
        self._starts: dict[int, int] = {}  # where in it tokens begin that are not certain -> how many (some have no text)

    def feed(self, text: str) -> None:
        """One more token, by the text that it completes (perhaps none)."""
        at = len(self._held)
        self._starts[at] = self._starts.get(at, 0) + 1
        self._held += text
        if not self._inside:
            self._enter()
        if self._inside and not self.done:
            self._advance()

    def count(self) -> int:
        """Tokens of the thought, when it is closed or nothing more comes."""
        if self.done or (self._style == "qwen3" and not self._inside):
            return self._tokens
        return self._tokens + sum(self._starts.values())

    def _enter(self) -> None:
        core = self._held.lstrip()
        if core.startswith(OPEN):
            self._inside = True
            self._drop(len(self._held) - len(core) + len(OPEN))
        elif not OPEN.startswith(core):
            self._inside = self._style == "deepseek_r1"  # the prompt has opened it
            self.done = not self._inside

    def _advance(self) -> None:
        end = self._held.find(CLOSE)
        self.done = end >= 0
        if not self.done:
            tag = self._held.rfind(CLOSE[0])
            end = tag if tag >= 0 and CLOSE.startswith(self._held[tag:]) else len(self._held)
        self._tokens += sum(n for start, n in self._starts.items() if start < end)
        self._drop(end)

    def _drop(self, end: int) -> None:
        """Forget the text before `end`, and the tokens that begin there."""
        self._held = self._held[end:]
        self._starts = {start - end: n for start, n in self._starts.items() if start >= end}
