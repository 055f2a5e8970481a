"""Names the ways in which models write thoughts, and sees where a prompt leaves an answer.  Pure; imports nothing of minisgl.

minisgl.api.parsers.thoughts reads the thoughts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Style:
    """The tags around a thought.  `assumed`: an answer begins inside a thought unless its prompt has just closed one."""

    open: str
    close: str
    assumed: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """The tags, which may be special tokens."""
        return self.open, self.close


STYLES: Mapping[str, Style] = {
    "qwen3": Style("<think>", "</think>"),
    "deepseek_r1": Style("<think>", "</think>", assumed=True),
}


def begins_inside(style: str, prompt: str) -> bool:
    """Whether the answer to a rendered prompt (its end is enough) begins inside a thought.

    Only the prompt shows it: one template opens a thought, closes an empty one or does neither, as the request demands.
    """
    tags, end = STYLES[style], prompt.rstrip()
    return end.endswith(tags.open) or (tags.assumed and not end.endswith(tags.close))
