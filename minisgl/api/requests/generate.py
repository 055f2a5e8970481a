"""Starts the generation of a checked request, and reports the models and the state of the server.

Runs in the api process, on the thread of its event loop.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

from minisgl import grammar
from minisgl.api.engine import Chunk, Engine, Prompt
from minisgl.api.generation import Events, Generation, StreamedAnswer, Timings, complete
from minisgl.api.requests.openai import GenerationRequest, check_model, served_names
from minisgl.config import Config
from minisgl.errors import InvalidParam
from minisgl.sampling_params import MAX_SEED, SamplingParams
from minisgl.version import __version__

_STARTED = int(time.time())  # reported as the creation time of the models


async def generate(engine: Engine, request: GenerationRequest) -> tuple[list[Chunk], Timings]:
    """The answers to all choices, one chunk for each.  Raises RequestError; cancelling the caller cancels the request."""
    _check_size(engine, request)
    await _check_grammar(request)
    return await complete(engine, *_choices(request), request.options)


async def begin(engine: Engine, request: GenerationRequest, events: Events) -> StreamedAnswer:
    """Begin a streamed answer.  Raises RequestError."""
    _check_size(engine, request)
    await _check_grammar(request)
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


async def _check_grammar(request: GenerationRequest) -> None:
    """Check the grammar in a thread, because a large one would block the event loop.  Raises InvalidParam."""
    if request.params.grammar:
        await asyncio.to_thread(grammar.check, request.params.grammar, request.bound_by)


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
