"""The answer of /v1/responses: items (a thought, a message, calls of functions), as one body and as events.

Both come from the same code: what a stream says adds up to what the body holds.  Runs in the api process.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from minisgl.api.endpoints.openai_answers import chat_logprobs, told_timings
from minisgl.api.engine import Chunk, TokenLogprob
from minisgl.api.generation import Result, Timings
from minisgl.api.parsers.reply import Call, Part, Reply, Thought
from minisgl.api.parsers.tool_calls import Said
from minisgl.api.requests.openai import ChatRequest
from minisgl.api.sse import sse
from minisgl.errors import RequestError
from minisgl.sampling_params import Finish

Fields = dict[str, Any]
Told = tuple[str, Fields]  # an event: its type behind "response.", and its fields


@dataclass(slots=True)
class _Item:
    """One item while it grows; `call` if it is one."""

    prefix: ClassVar[str] = ""
    index: int
    texts: list[str] = field(default_factory=list)
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}_{uuid.uuid4().hex}"

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def place(self) -> Fields:
        return {"item_id": self.id, "output_index": self.index, "content_index": 0}

    def body(self, status: str) -> Fields:
        raise NotImplementedError

    def part(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Fields:
        """The one part of its content."""
        raise NotImplementedError

    def opened(self) -> list[Told]:
        added = ("output_item.added", {"output_index": self.index, "item": self.body("in_progress")})
        return [added, ("content_part.added", {**self.place, "part": self.part("")})]

    def more(self, text: str, logprobs: Sequence[TokenLogprob]) -> Told:
        raise NotImplementedError

    def whole(self) -> list[Told]:
        """What is told of its text before it is closed."""
        raise NotImplementedError

    def closed(self, status: str) -> list[Told]:
        return [*self.whole(), ("output_item.done", {"output_index": self.index, "item": self.body(status)})]


@dataclass(slots=True)
class _Message(_Item):
    prefix: ClassVar[str] = "msg"
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def body(self, status: str) -> Fields:
        content = [] if status == "in_progress" else [self.part(self.text, self.logprobs)]
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}

    def part(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Fields:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": _logprobs(logprobs)}

    def more(self, text: str, logprobs: Sequence[TokenLogprob]) -> Told:
        self.logprobs.extend(logprobs)
        return "output_text.delta", {**self.place, "delta": text, "logprobs": _logprobs(logprobs)}

    def whole(self) -> list[Told]:
        done = {**self.place, "text": self.text, "logprobs": _logprobs(self.logprobs)}
        return [
            ("output_text.done", done),
            ("content_part.done", {**self.place, "part": self.part(self.text, self.logprobs)}),
        ]


class _Thought(_Item):
    prefix: ClassVar[str] = "rs"

    def body(self, status: str) -> Fields:
        content = [] if status == "in_progress" else [self.part(self.text)]
        return {"id": self.id, "type": "reasoning", "status": status, "summary": [], "content": content}

    def part(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Fields:
        return {"type": "reasoning_text", "text": text}

    def more(self, text: str, logprobs: Sequence[TokenLogprob]) -> Told:
        return "reasoning_text.delta", {**self.place, "delta": text}

    def whole(self) -> list[Told]:
        return [
            ("reasoning_text.done", {**self.place, "text": self.text}),
            ("content_part.done", {**self.place, "part": self.part(self.text)}),
        ]


@dataclass(slots=True)
class _FunctionCall(_Item):
    prefix: ClassVar[str] = "fc"
    call_id: str = ""
    name: str = ""

    @property
    def place(self) -> Fields:
        return {"item_id": self.id, "output_index": self.index}

    def body(self, status: str) -> Fields:
        call = {"call_id": self.call_id, "name": self.name, "arguments": self.text}
        return {"id": self.id, "type": "function_call", "status": status, **call}

    def opened(self) -> list[Told]:
        return [("output_item.added", {"output_index": self.index, "item": self.body("in_progress")})]

    def more(self, text: str, logprobs: Sequence[TokenLogprob]) -> Told:
        return "function_call_arguments.delta", {**self.place, "delta": text}

    def whole(self) -> list[Told]:
        return [("function_call_arguments.done", {**self.place, "name": self.name, "arguments": self.text})]


@dataclass(slots=True)
class Response:
    """The Events of a response, and its body.  `echoed`: fields of the request that every body repeats."""

    chat: ChatRequest
    echoed: Mapping[str, Any]
    result: Result = field(default_factory=Result)
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    _items: list[_Item] = field(default_factory=list)  # all but the last are closed
    _reply: Reply = field(init=False)
    _logprobs: list[TokenLogprob] = field(default_factory=list)  # of text that is held back
    _number: int = 0  # of the next event
    _timings: Fields | None = None  # once it has ended

    def __post_init__(self) -> None:
        self._reply = Reply(self.chat.form)

    # ---------------- the body
    @property
    def status(self) -> str:
        return "incomplete" if self.result.finish is Finish.LENGTH else "completed"

    def body(self, status: str, error: RequestError | None = None) -> Fields:
        """The response object; items are in it once the answer has ended."""
        ended = status in ("completed", "incomplete")
        output = [item.body("completed") for item in self._items[:-1]] + [item.body(status) for item in self._items[-1:]]
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.chat.model,
            "output": output if ended else [],
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "top_logprobs": self.chat.params.logprobs or 0,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
            "timings": self._timings,
            **self.echoed,
        }

    def _usage(self) -> Fields:
        r = self.result
        return {
            "input_tokens": r.prompt_tokens,
            "input_tokens_details": {"cached_tokens": r.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": r.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": r.reasoning_tokens},
            "total_tokens": r.prompt_tokens + r.completion_tokens,
        }

    # ---------------- as it grows
    def start(self) -> bytes:
        body = self.body("in_progress")
        return self._told([("created", {"response": body}), ("in_progress", {"response": body})])

    def news(self, index: int, chunk: Chunk) -> bytes:
        self.result.add(chunk)
        return self._told(self.take(chunk.text, chunk.logprobs, end=bool(chunk.finish)))

    def take(self, text: str, logprobs: Sequence[TokenLogprob], *, end: bool) -> list[Told]:
        """The events of more text, with the log probabilities of its tokens; `end`: there is no more."""
        out: list[Told] = []
        self._logprobs.extend(logprobs)
        for part in [*self._reply.feed(text), *(self._reply.end() if end else ())]:
            item = self._item(part, out)
            if isinstance(part, Call):
                continue
            item.texts.append(part.text)
            out.append(item.more(part.text, self._logprobs if isinstance(part, Said) else ()))
            self._logprobs = []
        if end and not self._items:
            self._open(_Message(0), out)
        if end and self._logprobs and isinstance(self._items[-1], _Message):  # of tokens without a text
            out.append(self._items[-1].more("", self._logprobs))
        return out

    def _item(self, part: Part, out: list[Told]) -> _Item:
        """The item that a part belongs to, opened if need be."""
        last, n = self._items[-1] if self._items else None, len(self._items)
        if isinstance(part, Call):
            return self._open(_FunctionCall(n, call_id=part.id, name=part.name), out)
        if isinstance(part, Said) and not isinstance(last, _Message):
            return self._open(_Message(n), out)
        if isinstance(part, Thought) and not isinstance(last, _Thought):
            return self._open(_Thought(n), out)
        return self._items[-1]

    def _open(self, item: _Item, out: list[Told]) -> _Item:
        if self._items:
            out += self._items[-1].closed("completed")
        self._items.append(item)
        out += item.opened()
        return item

    def end(self, timings: Timings) -> bytes:
        self._timings = told_timings([self.result], timings)
        status = self.status
        return self._told([*self._items[-1].closed(status), (status, {"response": self.body(status)})])

    def failed(self, error: RequestError) -> bytes:
        told = {"code": error.code, "message": error.message, "param": error.param}
        return self._event("error", told) + self._told([("failed", {"response": self.body("failed", error)})])

    def _told(self, events: Sequence[Told]) -> bytes:
        return b"".join([self._event(f"response.{kind}", fields) for kind, fields in events])

    def _event(self, kind: str, fields: Fields) -> bytes:
        self._number += 1
        return sse({"type": kind, "sequence_number": self._number - 1, **fields}, kind)


def _logprobs(tokens: Sequence[TokenLogprob]) -> list[Fields]:
    told: list[Fields] = chat_logprobs(tokens)["content"]
    return told
