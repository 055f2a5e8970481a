"""What the server does, whatever the transport: request body in, answer out.  Used by HTTP and by the batch socket.

Runs in the api process, on the thread of its event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from minisgl import __version__, grammar
from minisgl.api.answers import DONE, EventStream, Head, Result, chat_body, completion_body, error_event
from minisgl.api.openai import ChatRequest, CompletionRequest, GenerationRequest, parse_chat, parse_completion, unknown_model
from minisgl.api.replies import Reply
from minisgl.api.requests import Chunk, Engine, Prompt
from minisgl.api.stream import Generation, News, generate_all
from minisgl.config import Config
from minisgl.errors import InvalidParam, RequestError
from minisgl.types import MAX_SEED, SamplingParams

log = logging.getLogger("minisgl.api")
_STARTED = int(time.time())  # reported as the creation time of the models


async def chat(engine: Engine, body: Mapping[str, Any]) -> dict[str, Any]:
    """POST /v1/chat/completions without a stream.  Raises RequestError."""
    return await answer(engine, _whole(chat_request(engine, body)))


async def completion(engine: Engine, body: Mapping[str, Any]) -> dict[str, Any]:
    """POST /v1/completions without a stream.  Raises RequestError."""
    return await answer(engine, _whole(completion_request(engine, body)))


ENDPOINTS: Mapping[str, Callable[[Engine, Mapping[str, Any]], Awaitable[dict[str, Any]]]] = {
    "/v1/chat/completions": chat,
    "/v1/completions": completion,
}


def chat_request(engine: Engine, body: Mapping[str, Any]) -> ChatRequest:
    """The body of POST /v1/chat/completions, for the model that is served.  Raises RequestError."""
    config, server = engine.config, engine.config.server
    styles = (server.tool_call_parser, server.reasoning_parser)
    return parse_chat(body, served_names(config), config.sampling_defaults, *styles)


def completion_request(engine: Engine, body: Mapping[str, Any]) -> CompletionRequest:
    """The body of POST /v1/completions, likewise."""
    return parse_completion(body, served_names(engine.config), engine.config.sampling_defaults)


def _whole(request: ChatRequest | CompletionRequest) -> ChatRequest | CompletionRequest:
    if request.stream:
        raise InvalidParam("stream", "stream must be false here: the answer is sent in one piece.", "unsupported_value")
    return request


async def answer(engine: Engine, request: GenerationRequest) -> dict[str, Any]:
    """Generate to the end.  Raises RequestError; cancelling the caller cancels the request."""
    _check_size(engine, request)
    await _check_grammar(request)
    prompts, params = _choices(request)
    wanted = request.params.logprobs
    results = [Result(logprobs=None if wanted is None else []) for _ in prompts]
    texts: list[list[str]] = [[] for _ in prompts]
    async with aclosing(generate_all(engine, prompts, params, request.options)) as stream:
        async for news in stream:
            for i, chunk in news:
                results[i].add(chunk)
                texts[i].append(chunk.text)
                if (told := results[i].logprobs) is not None:
                    told.extend(chunk.logprobs)
    for result, parts in zip(results, texts, strict=True):
        result.text = "".join(parts)
        if request.form:
            result.reply = Reply(request.form)
            result.reply.feed(result.text)
            result.reply.end()
    head = _head(request)
    if isinstance(request, ChatRequest):
        return chat_body(head, results)
    return completion_body(head, results, request.n, wanted or 0)


async def stream(engine: Engine, request: GenerationRequest) -> StreamedAnswer:
    """Begin a streamed answer.  Raises RequestError."""
    _check_size(engine, request)
    await _check_grammar(request)
    return StreamedAnswer(engine, request)


class StreamedAnswer:
    """The server-sent events of a streamed answer, as bytes to be written in one piece each.

    Open the requests on construction; `close` must be called, and cancels what is not finished.  Up to the first piece a
    failure is raised, so that it can still become an HTTP status; later ones are told inside the stream.
    """

    def __init__(self, engine: Engine, request: GenerationRequest) -> None:
        """Raises RequestError."""
        prompts, params = _choices(request)
        self.done = False  # everything has been told
        self._usage = request.include_usage
        self._results = [Result() for _ in prompts]
        self._replies = [Reply(request.form) for _ in prompts] if request.form else []
        self._render = EventStream(
            _head(request),
            chat=isinstance(request, ChatRequest),
            include_usage=request.include_usage,
            choices=len(prompts),
            n=request.n,
            wanted=request.params.logprobs,
        )
        self._generation = Generation(engine, prompts, params, request.options)
        self.listen, self.close = self._generation.listen, self._generation.close

    async def first(self) -> bytes:
        """What comes first, waiting for it.  Raises RequestError."""
        head = self._render.start()
        while True:
            piece = self._events(await self._generation.take())
            if head or piece:
                return head + piece

    def more(self) -> bytes:
        """What there is to be told now, perhaps nothing: `listen` says when there is more."""
        try:
            return self._events(self._generation.take_now())
        except RequestError as e:
            error = e
        except Exception:
            log.exception("a stream failed")
            error = internal_error()
        self.done = True
        return error_event(error) + DONE

    def _events(self, news: News) -> bytes:
        render, out = self._render, b""
        for i, chunk in news:
            self._results[i].add(chunk)
            if self._replies:
                out += _taken_apart(render, i, self._replies[i], chunk)
            elif chunk.finish:
                out += render.finish(i, chunk.text, chunk.finish, chunk.logprobs)
            else:
                out += render.text(i, chunk.text, chunk.logprobs)
        if not self._generation.unfinished:
            self.done = True
            return out + (render.usage(self._results) if self._usage else b"") + DONE
        return out


def _taken_apart(render: EventStream, index: int, reply: Reply, chunk: Chunk) -> bytes:
    """The events of a chunk of an answer that has thoughts or calls of tools."""
    deltas = reply.feed(chunk.text)
    if not chunk.finish:
        return render.deltas(index, deltas, chunk.logprobs)
    deltas += reply.end()
    return render.deltas(index, deltas, chunk.logprobs) + render.close(index, reply.reason(chunk.finish))


def internal_error() -> RequestError:
    """What a client is told of a bug: nothing but that it happened."""
    text = "The server failed while it handled this request; its log says why."
    return RequestError(text, status=500, kind="server_error", code="internal_error")


def _check_size(engine: Engine, request: GenerationRequest) -> None:
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
    return config.server.served_names or (config.model.name,)


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
