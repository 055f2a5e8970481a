"""From the engine's callbacks to asyncio: what a request produced while its consumer was busy arrives in one piece.

Runs in the api process, on the thread of its event loop.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from minisgl.api.requests import Chunk, Engine, Prompt
from minisgl.errors import RequestError
from minisgl.types import DEFAULT_OPTIONS, Finish, RequestOptions, SamplingParams

News = list[tuple[int, Chunk]]  # (index of the prompt, what it has said since)


async def generate(
    engine: Engine, prompt: Prompt, params: SamplingParams, options: RequestOptions = DEFAULT_OPTIONS
) -> AsyncGenerator[Chunk, None]:
    """Continue one prompt.  Ends after the chunk with a `finish`, which is STOP or LENGTH; raises RequestError instead if the
    request fails.  However the consumer leaves, the request is closed, once; use `contextlib.aclosing` to have that at once.
    """
    async with aclosing(generate_all(engine, [prompt], params, options)) as stream:
        async for news in stream:
            for _, chunk in news:
                yield chunk


async def generate_all(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams],
    options: RequestOptions = DEFAULT_OPTIONS,
) -> AsyncGenerator[News, None]:
    """Continue several prompts at the same time.  Each item is all there is to tell, at most one chunk for each prompt.

    `params`: for all of them, or one for each.

    Ends when every prompt has its `finish`; raises RequestError, and closes the others, if one of them fails.
    """
    mailbox = _Mailbox()
    uids: list[int] = []
    try:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        for i, (prompt, p) in enumerate(zip(prompts, each, strict=True)):
            uids.append(engine.open(prompt, p, functools.partial(mailbox.put, i), options))
        unfinished = len(prompts)
        while unfinished:
            news = await mailbox.take()
            unfinished -= sum(bool(chunk.finish) for _, chunk in news)
            yield news
    finally:
        for uid in uids:
            engine.close(uid)


class _Mailbox:
    """Chunks that nobody has taken yet: at most the completions of one request, so bounded by its `max_tokens`."""

    def __init__(self) -> None:
        self._chunks: dict[int, list[Chunk]] = {}
        self._error: RequestError | None = None
        self._awaited: asyncio.Future[None] | None = None

    def put(self, index: int, item: Chunk | RequestError) -> None:
        """The engine's `deliver`: never blocks."""
        if isinstance(item, RequestError):
            self._error = self._error or item
        elif item.finish is Finish.ABORT:
            # Only a client that has left aborts a request, and nobody listens for it; whoever still listens gets an error.
            self._error = RequestError("The request was aborted.", status=500, kind="server_error", code="aborted")
        else:
            self._chunks.setdefault(index, []).append(item)
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)

    async def take(self) -> News:
        """What has arrived, waiting for it if need be.  Raises the request's error after everything that came before it."""
        if not self._chunks and self._error is None:
            self._awaited = asyncio.get_running_loop().create_future()
            await self._awaited
        if not self._chunks and self._error is not None:
            raise self._error
        news = [(index, _merge(chunks)) for index, chunks in self._chunks.items()]
        self._chunks = {}
        return news


def _merge(chunks: list[Chunk]) -> Chunk:
    last = chunks[-1]
    if len(chunks) == 1:
        return last
    ids = tuple(t for c in chunks for t in c.token_ids)
    logprobs = tuple(p for c in chunks for p in c.logprobs)
    return Chunk("".join(c.text for c in chunks), ids, last.finish, last.prompt_tokens, last.cached_tokens, logprobs)
