"""Serves POST /v1/chat/completions/render and /v1/completions/render: the tokens that a request has, without an answer.

Routers ask for them to find the replica with the longest cached prefix.  The shape is vLLM's GenerateRequest: one for a chat, a
list with one for each prompt of a completion.  Runs in the api process.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from minisgl.api.endpoints.tokenize import check_chars, ids_of
from minisgl.api.engine import Engine
from minisgl.api.rendering import SLICE, Turns, rendered_list, rendered_numbers
from minisgl.api.requests.openai import ChatRequest, CompletionRequest, GenerationRequest
from minisgl.sampling_params import SamplingParams

_PARAMS = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "seed", "stop", "ignore_eos", "logprobs")
_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


async def render_chat(engine: Engine, request: ChatRequest) -> Mapping[str, Any]:
    """The tokens of a chat.  Raises RequestError."""
    return (await _rendered(engine, request, Turns()))[0]


async def render_completion(engine: Engine, request: CompletionRequest) -> Any:
    """The tokens of every prompt of a completion.  Raises RequestError."""
    turns = Turns()
    return await rendered_list(await _rendered(engine, request, turns), turns, 1)


async def _rendered(engine: Engine, request: GenerationRequest, turns: Turns) -> list[dict[str, Any]]:
    check_chars(engine.config, request.prompts)
    found = []
    for prompt in request.prompts:
        ids = await ids_of(engine, prompt)
        tokens = await rendered_numbers(ids, turns) if len(ids) > SLICE else ids
        more = {"sampling_params": _named(request.params, request.n), "model": request.model, "stream": request.stream}
        more |= {"priority": request.options.priority}
        found.append({"request_id": f"render-{secrets.token_hex(12)}", "token_ids": tokens, **more})
    return found


def _named(params: SamplingParams, n: int) -> dict[str, Any]:
    """Sampling parameters by vLLM's names, which are ours."""
    return {"n": n, **{name: getattr(params, name) for name in (*_PARAMS, *_PENALTIES)}}
