"""Splits the text of a chat answer into items: thoughts, text and tool calls.  Pure; runs in the api process.

Every dialect of the API renders the same items, in answers of one piece and in streams.  Requests with neither thoughts nor
tools do not need this module.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from minisgl.api.parsers.spans import Span
from minisgl.api.parsers.thoughts import ThoughtReader
from minisgl.api.parsers.tool_calls import FORMATS, Argued, Called, CallReader, Piece, Said
from minisgl.api.parsers.xml_scan import Parameters
from minisgl.reasoning import HARMONY
from minisgl.sampling_params import Finish

Kind = Literal["thought", "text", "call"]


@dataclass(frozen=True, slots=True)
class Form:
    """What the answers to a request may contain.

    `reasoning`: one of reasoning.STYLES, "" for no thoughts.  `tools`: one of tool_calls.FORMATS, "" for no calls.  `names`:
    the functions that may be called, several of them in one answer if `parallel`; `parameters`: what is known of theirs.
    """

    reasoning: str = ""
    tools: str = ""
    names: tuple[str, ...] = ()
    parallel: bool = True
    parameters: Mapping[str, Parameters] = field(default_factory=dict, hash=False)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.tools)


PLAIN = Form()  # text alone


@dataclass(slots=True, eq=False)
class Item:
    """One item of an answer while it grows; the text of a call is the JSON text of its arguments.

    `index`: its place among all items.  Calls have a `number`, their place among the calls, a `name` and a `call_id` in the
    form that the chat template expects.
    """

    kind: Kind
    index: int
    number: int = 0
    name: str = ""
    call_id: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of a thought."""

    text: str


Growth = tuple[Item, str]  # an item and its new text; "" only where a call begins


class Reply:
    """One answer while it grows."""

    def __init__(self, form: Form) -> None:
        self.items: list[Item] = []
        self._reasoning = form.reasoning
        self._style = HARMONY if form.tools == HARMONY else form.reasoning
        self._thoughts: ThoughtReader | None = None
        self._calling = False  # in a call that the lexer has found
        self._format = FORMATS[form.tools] if form.tools else None
        self._calls = CallReader(self._format, form.names, form.parameters, parallel=form.parallel) if self._format else None

    def feed(self, text: str, finish: Finish = Finish.NONE, *, thinking: bool | None = None) -> list[Growth]:
        """The growth that more text brings.  `finish`, `thinking`: as in Chunk; of `thinking` the first counts."""
        if self._style and self._thoughts is None:
            self._thoughts = ThoughtReader(self._style, thinking)
        spans = self._thoughts.feed(text) if self._thoughts else [Span("text", text)]
        if finish and self._thoughts:
            spans += self._thoughts.end()
        pieces = [piece for span in spans for piece in self._pieces(span)]
        if finish and self._calls:
            pieces += self._calls.end(complete=finish is Finish.STOP)
        return [self._add(piece) for piece in pieces]

    def item(self, kind: Kind) -> Item:
        """The latest item if it has this kind, otherwise a new one."""
        if not self.items or self.items[-1].kind != kind:
            self.items.append(Item(kind, len(self.items)))
        return self.items[-1]

    def reason(self, finish: Finish) -> str | None:
        """The `finish_reason`.  A call that was cut off is not reported as a call to act upon."""
        called = finish is Finish.STOP and any(item.kind == "call" for item in self.items)
        return "tool_calls" if called else finish.reason

    def message(self) -> dict[str, Any]:
        """The complete `message` of a chat answer, the thought under both names that are in use."""
        calls = [_call(item, item.text) for item in self.items if item.kind == "call"]
        message: dict[str, Any] = {"role": "assistant", "content": self._joined("text"), "refusal": None}
        if calls:
            message["content"] = message["content"] or None
        if self._reasoning:
            message |= dict.fromkeys(("reasoning_content", "reasoning"), self._joined("thought") or None)
        return message | ({"tool_calls": calls} if calls else {})

    def _joined(self, kind: Kind) -> str:
        return "".join(item.text for item in self.items if item.kind == kind)

    def _pieces(self, span: Span) -> list[Piece | Thought]:
        kind, text, name = span
        out: list[Piece | Thought] = []
        if self._calling and self._calls and kind != "call":
            out += self._calls.end(complete=True)
            self._calling = False
        if kind == "thought" and self._reasoning:
            out.append(Thought(text))
        elif self._calls is None:
            out += [Said(text)] if text and kind != "mark" else []
        elif kind == "mark":
            out += self._calls.begin(name)
            self._calling = True
        elif kind == "call":  # only arguments are expected there
            out += [piece for piece in self._calls.feed(text) if not isinstance(piece, Said)]
        else:
            out += self._calls.feed(text)
        return out

    def _add(self, piece: Piece | Thought) -> Growth:
        if isinstance(piece, Thought):
            return self._append(self.item("thought"), piece.text)
        if not isinstance(piece, Called):
            return self._append(self.items[-1] if isinstance(piece, Argued) else self.item("text"), piece.text)
        assert self._format is not None
        call_id = self._format.id_prefix + uuid.uuid4().hex[: self._format.id_length]
        self.items.append(Item("call", len(self.items), piece.index, piece.name, call_id))
        return self.items[-1], ""

    def _append(self, item: Item, text: str) -> Growth:
        item.texts.append(text)
        return item, text


def delta(item: Item, text: str) -> dict[str, Any]:
    """The `delta` of a streamed chat for new text of an item."""
    if item.kind == "thought":
        return {"reasoning_content": text, "reasoning": text}
    if item.kind == "text":
        return {"content": text}
    call = {"function": {"arguments": text}} if text else _call(item, "")
    return {"tool_calls": [{"index": item.number, **call}]}


def _call(item: Item, arguments: str) -> dict[str, Any]:
    return {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": arguments}}
