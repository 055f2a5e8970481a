"""From the engine's callbacks to asyncio: what a request produced while its consumer was busy arrives in one piece.

Runs in the api process, on the thread of its event loop.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol

from minisgl.api.engine import Chunk, Engine, Prompt, TokenLogprob
from minisgl.api.parsers.reply import Reply
from minisgl.errors import RequestError, internal_error
from minisgl.sampling_params import DEFAULT_OPTIONS, Finish, RequestOptions, SamplingParams

log = logging.getLogger("minisgl.api")
News = list[tuple[int, Chunk]]  # (index of the prompt, what it has said since)


async def whole(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams],
    options: RequestOptions = DEFAULT_OPTIONS,
) -> tuple[list[Chunk], Timings]:
    """Continue several prompts to their ends, at the same time: all that is said of each, in one chunk.

    `params`: for all of them, or one for each.  Raises RequestError, and closes the others, if one of them fails; cancelling
    the caller closes all of them.
    """
    generation = Generation(engine, prompts, params, options)
    try:
        news = sorted(await generation.take_all(), key=itemgetter(0))
        return [chunk for _, chunk in news], generation.timings
    finally:
        generation.close()


class Generation:
    """Several prompts that are being continued, from `engine.open` to `close`, which must be called.

    What nobody has taken yet waits here: at most the completions of one request, so bounded by its `max_tokens`.
    Raises RequestError if one of them is refused.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> None:
        self.unfinished = len(prompts)  # of what has been taken
        self._engine = engine
        self._news: News = []
        self._error: RequestError | None = None
        self._wake: Callable[[], object] | None = None
        self._growing = len(prompts)  # have no `finish` yet
        self._began, self._first, self._ended = time.monotonic(), 0.0, 0.0
        self._queued = 0.0  # of the prompt that was first
        self._uids: list[int] = []
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        try:
            for i, (prompt, p) in enumerate(zip(prompts, each, strict=True)):
                self._uids.append(engine.open(prompt, p, functools.partial(self._put, i), options))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Cancel what is not finished."""
        self._wake = None
        for uid in self._uids:
            self._engine.close(uid)

    def _put(self, index: int, item: Chunk | RequestError) -> None:
        """The engine's `deliver`: never blocks."""
        if isinstance(item, RequestError):
            self._error = self._error or item
        elif item.finish and item.finish is Finish.ABORT:
            # Only a client that has left aborts a request, and nobody listens for it; whoever still listens gets an error.
            self._error = RequestError("The request was aborted.", status=500, kind="server_error", code="aborted")
        else:
            self._news.append((index, item))
            if not self._first:
                self._first, self._queued = time.monotonic(), item.queued
            if item.finish:
                self._growing -= 1
                self._ended = time.monotonic()
        if self._wake is not None:
            wake, self._wake = self._wake, None
            wake()

    @property
    def timings(self) -> Timings:
        """Until now."""
        now = time.monotonic()
        first = self._first or now
        return Timings(first - self._began, (now if self._growing else self._ended) - first, self._queued)

    def listen(self, wake: Callable[[], object]) -> None:
        """Have `wake` called once, as soon as there is something to take; it must not take it there and then."""
        if self._news or self._error is not None:
            wake()
        else:
            self._wake = wake

    async def take(self) -> News:
        """What has arrived, waiting for it if need be; see `take_now`."""
        if not self._news and self._error is None:
            awaited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.listen(functools.partial(_settle, awaited))
            await awaited
        return self.take_now()

    async def take_all(self) -> News:
        """Everything, one chunk for each prompt.  No task is woken before the end, or before a failure, which is raised."""
        awaited: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def look() -> None:
            if self._error is not None or not self._growing:
                _settle(awaited)
            else:
                self._wake = look

        look()
        await awaited
        if self._error is not None:
            raise self._error
        return self.take_now()

    def take_now(self) -> News:
        """What has arrived since the last time, at most one chunk for each prompt.  Raises the error of a request after
        everything that came before it."""
        news = self._news
        if not news:
            if self._error is not None:
                raise self._error
            return news
        self._news = []
        if len(news) > 1:
            by_index: dict[int, list[Chunk]] = {}
            for index, chunk in news:
                by_index.setdefault(index, []).append(chunk)
            news = [(index, _merge(chunks)) for index, chunks in by_index.items()]
        for _, chunk in news:
            if chunk.finish:
                self.unfinished -= 1
        return news


@dataclass(frozen=True, slots=True)
class Timings:
    """Of a generation, in seconds: until the first news of any prompt, and from there to the end of the last.

    `queued`: the part of `first` in which that prompt waited for its first step (see Chunk).  What it leaves of `first` is the
    prefill, with a little for tokenizing and for the ways between the processes.
    """

    first: float
    rest: float
    queued: float = 0.0

    def render(self, tokens: int, cached: int) -> dict[str, Any]:
        """What clients are told: milliseconds, `tokens` a second behind the first, and how many of the prompt were `cached`."""
        return {
            "queue_ms": round(1000 * self.queued, 3),
            "ttft_ms": round(1000 * self.first, 3),
            "decode_ms": round(1000 * self.rest, 3),
            "total_ms": round(1000 * (self.first + self.rest), 3),
            "tok_s": round((tokens - 1) / self.rest, 3) if self.rest > 0 and tokens > 1 else None,
            "cached_n": cached,
        }


class Events(Protocol):
    """An answer as server-sent events: bytes, each piece of which is whole events."""

    def start(self) -> bytes:
        """What comes before the first news."""

    def news(self, index: int, chunk: Chunk) -> bytes:
        """What is new of the answer to a prompt, perhaps nothing."""

    def end(self, timings: Timings) -> bytes:
        """What comes when every prompt has its `finish`."""

    def failed(self, error: RequestError) -> bytes:
        """What comes instead when something has been told before."""


class StreamedAnswer:
    """A generation that is told as events.  `close` must be called, and cancels what is not finished.

    Up to the first piece a failure is raised, so that it can still be an HTTP status; later ones are told inside the stream.
    """

    def __init__(self, generation: Generation, events: Events) -> None:
        self.done = False  # everything has been told
        self._generation = generation
        self._events = events
        self.listen, self.close = generation.listen, generation.close

    @property
    def timings(self) -> Timings:
        """Until now."""
        return self._generation.timings

    async def first(self) -> bytes:
        """What comes first, waiting for it.  Raises RequestError."""
        head = self._events.start()
        while True:
            piece = self._told(await self._generation.take())
            if head or piece or self.done:
                return head + piece

    def more(self) -> bytes:
        """What there is to be told now, perhaps nothing: `listen` says when there is more."""
        try:
            return self._told(self._generation.take_now())
        except RequestError as e:
            error = e
        except Exception:
            log.exception("a stream failed")
            error = internal_error()
        self.done = True
        return self._events.failed(error)

    def _told(self, news: News) -> bytes:
        out = b""
        for index, chunk in news:
            out += self._events.news(index, chunk)
        if not self._generation.unfinished:
            self.done = True
            out += self._events.end(self._generation.timings)
        return out


def _settle(awaited: asyncio.Future[None]) -> None:
    if not awaited.done():
        awaited.set_result(None)


def _merge(chunks: list[Chunk]) -> Chunk:
    last = chunks[-1]
    if len(chunks) == 1:
        return last
    ids = tuple(t for c in chunks for t in c.token_ids)
    logprobs = tuple(p for c in chunks for p in c.logprobs)
    return last._replace(text="".join(c.text for c in chunks), token_ids=ids, logprobs=logprobs)


@dataclass(slots=True)
class Result:
    """One answer to one prompt, added up from its chunks.  `logprobs` is None where none were asked for, `reply` where the
    text is the whole answer."""

    text: str = ""
    reply: Reply | None = None
    logprobs: list[TokenLogprob] | None = None
    finish: Finish = Finish.NONE
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0  # of these, the thought's (see reasoning.py); known when it has ended
    last: int = -1  # its latest token

    def add(self, chunk: Chunk) -> None:
        """Count a chunk.  Its text and log probabilities are the caller's: a stream has sent them and need not keep them."""
        self.completion_tokens += len(chunk.token_ids)
        self.prompt_tokens = chunk.prompt_tokens
        self.cached_tokens = chunk.cached_tokens
        self.reasoning_tokens = chunk.thought_tokens
        self.finish = chunk.finish
        if chunk.token_ids:
            self.last = chunk.token_ids[-1]
