"""The answer of /v1/messages: blocks (a thought, text, uses of tools), as one body and as events.  Runs in the api process."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minisgl.api.endpoints.openai_answers import told_timings
from minisgl.api.engine import Chunk
from minisgl.api.generation import Result, Timings
from minisgl.api.parsers.reply import Call, Part, Reply, Thought
from minisgl.api.parsers.tool_calls import Argued
from minisgl.api.requests.openai import ChatRequest
from minisgl.api.sse import sse
from minisgl.errors import RequestError
from minisgl.sampling_params import Finish

_ERRORS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_ERRORS |= {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}


@dataclass(slots=True)
class _Block:
    """One block while it grows.  `kind`: text, thinking or tool_use, which has the `call`."""

    kind: str
    call: Call | None = None
    texts: list[str] = field(default_factory=list)

    def begun(self) -> dict[str, Any]:
        return self._body("", {})

    def body(self) -> dict[str, Any]:
        text = "".join(self.texts)
        return self._body(text, _arguments(text) if self.call else {})

    def _body(self, text: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if self.call is not None:
            return {"type": "tool_use", "id": self.call.id, "name": self.call.name, "input": arguments}
        return {"type": self.kind, self.kind: text, **({"signature": ""} if self.kind == "thinking" else {})}

    def more(self, text: str) -> dict[str, Any]:
        self.texts.append(text)
        if self.call is not None:
            return {"type": "input_json_delta", "partial_json": text}
        return {"type": f"{self.kind}_delta", self.kind: text}


def _arguments(text: str) -> dict[str, Any]:
    """Of a call; none if it was cut off, or is no object."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(slots=True)
class Message:
    """The Events of a message, and its body.  `stops`: its stop sequences; `eos_ids`: tokens that end an answer."""

    chat: ChatRequest
    stops: tuple[str, ...]
    eos_ids: tuple[int, ...]
    result: Result = field(default_factory=Result)
    id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    _blocks: list[_Block] = field(default_factory=list)  # all but the last are closed
    _started: bool = False
    _reply: Reply = field(init=False)

    def __post_init__(self) -> None:
        self._reply = Reply(self.chat.form)

    # ---------------- the body
    def body(self) -> dict[str, Any]:
        """The message; while it grows, without blocks and reason."""
        reason, sequence = self._reason()
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.chat.model,
            "content": [block.body() for block in self._blocks],
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        """What was found in the cache is not among the input tokens."""
        r = self.result
        return {
            "input_tokens": r.prompt_tokens - r.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": r.cached_tokens,
            "output_tokens": r.completion_tokens,
        }

    def _reason(self) -> tuple[str | None, str | None]:
        """(stop_reason, stop_sequence).  A sequence is named if there is but one: the engine does not say which it was."""
        finish = self.result.finish
        if not finish:
            return None, None
        if finish is Finish.LENGTH:
            return "max_tokens", None
        if self._reply.reason(finish) == "tool_calls":
            return "tool_use", None
        if not self.stops or self.result.last in {*self.eos_ids, *self.chat.params.stop_token_ids}:
            return "end_turn", None
        return "stop_sequence", self.stops[0] if len(self.stops) == 1 else None

    # ---------------- as it grows
    def start(self) -> bytes:
        return b""  # the first event has the tokens of the prompt, which the first news bring

    def news(self, index: int, chunk: Chunk) -> bytes:
        begin: list[dict[str, Any]] = []
        if not self._started:
            self._started = True
            self.result.prompt_tokens, self.result.cached_tokens = chunk.prompt_tokens, chunk.cached_tokens
            begin = [{"type": "message_start", "message": self.body()}]
        self.result.add(chunk)
        return _told(begin + self.take(chunk.text, end=bool(chunk.finish)))

    def take(self, text: str, *, end: bool) -> list[dict[str, Any]]:
        """The events of more text; `end`: there is no more."""
        out: list[dict[str, Any]] = []
        for part in [*self._reply.feed(text), *(self._reply.end() if end else ())]:
            block = self._block(part, out)
            if not isinstance(part, Call):
                out.append({"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": block.more(part.text)})
        if end and not self._blocks:
            self._open(_Block("text"), out)
        return out

    def _block(self, part: Part, out: list[dict[str, Any]]) -> _Block:
        """The block that a part belongs to, opened if need be."""
        if isinstance(part, Call):
            return self._open(_Block("tool_use", part), out)
        kind = "thinking" if isinstance(part, Thought) else "text"
        if isinstance(part, Argued) or (self._blocks and self._blocks[-1].kind == kind):
            return self._blocks[-1]
        return self._open(_Block(kind), out)

    def _open(self, block: _Block, out: list[dict[str, Any]]) -> _Block:
        if self._blocks:
            out.append({"type": "content_block_stop", "index": len(self._blocks) - 1})
        self._blocks.append(block)
        out.append({"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block.begun()})
        return block

    def end(self, timings: Timings) -> bytes:
        reason, sequence = self._reason()
        return _told(
            [
                {"type": "content_block_stop", "index": len(self._blocks) - 1},
                {
                    "type": "message_delta",
                    "delta": {"stop_reason": reason, "stop_sequence": sequence},
                    "usage": self._usage(),
                    "timings": told_timings([self.result], timings),
                },
                {"type": "message_stop"},
            ]
        )

    def failed(self, error: RequestError) -> bytes:
        return _told([error_body(error)])


def _told(events: Sequence[dict[str, Any]]) -> bytes:
    return b"".join([sse(event, event["type"]) for event in events])


def error_body(error: RequestError) -> dict[str, Any]:
    """Anthropic's error object."""
    kind = _ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}
