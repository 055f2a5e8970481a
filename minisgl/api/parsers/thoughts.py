"""The thoughts of a model, which it writes before its answer and ends with </think>: told apart as the text grows.

Pure; runs in the api process.  Like the reader of tool calls it never looks at where a piece of text ends.
"""

from __future__ import annotations

from minisgl.reasoning import CLOSE, OPEN

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
