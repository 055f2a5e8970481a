"""POST /v1/chat/completions and /v1/completions: checked bodies in, OpenAI's answers out.  Runs in the api process."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from minisgl.api.endpoints.openai_answers import DONE, EventStream, Head, chat_body, completion_body, error_event, usage
from minisgl.api.engine import Chunk, Engine
from minisgl.api.generation import Result, StreamedAnswer, Timings
from minisgl.api.parsers.reply import Reply
from minisgl.api.requests import generate
from minisgl.api.requests.openai import ChatRequest, CompletionRequest, GenerationRequest, parse_completion
from minisgl.errors import RequestError


def parse_completions(engine: Engine, body: Mapping[str, Any]) -> CompletionRequest:
    """Check the body of POST /v1/completions, for the model that is served.  Raises RequestError."""
    return parse_completion(body, generate.served_names(engine.config), engine.config.sampling_defaults)


async def answer(engine: Engine, request: GenerationRequest) -> dict[str, Any]:
    """The answer without a stream.  Raises RequestError."""
    results, timings = await generate.generate(engine, request)
    for result in results if request.form else ():
        result.reply = Reply(request.form)
        result.reply.feed(result.text)
        result.reply.end()
    head = _head(request)
    if isinstance(request, ChatRequest):
        return chat_body(head, results, timings)
    return completion_body(head, results, request.n, request.params.logprobs or 0, timings)


async def stream(engine: Engine, request: GenerationRequest) -> StreamedAnswer:
    """The streamed answer.  Raises RequestError."""
    return await generate.begin(engine, request, _Events(request))


class _Events:
    """The Events of the two endpoints, of a checked request."""

    def __init__(self, request: GenerationRequest) -> None:
        choices = len(request.prompts) * request.n
        self._usage = request.usage
        self._results = [Result() for _ in range(choices)]
        self._replies = [Reply(request.form) for _ in range(choices)] if request.form else []
        self._render = EventStream(
            _head(request),
            chat=isinstance(request, ChatRequest),
            include_usage=request.usage.last,
            choices=choices,
            n=request.n,
            wanted=request.params.logprobs,
        )

    def start(self) -> bytes:
        return self._render.start()

    def news(self, index: int, chunk: Chunk) -> bytes:
        result = self._results[index]
        result.add(chunk)
        if self._usage.so_far:
            self._render.count(usage([result]))
        if self._replies:
            return _taken_apart(self._render, index, self._replies[index], chunk)
        if chunk.finish:
            return self._render.finish(index, chunk.text, chunk.finish, chunk.logprobs)
        return self._render.text(index, chunk.text, chunk.logprobs)

    def end(self, timings: Timings) -> bytes:
        return (self._render.usage(self._results, timings) if self._usage.last else b"") + DONE

    def failed(self, error: RequestError) -> bytes:
        return error_event(error) + DONE


def _taken_apart(render: EventStream, index: int, reply: Reply, chunk: Chunk) -> bytes:
    """The events of a chunk of an answer that has thoughts or calls of tools."""
    parts = reply.feed(chunk.text)
    if not chunk.finish:
        return render.parts(index, parts, chunk.logprobs)
    parts += reply.end()
    return render.parts(index, parts, chunk.logprobs) + render.close(index, reply.reason(chunk.finish))


def _head(request: GenerationRequest) -> Head:
    kind = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
    return Head(f"{kind}-{uuid.uuid4().hex}", int(time.time()), request.model)
