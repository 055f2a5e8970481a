"""Names the ways in which models write thoughts, and sees where a prompt leaves an answer.  Pure; imports nothing of minisgl.

minisgl.api.parsers.thoughts reads the thoughts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HARMONY = "harmony"


@dataclass(frozen=True, slots=True)
class Style:
    """The tags around a thought.  `assumed`: an answer begins inside a thought unless its prompt has just closed one.

    `others`: further marks of the style, which may be special tokens like the tags.
    """

    open: str
    close: str
    assumed: bool = False
    others: tuple[str, ...] = ()

    @property
    def marks(self) -> tuple[str, ...]:
        """All that may be a special token."""
        return self.open, self.close, *self.others


STYLES: Mapping[str, Style] = {
    "qwen3": Style("<think>", "</think>"),
    "deepseek_r1": Style("<think>", "</think>", assumed=True),
    "mistral": Style("[THINK]", "[/THINK]"),
    "command": Style("<|START_THINKING|>", "<|END_THINKING|>"),
    "kimi_vl": Style("◁think▷", "◁/think▷"),
    "seed": Style("<seed:think>", "</seed:think>"),
    HARMONY: Style(
        "<|channel|>analysis<|message|>",
        "<|end|>",
        others=("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>", "<|return|>"),
    ),
}
# The ways of writing tool calls, which minisgl.api.parsers.call_formats describes.
CALL_STYLES = (
    *("hermes", "llama3", "mistral", "deepseek", "kimi", "granite", "jamba", "nemotron", "command", "internlm", "longcat"),
    *("qwen3_coder", "seed", "minimax", "glm", "pythonic", "lfm2", HARMONY),
)


def begins_inside(style: str, prompt: str, said: str = "", *, continued: bool = False) -> bool:
    """Whether the answer to a rendered prompt (its end is enough) begins inside a thought.

    Only the prompt shows it: one template opens a thought, closes an empty one or does neither, as the request demands.
    `said`: the last words that are not the model's; behind them, a thought may have been begun for it by more than a tag.
    `continued`: the prompt ends inside an answer, of which nothing is assumed.
    """
    tags, end = STYLES[style], prompt.rstrip()

    def last(tag: str) -> int:
        """Where the tag stands last in what is begun of the answer, or -1."""
        at = end.rfind(tag)
        ours = at >= 0 and tag not in said and said in end[:at] and said not in end[at + len(tag) :]
        return at if end.endswith(tag) or (said and ours) else -1

    opened, closed = last(tags.open), last(tags.close)
    return opened > closed or (tags.assumed and not continued and closed < 0)
