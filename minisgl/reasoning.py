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


STYLES = ("qwen3", "deepseek_r1")  # the model opens the thought itself, or not at all; the prompt has opened it


class ThoughtReader:
    """Splits one answer.  The line breaks around a thought belong to neither side.

    Stages: `open` (is there a thought?), `begin` (of a thought: white space, the tag), `think`, `gap` (line breaks), `answer`.
    """

    def __init__(self, style: str) -> None:
        self._stage = "begin" if style == "deepseek_r1" else "open"
        self._held = ""

    def feed(self, text: str) -> tuple[str, str]:
        """(thought, answer) that more text completes."""
        if self._stage == "answer":
            return "", text
        self._held += text
        core = self._held.lstrip()
        if self._stage == "open" and core:
            if core.startswith(OPEN):
                self._stage = "begin"
            elif not OPEN.startswith(core):
                self._stage = "answer"
        if self._stage == "begin" and core and (core == OPEN or not OPEN.startswith(core)):
            rest = core.removeprefix(OPEN).lstrip("\n")
            if rest:
                self._stage, self._held = "think", rest
        thought = self._think() if self._stage == "think" else ""
        if self._stage == "gap" and (rest := self._held.lstrip("\n")):
            self._stage, self._held = "answer", rest
        answer = ""
        if self._stage == "answer":
            answer, self._held = self._held, ""
        return thought, answer

    def end(self) -> tuple[str, str]:
        """The rest, when nothing more comes."""
        rest, self._held = self._held, ""
        if self._stage == "think":
            return rest.rstrip("\n"), ""
        if self._stage == "begin" and (core := rest.strip()) != OPEN:
            return core, ""  # a thought that the prompt has opened, and no more of it than looks like the tag
        return "", rest if self._stage == "open" else ""

    def _think(self) -> str:
        thought, found, rest = self._held.partition(CLOSE)
        if found:
            self._stage, self._held = "gap", rest
            return thought.rstrip("\n")
        keep = next((n for n in range(len(CLOSE) - 1, 0, -1) if self._held.endswith(CLOSE[:n])), 0)
        told = self._held[: len(self._held) - keep].rstrip("\n")
        self._held = self._held[len(told) :]
        return told
