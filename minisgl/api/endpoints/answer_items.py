"""Renders an answer as a list of typed items that open, grow and close, for the dialects that have them.

Both /v1/responses and /v1/messages are dialects of this state machine, so a stream adds up to the body that the same request
gets without one.  Runs in the api process.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from minisgl.api.engine import Chunk, TokenLogprob
from minisgl.api.events import Pieces
from minisgl.api.parsers.reply import Item, Reply
from minisgl.api.rendering import Turns, holds_rendered, joined, json_pieces, parts_of
from minisgl.api.requests.openai import ChatRequest
from minisgl.api.sse import COMMENT, sse
from minisgl.api.usage import Result, Timings
from minisgl.errors import RequestError

Fields = dict[str, Any]
Event = tuple[str, Fields]  # the type of an event, and its other fields


class ItemAnswer(ABC):
    """The answer to a chat with one choice; implements table.Answer.

    `result`: the counts of its tokens so far.  `timings`: the `timings` object, once the answer has ended.
    """

    prefix = ""  # of its id
    alive = COMMENT

    def __init__(self, request: ChatRequest) -> None:
        self.request = request
        self.id = f"{self.prefix}_{uuid.uuid4().hex}"
        self.result = Result()
        self.timings: Fields | None = None
        self.reply = Reply(request.form)
        self._open: Item | None = None
        self._streams = True  # events are wanted
        self.logprobs_of: defaultdict[int, list[TokenLogprob]] = defaultdict(list)  # of an answer in one piece, by item
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text is held back

    # ---------------- the dialect
    @abstractmethod
    def body(self) -> Fields:
        """The complete answer, once it has ended."""

    @abstractmethod
    def opened(self, item: Item) -> list[Event]:
        """The events of an item that begins; its text may already be longer, but is not part of them."""

    @abstractmethod
    def grown(self, item: Item, text: str, logprobs: Sequence[TokenLogprob]) -> Event:
        """The event of more text, with the log probabilities of its tokens if it is text for the user."""

    @abstractmethod
    def closed(self, item: Item) -> list[Event]:
        """The events of an item that is complete."""

    @abstractmethod
    def ended(self) -> list[Event]:
        """The events after the last item."""

    @abstractmethod
    def failed(self, error: RequestError) -> bytes: ...

    # ---------------- the answer in one piece
    async def complete(self, chunks: list[Chunk], timings: Timings) -> Fields:
        [chunk] = chunks
        self.result.add(chunk)
        turns, self._streams = Turns(), False
        for part in parts_of(chunk):
            for _ in self._grow(part):
                pass
            await turns.spend(len(part.text))
        self.timings = timings.render([self.result])
        await self.prepare(turns)
        return self.body()

    async def prepare(self, turns: Turns) -> None:  # noqa: B027  not every dialect has log probabilities
        """Render what is large in the body."""

    # ---------------- the stream
    def start(self) -> bytes:
        return b""

    def adding(self, index: int, chunk: Chunk) -> Pieces:
        self.result.add(chunk)
        yield from self._in_turns(self._grow(chunk))

    def ending(self, timings: Timings) -> Pieces:
        self.timings = timings.render([self.result])
        yield from self._in_turns(self._closing(self.reply.items[-1]))
        for event in self.ended():
            yield from joined(self.pieces_of(event))

    def add(self, index: int, chunk: Chunk) -> bytes:
        """All events of a chunk at once."""
        return b"".join(filter(None, self.adding(index, chunk)))

    def end(self, timings: Timings) -> bytes:
        """All events after the last chunk at once."""
        return b"".join(filter(None, self.ending(timings)))

    def _grow(self, chunk: Chunk) -> Iterator[Event | None]:
        end = bool(chunk.finish)
        self._logprobs.extend(chunk.logprobs)
        for item, text in self.reply.feed(chunk.text, chunk.finish, thinking=chunk.thinking):
            yield from self._enter(item)
            if text:
                yield from self._add_text(item, text)
        if end and not self.reply.items:
            yield from self._enter(self.reply.item("text"))
        if end and self._logprobs and self.reply.items[-1].kind == "text":  # of tokens without a text
            yield from self._add_text(self.reply.items[-1], "")

    def _enter(self, item: Item) -> Iterator[Event | None]:
        """Close the former item and open this one, unless it is open already."""
        if item is not self._open:
            if self._streams:
                if self._open:
                    yield from self._closing(self._open)
                yield from self.opened(item)
            self._open = item

    def _closing(self, item: Item) -> Iterator[Event | None]:
        yield from self.settle(item)
        yield from self.closed(item)

    def settle(self, item: Item) -> Iterator[None]:
        """Render what is large in the events of an item that is complete; None: that is enough for a turn."""
        yield from ()

    def _add_text(self, item: Item, text: str) -> Iterator[Event]:
        logprobs, self._logprobs = self._logprobs, []
        kept = logprobs if item.kind == "text" else []
        if self._streams:
            yield self.grown(item, text, kept)
        else:
            self.logprobs_of[item.index].extend(kept)

    def _in_turns(self, events: Iterable[Event | None]) -> Pieces:
        for event in events:
            if event is None:
                yield None
            else:
                yield from joined(self.pieces_of(event))

    def render(self, events: Sequence[Event]) -> bytes:
        """The bytes of small events."""
        return b"".join([piece for event in events for piece in self.pieces_of(event)])

    def pieces_of(self, event: Event) -> list[bytes]:
        """The bytes of an event, which has its type as its name."""
        kind, fields = event[0], {"type": event[0], **event[1]}
        if not holds_rendered(fields):
            return [sse(fields, kind)]
        return [b"event: %b\ndata: " % kind.encode(), *json_pieces(fields), b"\n\n"]
