"""A chat answer taken apart: thought, text and calls of tools, for answers in one piece and for streams alike.

Runs in the api process.  Of a request that has none of this, nothing here is made.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from minisgl.api.parsers.tool_calls import READERS, Argued, Called, CallReader, Piece, Said
from minisgl.reasoning import ThoughtReader
from minisgl.sampling_params import Finish


@dataclass(frozen=True, slots=True)
class Form:
    """What the answers to a request are made of.  `reasoning`: one of reasoning.STYLES, "" for no thoughts; `tools`: one of
    tool_calls.READERS, "" for no calls, of functions of these `names`, several at a time if `parallel`."""

    reasoning: str = ""
    tools: str = ""
    names: tuple[str, ...] = ()
    parallel: bool = True

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.tools)


WHOLE = Form()


@dataclass(frozen=True, slots=True)
class Thought:
    """More of what the model thinks."""

    text: str


@dataclass(slots=True)
class Call:
    """A call of a tool begins; its arguments, JSON text, come in pieces."""

    index: int
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


Part = Thought | Said | Call | Argued


class Reply:
    """One answer while it grows."""

    def __init__(self, form: Form) -> None:
        self._thoughts = ThoughtReader(form.reasoning) if form.reasoning else None
        self._reader: CallReader | None = None
        if form.tools:
            self._reader = READERS[form.tools](form.names, parallel=form.parallel)
        self._short_ids = form.tools == "mistral"  # nine characters, as its templates demand
        self._thought: list[str] = []
        self._said: list[str] = []
        self._calls: list[Call] = []

    def feed(self, text: str) -> list[Part]:
        """The parts that more text completes."""
        thought, answer = self._thoughts.feed(text) if self._thoughts else ("", text)
        return self._thinks(thought) + self._says(answer)

    def end(self) -> list[Part]:
        """The rest, when nothing more comes."""
        thought, answer = self._thoughts.end() if self._thoughts else ("", "")
        parts = self._thinks(thought) + self._says(answer)
        return parts + (self._parts(self._reader.end()) if self._reader else [])

    def reason(self, finish: Finish) -> str | None:
        """The `finish_reason`: a call that was cut off is no call to act upon."""
        return "tool_calls" if self._calls and finish is Finish.STOP else finish.reason

    def message(self) -> dict[str, Any]:
        """The whole `message`; both names of the thought that are in use."""
        said: str | None = "".join(self._said)
        if self._calls and not said:
            said = None
        message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
        if self._thoughts:
            thought = "".join(self._thought) or None
            message |= {"reasoning_content": thought, "reasoning": thought}
        if self._calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": "".join(c.arguments)}}
                for c in self._calls
            ]
        return message

    def _thinks(self, thought: str) -> list[Part]:
        if not thought:
            return []
        self._thought.append(thought)
        return [Thought(thought)]

    def _says(self, text: str) -> list[Part]:
        if not text:
            return []
        return self._parts(self._reader.feed(text) if self._reader else [Said(text)])

    def _parts(self, pieces: list[Piece]) -> list[Part]:
        out: list[Part] = []
        for piece in pieces:
            if isinstance(piece, Called):
                call = Call(piece.index, self._new_id(), piece.name)
                self._calls.append(call)
                out.append(call)
                continue
            if isinstance(piece, Said):
                self._said.append(piece.text)
            else:
                self._calls[piece.index].arguments.append(piece.text)
            out.append(piece)
        return out

    def _new_id(self) -> str:
        return uuid.uuid4().hex[:9] if self._short_ids else f"call_{uuid.uuid4().hex[:24]}"


def delta(part: Part) -> dict[str, Any]:
    """The `delta` of a part of a streamed chat."""
    if isinstance(part, Thought):
        return {"reasoning_content": part.text, "reasoning": part.text}
    if isinstance(part, Said):
        return {"content": part.text}
    if isinstance(part, Call):
        function = {"name": part.name, "arguments": ""}
        return {"tool_calls": [{"index": part.index, "id": part.id, "type": "function", "function": function}]}
    return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}
