"""Starts the generation of a checked request, and reports the models and the state of the server.

Runs in the api process, on the thread of its event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from minisgl.api.engine import Chunk, Engine, Prompt
from minisgl.api.events import Events
from minisgl.api.generation import Generation, StreamedAnswer, answered
from minisgl.api.requests.openai import GenerationRequest, check_model, served_names
from minisgl.api.usage import Timings
from minisgl.config import Config
from minisgl.errors import InvalidParam, RequestError
from minisgl.sampling_params import MAX_SEED, SamplingParams
from minisgl.version import __version__

T = TypeVar("T")
MAX_ENTRIES = 400_000  # tokens of all answers to a request, each with its log probability and those of its alternatives
_STARTED = int(time.time())  # reported as the creation time of the models


async def generate(engine: Engine, request: GenerationRequest, render: Callable[[list[Chunk], Timings], Awaitable[T]]) -> T:
    """The answers to all choices, one chunk for each, as `render` makes them.

    Raises RequestError; cancelling the caller cancels the request.
    """
    _check_size(engine, request)
    request = await _with_grammar(engine, request)
    return await answered(engine, *_choices(request), request.options, render)


async def begin(engine: Engine, request: GenerationRequest, events: Events) -> StreamedAnswer:
    """Begin a streamed answer.  Raises RequestError."""
    _check_size(engine, request)
    request = await _with_grammar(engine, request)
    return StreamedAnswer(Generation(engine, *_choices(request), request.options), events)


def _check_size(engine: Engine, request: GenerationRequest) -> None:
    """Refuse more answers than one call may ask for, and more than the server ever admits.  Raises InvalidParam."""
    server, prompts = engine.config.server, len(request.prompts)
    limit = min(server.max_open_requests, server.max_choices)
    if prompts > limit:
        raise InvalidParam("prompt", f"prompt holds {prompts} prompts; this server admits {limit} at a time (--max-choices).")
    if (choices := prompts * request.n) > limit:
        text = f"n times the prompts in prompt ({request.n} x {prompts}) asks for {choices} answers"
        raise InvalidParam("n", f"{text}; this server admits {limit} at a time (--max-choices): send several requests.")
    _check_entries(request, choices)


def _check_entries(request: GenerationRequest, choices: int) -> None:
    """Refuse an answer that could only be kept and rendered at the cost of everybody else.  Raises InvalidParam."""
    p = request.params
    each = 1 if p.logprobs is None else 1 + p.logprobs
    if p.max_tokens is None or (total := choices * p.max_tokens * each) <= MAX_ENTRIES:
        return
    names = "n, max_tokens and the number of log probabilities" if p.logprobs is not None else "n and max_tokens"
    text = (
        f"{names} ask for {total} tokens and alternatives in all ({choices} answers of {p.max_tokens} tokens"
        f"{f' with {each} log probabilities each' if p.logprobs is not None else ''}); one request may have {MAX_ENTRIES}."
    )
    raise InvalidParam("n" if choices > 1 else "max_tokens", text)


async def _with_grammar(engine: Engine, request: GenerationRequest) -> GenerationRequest:
    """The request with its grammar as it is served, once it has been tried out.  Raises InvalidParam."""
    if not (text := request.params.grammar):
        return request
    checked: str = await ask(
        engine, lambda on_grammar: engine.check_grammar(text, request.bound_by, on_grammar, request.options)
    )
    return request if checked == text else replace(request, params=replace(request.params, grammar=checked))


async def ask(engine: Engine, start: Callable[[Callable[[T | RequestError], None]], int]) -> T:
    """One answer of the engine to a question that is no generation; `start` asks it.  Raises RequestError."""
    future: asyncio.Future[T | RequestError] = asyncio.get_running_loop().create_future()
    uid = start(lambda answer: None if future.done() else future.set_result(answer))
    try:
        answer = await future
    finally:
        engine.close(uid)
    if isinstance(answer, RequestError):
        raise answer
    return answer


def _choices(request: GenerationRequest) -> tuple[list[Prompt], list[SamplingParams]]:
    """The prompt and the parameters of every choice.  The n answers to a prompt have n seeds, beginning with the request's."""
    p, n = request.params, request.n
    each = [p] * n if p.seed is None else [replace(p, seed=_next_seed(p.seed, i)) for i in range(n)]
    return [prompt for prompt in request.prompts for _ in range(n)], each * len(request.prompts)


def _next_seed(seed: int, i: int) -> int:
    """The i-th seed after `seed`; the smallest follows the largest."""
    return (seed + i + MAX_SEED) % (2 * MAX_SEED + 1) - MAX_SEED


# ---------------- about the server
def list_models(config: Config, anthropic: bool = False) -> dict[str, Any]:
    """GET /v1/models, for a client of OpenAI's API or of Anthropic's.  There is only one page."""
    names = served_names(config)
    models = [_model(config, name, anthropic) for name in names]
    if anthropic:
        return {"data": models, "has_more": False, "first_id": names[0], "last_id": names[-1]}
    return {"object": "list", "data": models}


def retrieve_model(config: Config, name: str, anthropic: bool = False) -> dict[str, Any]:
    """GET /v1/models/{name}.  Raises RequestError (404)."""
    check_model(config, name)
    return _model(config, name, anthropic)


def _model(config: Config, name: str, anthropic: bool) -> dict[str, Any]:
    if anthropic:
        return {
            "type": "model",
            "id": name,
            "display_name": name,
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(_STARTED)),
            "lifecycle": "active",
            "max_input_tokens": config.max_context,
            "max_tokens": config.max_context,
        }
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "minisgl",
        "root": config.model.name,
        "max_model_len": config.max_context,
    }


def server_info(engine: Engine) -> dict[str, Any]:
    """GET /server_info, without the fields that only the HTTP server knows."""
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
