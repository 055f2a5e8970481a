"""Renders the answer of /v1/responses: items (reasoning, message, function_call), as one body and as events.

Runs in the api process.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from minisgl.api.endpoints.answer_items import Event, Fields, ItemAnswer
from minisgl.api.endpoints.openai_answers import chat_logprobs
from minisgl.api.endpoints.responses import ResponsesRequest
from minisgl.api.engine import TokenLogprob
from minisgl.api.parsers.reply import Item
from minisgl.api.rendering import Rendered, Turns, by_tokens
from minisgl.api.usage import explained
from minisgl.config import Config
from minisgl.errors import RequestError
from minisgl.sampling_params import Finish

LONG = 50_000  # characters of a text that are rendered at a time
_KINDS = {  # prefix of the id, type of the item, stem of its events
    "thought": ("rs", "reasoning", "response.reasoning_text"),
    "text": ("msg", "message", "response.output_text"),
    "call": ("fc", "function_call", "response.function_call_arguments"),
}


class Response(ItemAnswer):
    """A response."""

    prefix = "resp"

    def __init__(self, config: Config, request: ResponsesRequest) -> None:
        super().__init__(request.chat)
        self._echoed = request.echoed
        self._created = int(time.time())
        self._number = 0  # of the next event
        self._texts: dict[int, Rendered] = {}  # of items with a long one
        self._rendered: defaultdict[int, Rendered] = defaultdict(lambda: Rendered([]))  # log probabilities, by item

    # ---------------- the body
    @property
    def _status(self) -> str:
        return "incomplete" if self.result.finish is Finish.LENGTH else "completed"

    def body(self) -> Fields:
        return self._body(self._status)

    def _body(self, status: str, error: RequestError | None = None) -> Fields:
        """The response object; its items and counts are in it once the answer has ended."""
        ended = status in ("completed", "incomplete")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.request.model,
            "output": [self._item(item, done=True) for item in self.reply.items] if ended else [],
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "top_logprobs": self.request.params.logprobs or 0,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
            "timings": self.timings,
            **explained([self.result]),
            **self._echoed,
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

    def _item(self, item: Item, *, done: bool) -> Fields:
        """The item object, empty until it is done."""
        last = item is self.reply.items[-1]
        status = "in_progress" if not done else self._status if last else "completed"
        prefix, kind, _ = _KINDS[item.kind]
        body: Fields = {"id": f"{prefix}_{item.id}", "type": kind, "status": status}
        if item.kind == "call":
            return {**body, "call_id": item.call_id, **self._name(item), "arguments": self._text(item) if done else ""}
        extra: Fields = {"summary": []} if item.kind == "thought" else {"role": "assistant"}
        return {**body, **extra, "content": [self._part(item, done=True)] if done else []}

    def _name(self, item: Item) -> Fields:
        """The name of the function that is called, and its namespace if it has one."""
        namespace, name = self.request.namespaces.get(item.name, ("", item.name))
        return {"name": name, "namespace": namespace} if namespace else {"name": name}

    def _part(self, item: Item, *, done: bool) -> Fields:
        """The only part of an item's content, empty until it is done."""
        text = self._text(item) if done else ""
        if item.kind == "thought":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs_of(item) if done else []}

    def _logprobs_of(self, item: Item) -> Any:
        pieces = self._rendered[item.index].pieces
        return Rendered([b"[", *pieces, b"]"]) if pieces else []

    async def prepare(self, turns: Turns) -> None:
        for index, tokens in self.logprobs_of.items():
            if tokens:
                content = (await by_tokens(tokens, chat_logprobs, turns))["content"]
                self._rendered[index] = Rendered(content.pieces[1:-1])

    # ---------------- the events
    def _text(self, item: Item) -> str | Rendered:
        return self._texts.get(item.index) or item.text

    def settle(self, item: Item) -> Iterator[None]:
        """Render a long text once: four events repeat it."""
        text = item.text
        if len(text) > LONG:
            pieces = [b'"']
            for at in range(0, len(text), LONG):
                pieces.append(json.dumps(text[at : at + LONG])[1:-1].encode())
                yield None
            self._texts[item.index] = Rendered([*pieces, b'"'])

    def start(self) -> bytes:
        self._echoed = {name: Rendered([json.dumps(value).encode()]) for name, value in self._echoed.items()}  # three times
        body = {"response": self._body("in_progress")}
        return self.render([("response.created", body), ("response.in_progress", body)])

    def opened(self, item: Item) -> list[Event]:
        added = ("response.output_item.added", {"output_index": item.index, "item": self._item(item, done=False)})
        if item.kind == "call":
            return [added]
        return [added, ("response.content_part.added", {**_place(item), "part": self._part(item, done=False)})]

    def grown(self, item: Item, text: str, logprobs: Sequence[TokenLogprob]) -> Event:
        extra: Fields = {"logprobs": []} if item.kind == "text" else {}
        if logprobs:
            piece = json.dumps(chat_logprobs(logprobs)["content"])[1:-1].encode()
            pieces = self._rendered[item.index].pieces
            pieces += [b", ", piece] if pieces else [piece]
            extra["logprobs"] = Rendered([b"[", piece, b"]"])
        return f"{_KINDS[item.kind][2]}.delta", {**_place(item), "delta": text, **extra}

    def closed(self, item: Item) -> list[Event]:
        done: Fields = {"text": self._text(item)}
        if item.kind == "call":
            done = {"name": self._name(item)["name"], "arguments": self._text(item)}
        elif item.kind == "text":
            done["logprobs"] = self._logprobs_of(item)
        out = [(f"{_KINDS[item.kind][2]}.done", {**_place(item), **done})]
        if item.kind != "call":
            out.append(("response.content_part.done", {**_place(item), "part": self._part(item, done=True)}))
        return [*out, ("response.output_item.done", {"output_index": item.index, "item": self._item(item, done=True)})]

    def ended(self) -> list[Event]:
        return [(f"response.{self._status}", {"response": self.body()})]

    def failed(self, error: RequestError) -> bytes:
        cause = {"code": error.code, "message": error.message, "param": error.param}
        return self.render([("error", cause), ("response.failed", {"response": self._body("failed", error)})])

    def pieces_of(self, event: Event) -> list[bytes]:
        kind, fields = event
        self._number += 1
        return super().pieces_of((kind, {"sequence_number": self._number - 1, **fields}))


def _place(item: Item) -> Fields:
    place: Fields = {"item_id": f"{_KINDS[item.kind][0]}_{item.id}", "output_index": item.index}
    return place if item.kind == "call" else {**place, "content_index": 0}
