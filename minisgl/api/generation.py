"""Carries chunks from the engine's callbacks to asyncio; chunks that arrive while their consumer is busy are merged into one.

Runs in the api process, on the thread of its event loop.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from minisgl.api.cache_reasons import CacheExplanation
from minisgl.api.engine import Chunk, Engine, Prompt
from minisgl.api.rendering import UNITS, Turns, entries
from minisgl.errors import RequestError, internal_error
from minisgl.sampling_params import DEFAULT_OPTIONS, Finish, RequestOptions, SamplingParams

log = logging.getLogger("minisgl.api")
NewChunks = list[tuple[int, Chunk]]  # (index of the prompt, its merged chunks)
_AT_ONCE = 32  # prompts that are opened in one turn of the event loop
_MERGED = 64  # chunks of a prompt that become one while they wait
MAX_KEPT_BYTES = 72 << 20  # of all answers that wait in this process until they are complete, or until their clients read on
_TOKEN_BYTES, _ENTRY_BYTES = 64, 160  # of a token that waits, and of a log probability


@dataclass(frozen=True, slots=True)
class Timings:
    """Durations of a generation in seconds: `first` until the first chunk of any prompt, `rest` from there to the last chunk.

    `queued`: the part of `first` in which that prompt waited for its first step (see Chunk).  The remainder of `first` is the
    prefill, with a little for tokenizing and for the ways between the processes.
    """

    first: float
    rest: float
    queued: float = 0.0

    def render(self, results: Sequence[Result], n: int = 1) -> dict[str, Any]:
        """The `timings` object: milliseconds, the rate of the tokens after the first, and the cached tokens of the prompts.

        `n`: choices per prompt.
        """
        tokens = sum(r.completion_tokens for r in results)
        return {
            "queue_ms": round(1000 * self.queued, 3),
            "ttft_ms": round(1000 * self.first, 3),
            "decode_ms": round(1000 * self.rest, 3),
            "total_ms": round(1000 * (self.first + self.rest), 3),
            "tok_s": round((tokens - 1) / self.rest, 3) if self.rest > 0 and tokens > 1 else None,
            "cached_n": sum(r.cached_tokens for r in results[::n]),
        }


@dataclass(slots=True)
class Result:
    """The counts of one answer to one prompt, accumulated from its chunks."""

    finish: Finish = Finish.NONE
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0  # completion tokens that belong to the thought (see parsers/outline.py), known when it has ended
    last: int = -1  # the latest token
    explanation: CacheExplanation | None = None  # of the cache, known at the end if it was asked for

    def add(self, chunk: Chunk) -> None:
        _, ids, self.finish, self.prompt_tokens, self.cached_tokens, _, _, _, self.reasoning_tokens, _, explanation = chunk
        self.completion_tokens += len(ids)
        if ids:
            self.last = ids[-1]
        if explanation is not None:
            self.explanation = explanation


def explained(results: Sequence[Result], n: int = 1) -> dict[str, Any]:
    """`cache_explanation`, if it was asked for: of the first choice of the prompt; of several prompts, an array of these.

    `n`: choices per prompt.
    """
    found = [r.explanation.render() for r in results[::n] if r.explanation is not None]
    return {"cache_explanation": found[0] if len(results) == n else found} if found else {}


class Generation:
    """Several prompts that are continued at the same time, from `engine.open` to `close`, which must be called.

    The first ones are opened at once, the others as soon as somebody waits for an answer, turn by turn.

    Chunks wait here until they are taken: at most the completions of one request, so bounded by its `max_tokens`.  What waits
    in all generations together is bounded by MAX_KEPT_BYTES: the one that goes beyond it fails.
    `params`: for all prompts, or one for each.  Raises RequestError if one of them is refused.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> None:
        self.unfinished = len(prompts)  # prompts whose last chunk has not been taken
        self._engine = engine
        self._chunks: dict[int, list[Chunk]] = {}  # that nobody has taken, by the index of the prompt
        self._merged: dict[int, list[Chunk]] = {}  # and before those, where many wait: every _MERGED in one
        self._kept, self.all_kept = 0, engine.kept  # bytes of both, and of those of all generations
        self.taken = 0  # bytes of what was taken last
        self._overflown = False
        self._error: RequestError | None = None
        self._hurried = False  # `take` does not wait
        self._wake: Callable[[], object] | None = None
        self._growing = len(prompts)  # prompts whose last chunk has not arrived
        self._began, self._first, self._ended = time.monotonic(), 0.0, 0.0
        self._queued = 0.0  # of the prompt with the first chunk
        self._uids: list[int] = []
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        self._options = options
        self._unopened = deque(enumerate(zip(prompts, each, strict=True)))
        try:
            self._open_some()
        except BaseException:
            self.close()
            raise

    def _open_some(self) -> None:
        """Open as many prompts as a turn has time for.  Raises RequestError if one is refused."""
        for _ in range(min(_AT_ONCE, len(self._unopened))):
            i, (prompt, params) = self._unopened.popleft()
            self._uids.append(self._engine.open(prompt, params, functools.partial(self._on_chunk, i), self._options))

    def close(self) -> None:
        """Cancel the prompts that are not finished."""
        self._wake = None
        self._unopened.clear()
        for uid in self._uids:
            self._engine.close(uid)
        self._forget_size()

    def _forget_size(self) -> None:
        """What waits here, or waited until now, counts no longer."""
        self.all_kept.bytes -= self._kept
        self._kept = 0

    def _on_chunk(self, index: int, item: Chunk | RequestError) -> None:
        if isinstance(item, RequestError):
            self._error = self._error or item
        elif item.finish and item.finish is Finish.ABORT:
            # A request is aborted when its client has left, so nothing listens; a listener that remains gets an error.
            self._error = RequestError("The request was aborted.", status=500, code="aborted")
        else:
            self._add(index, item)
            if not self._first:
                self._first, self._queued = time.monotonic(), item.queued
            if item.finish:
                self._growing -= 1
                self._ended = time.monotonic()
        if self._wake is not None:
            wake, self._wake = self._wake, None
            wake()

    def _add(self, index: int, chunk: Chunk) -> None:
        if self._overflown:
            return
        self._kept += (size := _size(chunk))
        self.all_kept.bytes += size
        if self.all_kept.bytes > MAX_KEPT_BYTES:
            text = "The server keeps more unfinished answers than it has memory for; ask for fewer log probabilities or tokens."
            self._error = self._error or RequestError(text, status=503, code="server_overloaded", retry_after=5)
            self._overflown = True
            self._chunks, self._merged = {}, {}
            self._forget_size()
            return
        waiting = self._chunks.get(index)
        if waiting is None:
            self._chunks[index] = [chunk]
            return
        waiting.append(chunk)
        if len(waiting) == _MERGED:
            self._merged.setdefault(index, []).append(_merge(waiting))
            waiting.clear()

    def _all_of(self, index: int) -> Chunk:
        """Take what waits of one prompt."""
        return _merge(self._merged.pop(index, []) + self._chunks.pop(index))

    def _parts_of(self, index: int) -> list[Chunk]:
        """Take what waits of one prompt, in chunks of a bounded size."""
        parts, part, work = [], list[Chunk](), 0
        for chunk in self._merged.pop(index, []) + self._chunks.pop(index):
            if part and work + _work(chunk) > UNITS:
                parts.append(_merge(part))
                part, work = [], 0
            part.append(chunk)
            work += _work(chunk)
        return [*parts, _merge(part)] if part else parts

    @property
    def held(self) -> int:
        """Bytes that wait here."""
        return self._kept

    @property
    def accepted(self) -> bool:
        """Whether every prompt has been accepted, see Engine."""
        return not self._unopened and all(map(self._engine.accepted, self._uids))

    @property
    def timings(self) -> Timings:
        """The durations until now."""
        now = time.monotonic()
        first = self._first or now
        return Timings(first - self._began, (now if self._growing else self._ended) - first, self._queued)

    def listen(self, wake: Callable[[], object]) -> None:
        """Have `wake` called once, as soon as there is something to take.  It must not take it before it returns."""
        if self._chunks or self._error is not None:
            wake()
        else:
            self._wake = wake

    def hurry(self) -> None:
        """Have `take`, which waits or will be called, return with nothing."""
        self._hurried = True
        if self._wake is not None:
            wake, self._wake = self._wake, None
            wake()

    async def take(self) -> NewChunks:
        """Wait for chunks and take them, see `take_now`; `hurry` ends the waiting."""
        await self._arrival(until_end=False)
        return self.take_now()

    async def end(self) -> None:
        """Wait for the last chunk of every prompt, or for a failure, which is raised at once.

        The task does not wake up in between.
        """
        await self._arrival(until_end=True)
        if self._error is not None:
            raise self._error

    async def _arrival(self, *, until_end: bool) -> None:
        while self._unopened:
            await asyncio.sleep(0)
            self._open_some()
        arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def look() -> None:
            if self._error is None and self._growing and (until_end or not (self._chunks or self._hurried)):
                self._wake = look
            elif not arrived.done():
                arrived.set_result(None)

        look()
        await arrived

    def take_now(self) -> NewChunks:
        """The chunks since the last call, merged into as few as a turn has time for each.

        The error of a request is raised after the chunks that came before it.
        """
        if not self._chunks and self._error is not None:
            raise self._error
        self.taken = self._kept
        self._forget_size()
        if self._merged:
            chunks = [(index, part) for index in list(self._chunks) for part in self._parts_of(index)]
        else:
            chunks = [(index, _merge(new)) for index, new in self._chunks.items()]
            self._chunks = {}
        for _, chunk in chunks:
            if chunk.finish:
                self.unfinished -= 1
        return chunks

    async def take_one_by_one(self) -> list[Chunk]:
        """The complete answers in the order of their prompts, merged over several turns.  They stay counted until `close`."""
        turns, out = Turns(), []
        for index in sorted(self._chunks):
            out.append(self._all_of(index))
            await turns.spend(20 + len(out[-1].token_ids) // 8)
        return out


T = TypeVar("T")


async def complete(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams],
    options: RequestOptions = DEFAULT_OPTIONS,
) -> tuple[list[Chunk], Timings]:
    """Continue several prompts to their ends; returns one chunk for each, in their order.

    Raises RequestError, and closes the others, if one of them fails; cancelling the caller closes all of them.
    """

    async def both(chunks: list[Chunk], timings: Timings) -> tuple[list[Chunk], Timings]:
        return chunks, timings

    return await answered(engine, prompts, params, options, both)


async def answered(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams],
    options: RequestOptions,
    render: Callable[[list[Chunk], Timings], Awaitable[T]],
) -> T:
    """Continue several prompts to their ends, and `render` them, while they are still counted among what waits.

    Raises RequestError, and closes the others, if one of them fails; cancelling the caller closes all of them.
    """
    generation = Generation(engine, prompts, params, options)
    try:
        await generation.end()
        return await render(await generation.take_one_by_one(), generation.timings)
    finally:
        generation.close()


Pieces = Iterator[bytes | None]  # of events; None: enough work is done for one turn of the event loop


class Events(Protocol):
    """Renders an answer as server-sent events.  Every method returns complete events, perhaps none.

    `alive`: what shows during a silence that the stream is alive.
    """

    alive: bytes

    def start(self) -> bytes:
        """The events before the first chunk."""

    def adding(self, index: int, chunk: Chunk) -> Pieces:
        """The events of a chunk of the answer with this index, in pieces."""

    def ending(self, timings: Timings) -> Pieces:
        """The events after the last chunk of every answer, in pieces."""

    def failed(self, error: RequestError) -> bytes:
        """The events of a failure, instead of `end`."""


class SmallEvents(ABC):
    """Events that do not repeat what they have said: each is rendered in one turn."""

    @abstractmethod
    def add(self, index: int, chunk: Chunk) -> bytes:
        """The events of a chunk of the answer with this index."""

    @abstractmethod
    def end(self, timings: Timings) -> bytes:
        """The events after the last chunk of every answer."""

    def adding(self, index: int, chunk: Chunk) -> Pieces:
        yield self.add(index, chunk)

    def ending(self, timings: Timings) -> Pieces:
        yield self.end(timings)


class StreamedAnswer:
    """A generation rendered as events.  `close` must be called, and cancels what is not finished.

    A failure before the first bytes is raised, so that it can become an HTTP status; later ones are part of the stream.
    """

    def __init__(self, generation: Generation, events: Events) -> None:
        self.done = False  # all events have been rendered
        self.error: RequestError | None = None  # that has ended them
        self.alive = events.alive
        self._generation = generation
        self._events = events
        self._add = events.add if isinstance(events, SmallEvents) else None
        self._pieces: Pieces | None = None  # what is not rendered of the chunks that were taken
        self._held = 0  # bytes of those chunks, which stay counted
        self.hurry = generation.hurry

    def close(self) -> None:
        """Cancel what is not finished, and forget what is not rendered."""
        self._hold(0)
        self._generation.close()

    def _hold(self, size: int) -> None:
        self._generation.all_kept.bytes += size - self._held
        self._held = size

    @property
    def held(self) -> int:
        """Bytes that wait here and in the generation."""
        return self._held + self._generation.held

    def listen(self, wake: Callable[[], object]) -> None:
        """Have `wake` called once, as soon as there is more.  It must not take it before it returns."""
        if self._pieces is None:
            self._generation.listen(wake)
        else:
            wake()

    @property
    def timings(self) -> Timings:
        """The durations until now."""
        return self._generation.timings

    @property
    def accepted(self) -> bool:
        """Whether every prompt has been accepted, see Engine."""
        return self._generation.accepted

    async def first(self) -> tuple[bytes, bool]:
        """Wait for the first events: (their bytes, whether a chunk is among them).  Raises RequestError.

        `hurry` ends the waiting: then the bytes are what there is without a chunk, or show at least that the stream is alive.
        """
        head, chunks = None, NewChunks()
        while True:
            if self._pieces is None:
                chunks = await self._generation.take()
                self._pieces = self._render(chunks)
                self._hold(self._generation.taken)
            head = self._events.start() if head is None else head
            piece = self._turn(self._pieces)
            if not chunks and not self.done:
                return head or self.alive, False
            if head or piece or self.done:
                return head + piece, True
            await asyncio.sleep(0)

    def more(self) -> bytes:
        """The events since the last call, as many as a turn has time for: `listen` reports when there are more."""
        try:
            if self._pieces is None:
                chunks = self._generation.take_now()
                if self._add is not None and len(chunks) == 1 and self._generation.unfinished:  # nearly always
                    index, chunk = chunks[0]
                    if len(chunk.text) < UNITS and not chunk.logprobs:
                        return self._add(index, chunk)
                self._pieces = self._render(chunks)
                self._hold(self._generation.taken)
            return self._turn(self._pieces)
        except RequestError as e:
            error = e
        except Exception:
            log.exception("a stream failed")
            error = internal_error()
        self.done, self.error = True, error
        return self._events.failed(error)

    def _turn(self, pieces: Pieces) -> bytes:
        """What one turn of the event loop has time for."""
        out: list[bytes] = []
        work = 0
        for piece in pieces:
            if piece is None:
                return b"".join(out)
            out.append(piece)
            work += 5 + len(piece) // 100
            if work >= UNITS:
                return b"".join(out)
        self._pieces = None
        self._hold(0)
        return b"".join(out)

    def _render(self, chunks: NewChunks) -> Pieces:
        for index, chunk in chunks:
            yield from self._events.adding(index, chunk)
            if _work(chunk) > UNITS // 2:
                yield None
        if not self._generation.unfinished:
            yield from self._events.ending(self._generation.timings)
            self.done = True


def _merge(chunks: list[Chunk]) -> Chunk:
    last = chunks[-1]
    if len(chunks) == 1:
        return last
    ids = tuple(t for c in chunks for t in c.token_ids)
    logprobs = tuple(p for c in chunks for p in c.logprobs)
    return last._replace(text="".join(c.text for c in chunks), token_ids=ids, logprobs=logprobs)


def _work(chunk: Chunk) -> int:
    """What it takes to render a chunk, about, in units of rendering.py."""
    return len(chunk.text) // 2 + 4 * sum(map(entries, chunk.logprobs))


def _size(chunk: Chunk) -> int:
    """Bytes of a chunk that waits, about."""
    size = _TOKEN_BYTES * len(chunk.token_ids or ()) + len(chunk.text) + 128
    return size + _ENTRY_BYTES * sum(map(entries, chunk.logprobs)) if chunk.logprobs else size
