"""What the server does, whatever the transport: request body in, answer out.  Used by HTTP and by the batch socket.

Runs in the api process, on the thread of its event loop.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minisgl import __version__, grammar
from minisgl.api.answers import DONE, EventStream, Head, Result, chat_body, completion_body, error_event, usage
from minisgl.api.http import check_unknown
from minisgl.api.openai import ChatRequest, CompletionRequest, GenerationRequest, parse_chat, parse_completion, unknown_model
from minisgl.api.replies import Reply
from minisgl.api.requests import Chunk, Engine, Prompt
from minisgl.api.stream import Events, Generation, StreamedAnswer, whole
from minisgl.config import Config
from minisgl.errors import InvalidParam, RequestError
from minisgl.types import MAX_SEED, SamplingParams

_STARTED = int(time.time())  # reported as the creation time of the models


async def chat(engine: Engine, body: Mapping[str, Any]) -> dict[str, Any]:
    """POST /v1/chat/completions without a stream.  Raises RequestError."""
    return await answer(engine, _whole(engine, chat_request(engine, body)))


async def completion(engine: Engine, body: Mapping[str, Any]) -> dict[str, Any]:
    """POST /v1/completions without a stream.  Raises RequestError."""
    return await answer(engine, _whole(engine, completion_request(engine, body)))


def chat_request(engine: Engine, body: Mapping[str, Any]) -> ChatRequest:
    """The body of POST /v1/chat/completions, for the model that is served.  Raises RequestError."""
    config, server = engine.config, engine.config.server
    styles = (server.tool_call_parser, server.reasoning_parser)
    return parse_chat(body, served_names(config), config.sampling_defaults, *styles)


def completion_request(engine: Engine, body: Mapping[str, Any]) -> CompletionRequest:
    """The body of POST /v1/completions, likewise."""
    return parse_completion(body, served_names(engine.config), engine.config.sampling_defaults)


def _whole(engine: Engine, request: GenerationRequest) -> GenerationRequest:
    check_unknown(engine.config, request.ignored)
    refuse_stream(request.stream)
    return request


def refuse_stream(stream: bool) -> None:
    """Raises InvalidParam where no stream can be had."""
    if stream:
        raise InvalidParam("stream", "stream must be false here: the answer is sent in one piece.", "unsupported_value")


async def answer(engine: Engine, request: GenerationRequest) -> dict[str, Any]:
    """The body of the answer to a chat or a completion.  Raises RequestError."""
    results, head = await generate(engine, request), _head(request)
    for result in results if request.form else ():
        result.reply = Reply(request.form)
        result.reply.feed(result.text)
        result.reply.end()
    if isinstance(request, ChatRequest):
        return chat_body(head, results)
    return completion_body(head, results, request.n, request.params.logprobs or 0)


async def generate(engine: Engine, request: GenerationRequest) -> list[Result]:
    """The answers to all choices.  Raises RequestError; cancelling the caller cancels the request."""
    check_size(engine, request)
    await _check_grammar(request)
    prompts, params = _choices(request)
    results = []
    for chunk in await whole(engine, prompts, params, request.options):
        result = Result(chunk.text, logprobs=None if request.params.logprobs is None else list(chunk.logprobs))
        result.add(chunk)
        results.append(result)
    return results


async def stream(engine: Engine, request: GenerationRequest, events: Events) -> StreamedAnswer:
    """Begin a streamed answer.  Raises RequestError."""
    check_size(engine, request)
    await _check_grammar(request)
    prompts, params = _choices(request)
    return StreamedAnswer(Generation(engine, prompts, params, request.options), events)


class OpenAIEvents:
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

    def end(self) -> bytes:
        return (self._render.usage(self._results) if self._usage.last else b"") + DONE

    def failed(self, error: RequestError) -> bytes:
        return error_event(error) + DONE


def _taken_apart(render: EventStream, index: int, reply: Reply, chunk: Chunk) -> bytes:
    """The events of a chunk of an answer that has thoughts or calls of tools."""
    parts = reply.feed(chunk.text)
    if not chunk.finish:
        return render.parts(index, parts, chunk.logprobs)
    parts += reply.end()
    return render.parts(index, parts, chunk.logprobs) + render.close(index, reply.reason(chunk.finish))


def check_size(engine: Engine, request: GenerationRequest) -> None:
    """More prompts than the server ever admits would be told to try again, for ever."""
    limit = engine.config.server.max_open_requests
    if len(request.prompts) > limit:
        raise InvalidParam("prompt", f"prompt holds {len(request.prompts)} prompts; this server admits {limit} at a time.")
    if (choices := len(request.prompts) * request.n) > limit:
        raise InvalidParam("n", f"n asks for {choices} answers in all; this server admits {limit} requests at a time.")


async def _check_grammar(request: GenerationRequest) -> None:
    """Beside the event loop: reading a large grammar takes a while.  Raises InvalidParam."""
    if request.params.grammar:
        await asyncio.to_thread(grammar.check, request.params.grammar, request.bound_by)


def _choices(request: GenerationRequest) -> tuple[list[Prompt], list[SamplingParams]]:
    """The prompt and the parameters of every choice.  The n answers to a prompt have n seeds, the first the one given."""
    p, n = request.params, request.n
    each = [p] * n if p.seed is None else [replace(p, seed=_next_seed(p.seed, i)) for i in range(n)]
    return [prompt for prompt in request.prompts for _ in range(n)], each * len(request.prompts)


def _next_seed(seed: int, i: int) -> int:
    """The i-th seed after `seed`, from the largest on to the smallest."""
    return (seed + i + MAX_SEED) % (2 * MAX_SEED + 1) - MAX_SEED


def _head(request: GenerationRequest) -> Head:
    kind = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
    return Head(f"{kind}-{uuid.uuid4().hex}", int(time.time()), request.model)


# ---------------- about the server
def served_names(config: Config) -> tuple[str, ...]:
    """The values of `model` that are accepted; answers report the first."""
    names = config.server.served_names or (config.model.name,)
    return AnyName(names) if config.server.any_model_name else names


class AnyName(tuple[str, ...]):
    """Names that have every other among them (--any-model-name)."""

    __slots__ = ()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str)


def list_models(config: Config) -> dict[str, Any]:
    """GET /v1/models."""
    return {"object": "list", "data": [_model(config, name) for name in served_names(config)]}


def retrieve_model(config: Config, name: str) -> dict[str, Any]:
    """GET /v1/models/{name}.  Raises RequestError (404)."""
    if name not in served_names(config):
        raise unknown_model(name, served_names(config))
    return _model(config, name)


def _model(config: Config, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "minisgl",
        "root": config.model.name,
        "max_model_len": config.max_context,
    }


def server_info(engine: Engine) -> dict[str, Any]:
    """GET /server_info, without what only the transport knows."""
    config = engine.config
    return {
        "version": __version__,
        "state": engine.state,
        "model": served_names(config)[0],
        "served_names": list(served_names(config)),
        "max_context": config.max_context,
        "tp": config.engine.tp,
        "dtype": config.engine.dtype,
        "page_size": config.engine.page_size,
        "eos_ids": list(config.model.eos_ids),
        "sampling_defaults": config.sampling_defaults,
        "open_requests": engine.open_requests,
        "stats": engine.stats,
    }
