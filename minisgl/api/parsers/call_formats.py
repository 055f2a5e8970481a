"""Tells how models write tool calls, one row of FORMATS for each way.  Pure.

    hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, several in sequence: Hermes, Qwen2.5, Qwen3, Granite 4
    llama3    {"name": ..., "parameters": {...}} as the whole answer, several separated by ; or , : Llama 3.1 and later
    mistral   [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], in newer models name[CALL_ID]id[ARGS]{...}
    deepseek  name and arguments between the tokens of V3, R1 and V3.1, the arguments perhaps in a block of code
    kimi      functions.name:0 and arguments between the tokens of Kimi K2
    harmony   messages on a channel of gpt-oss, which harmony.py reads
    qwen3_coder, seed, minimax, glm   texts between tags, which xml_scan.py reads: Qwen3-Coder, Seed-OSS, MiniMax M2, GLM 4.5
    pythonic, lfm2   [f(city="Ulm"), ...], which python_scan.py reads: Llama 3.2 and 4, LFM2

The others are objects, or lists of them, between two marks.  An object is read in the place of a call of these kinds, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minisgl.api.parsers.xml_scan import Tags
from minisgl.reasoning import HARMONY, STYLES

SPACE = " \n\t\r"


class _Run(NamedTuple):
    """A part of a pattern: any number of some characters.  `named`: they are the name of a function, and at least one."""

    chars: str
    named: bool = False


class _Maybe(NamedTuple):
    """A part of a pattern that may be missing."""

    text: str


_Way = Sequence[str | _Run | _Maybe]
_S, _LIST, _BEHIND = _Run(SPACE), _Run(SPACE + "[;,"), _Run(SPACE + ",;}]")
_NAME, _ID = _Run(r"\w.-", named=True), _Run(r"\w-")


def _whole(way: _Way) -> str:
    """A regular expression for a way of writing, the name in a group."""
    out = ""
    for part in way:
        if isinstance(part, _Run):
            out += f"([{_class(part.chars)}]+)" if part.named else f"[{_class(part.chars)}]*"
        else:
            text = part.text if isinstance(part, _Maybe) else part
            out += f"(?:{re.escape(text)})?" if isinstance(part, _Maybe) else re.escape(text)
    return out


def _begun(way: _Way) -> str:
    """A regular expression for every beginning of a way of writing, the empty and the complete one included."""
    if not way:
        return ""
    part, rest = way[0], _begun(way[1:])
    if isinstance(part, _Run):
        run = f"[{_class(part.chars)}]"
        return f"(?:{run}+{rest})?" if part.named else f"{run}*{rest}"
    if isinstance(part, _Maybe):
        return f"(?:{_begun([part.text])}|{re.escape(part.text)}{rest}|{rest})"
    return "".join(f"(?:{re.escape(c)}" for c in part) + rest + ")?" * len(part)


def _class(chars: str) -> str:
    return chars.replace("[", r"\[").replace("]", r"\]")


def _pattern(*ways: _Way) -> re.Pattern[str]:
    """What may stand before the object of a call, written in one of these ways, or a beginning of it."""
    return re.compile("|".join([*map(_whole, ways), *map(_begun, ways)]))


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way of writing calls.

    `opening` comes before the first call; an answer may begin with `bare` instead.  `before` matches the text between an
    opening and the object of the call, `between` the text between one call and the next object; both also match every
    beginning of such a text, and have a group for the name of a call that has it before its object.  `closing` ends a call, or
    all of them.  `arguments`: the key of the arguments, as templates teach it.  A list of calls stands in `brackets`, its calls
    are separated by `separator`.  `special`: further marks that may be special tokens.  `id_length`: hexadecimal digits in the
    id of a call, which has the prefix `id_prefix`.

    `also`: what begins a call of one of the request's tools, and no other, without the opening.  Arguments between `tags`, or
    in brackets (`python`), begin with one of the characters `starts` behind the name.
    """

    opening: str
    before: re.Pattern[str]
    between: re.Pattern[str]
    closing: str = ""
    bare: str = ""
    arguments: str = "arguments"
    separator: str = "\n"
    brackets: tuple[str, str] = ("", "")
    special: tuple[str, ...] = ()
    id_prefix: str = "call_"
    id_length: int = 24
    also: str = ""
    starts: str = ""
    tags: Tags | None = None
    python: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """What may be a special token."""
        return (self.opening, self.closing, *self.special)


def _tagged(opening: str, closing: str, *also: str, arguments: str = "arguments") -> ToolFormat:
    """Objects, or lists of them, between two marks.  `also`: marks that may follow the opening."""
    inner: _Way = [_LIST, *(part for mark in also for part in (_Maybe(mark), _S))]
    between = _pattern([_BEHIND, *inner], [_BEHIND, closing], [_BEHIND, opening, *inner])
    return ToolFormat(opening, _pattern(inner), between, closing, arguments=arguments, special=also)


def _between_tags(opening: str, tags: Tags, also: str = "", starts: str = ">") -> ToolFormat:
    """Arguments as text between tags, the call between two marks."""
    name: _Way = [*([tags.head[0]] if tags.head[0] else []), _NAME, *([tags.head[1][:-1]] if tags.head[1][:-1] else [])]
    between: Sequence[_Way] = ([_BEHIND, tags.outer], [_BEHIND, opening, _S, *name], [_BEHIND, opening, _LIST])
    more: Sequence[_Way] = ([_BEHIND, *name],) if tags.head[0] else ()
    special = (tags.head[0], *tags.key, *tags.value, tags.tail)
    return ToolFormat(
        *(opening, _pattern([_S, *name], [_LIST]), _pattern(*between, *more), tags.outer),
        special=tuple(mark for mark in special if len(mark) > 2),
        also=also,
        starts=starts,
        tags=tags,
    )


def _pythonic(opening: str, closing: str) -> ToolFormat:
    """A list of calls in Python's syntax, between two marks or without them."""
    calls: Sequence[_Way] = ([_S, _Maybe("["), _S, _NAME], [_S, _Maybe("["), _S])
    between: Sequence[_Way] = ([_BEHIND, _NAME], [_BEHIND], [_BEHIND, closing], [_BEHIND, "[", _S, _NAME])
    again: Sequence[_Way] = [[_BEHIND, opening, *way] for way in calls]
    return ToolFormat(
        *(opening, _pattern(*calls), _pattern(*between, *again), closing),
        also="[",
        starts="(",
        python=True,
    )


_MISTRAL: Sequence[_Way] = ([_LIST], [_S, _NAME, _Maybe("[CALL_ID]"), _ID, _Maybe("[ARGS]"), _S])
_DEEPSEEK = [  # written with full-width bars and low blocks
    f"<\uff5ctool\u2581{name}\uff5c>"
    for name in ("calls\u2581begin", "call\u2581begin", "sep", "call\u2581end", "calls\u2581end")
]
_DEEPSEEK_CALL: Sequence[_Way] = (
    [_DEEPSEEK[1], _NAME, _DEEPSEEK[2], _S, _Maybe("```json"), _S],  # V3.1
    [_DEEPSEEK[1], "function", _DEEPSEEK[2], _NAME, _S, _Maybe("```json"), _S],  # V3 and R1
)
_DEEPSEEK_END: _Way = [_BEHIND, _Maybe("```"), _S, _Maybe(_DEEPSEEK[3]), _S]
_KIMI = [f"<|tool_call{name}|>" for name in ("s_section_begin", "_begin", "_argument_begin", "_end", "s_section_end")]
_KIMI_CALL: _Way = [_KIMI[1], _S, _NAME, _Maybe(":"), _ID, _S, _KIMI[2], _S]
_KIMI_END: _Way = [_BEHIND, _Maybe(_KIMI[3]), _S]

FORMATS: Mapping[str, ToolFormat] = {
    "hermes": _tagged("<tool_call>", "</tool_call>"),
    "llama3": ToolFormat(
        opening="<|python_tag|>",
        before=_pattern([_LIST]),
        between=_pattern([_BEHIND, _Maybe("<|python_tag|>"), _LIST]),
        bare="{",
        arguments="parameters",
        separator="; ",
    ),
    "mistral": ToolFormat(
        opening="[TOOL_CALLS]",
        before=_pattern(*_MISTRAL),
        between=_pattern([_BEHIND], *([_BEHIND, "[TOOL_CALLS]", *way] for way in _MISTRAL)),
        bare="[{",
        separator=", ",
        brackets=("[", "]"),
        special=("[ARGS]", "[CALL_ID]"),
        id_prefix="",
        id_length=9,  # as its templates demand
    ),
    "deepseek": ToolFormat(
        opening=_DEEPSEEK[0],
        before=_pattern(*([_S, *way] for way in _DEEPSEEK_CALL)),
        between=_pattern([*_DEEPSEEK_END, _DEEPSEEK[4]], *([*_DEEPSEEK_END, *way] for way in _DEEPSEEK_CALL)),
        closing=_DEEPSEEK[4],
        special=tuple(_DEEPSEEK[1:4]),
    ),
    "kimi": ToolFormat(
        opening=_KIMI[0],
        before=_pattern([_S, *_KIMI_CALL]),
        between=_pattern([*_KIMI_END, *_KIMI_CALL], [*_KIMI_END, _KIMI[4]]),
        closing=_KIMI[4],
        special=tuple(_KIMI[1:4]),
    ),
    "granite": _tagged("<|tool_call|>", "<|/tool_call|>"),  # 3.x; Phi 4 mini
    "jamba": _tagged("<tool_calls>", "</tool_calls>"),  # also Hunyuan and MiniMax M1
    "nemotron": _tagged("<TOOLCALL>", "</TOOLCALL>"),
    "command": _tagged("<|START_ACTION|>", "<|END_ACTION|>", arguments="parameters"),
    "internlm": _tagged("<|action_start|>", "<|action_end|>", "<|plugin|>", arguments="parameters"),
    "longcat": _tagged("<longcat_tool_call>", "</longcat_tool_call>"),
    "qwen3_coder": _between_tags(
        "<tool_call>",
        Tags(("<function=", ">"), ("<parameter=", ">"), ("", "</parameter>"), "</function>", "</tool_call>"),
        also="<function=",
    ),
    "seed": _between_tags(
        "<seed:tool_call>",
        Tags(("<function=", ">"), ("<parameter=", ">"), ("", "</parameter>"), "</function>", "</seed:tool_call>", breaks=False),
        also="<function=",
    ),
    "minimax": _between_tags(
        "<minimax:tool_call>",
        Tags(
            *(('<invoke name="', '">'), ('<parameter name="', '">'), ("", "</parameter>"), "</invoke>", "</minimax:tool_call>"),
            breaks=False,
        ),
        also='<invoke name="',
    ),
    "glm": _between_tags(
        "<tool_call>",
        Tags(
            *(("", ""), ("<arg_key>", "</arg_key>"), ("<arg_value>", "</arg_value>"), "", "</tool_call>"),
            breaks=False,
            others=(),
        ),
        starts="\n<",
    ),
    "pythonic": _pythonic("<|python_start|>", "<|python_end|>"),
    "lfm2": _pythonic("<|tool_call_start|>", "<|tool_call_end|>"),
    # Its calls are found by harmony.py; what a grammar forces to be calls stands in the answer.
    HARMONY: ToolFormat("<|call|>", _pattern([_LIST]), _pattern([_BEHIND]), bare="{", special=STYLES[HARMONY].marks),
}
