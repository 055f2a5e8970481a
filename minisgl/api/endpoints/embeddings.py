"""Serves POST /v1/embeddings: pools the final hidden states of each prompt into one vector.  Runs in the api process."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minisgl.api.engine import Engine, Prompt
from minisgl.api.generation import complete
from minisgl.api.rendering import Rendered, Turns, json_pieces
from minisgl.api.requests.chat_prompt import MESSAGES, RENDERING, chat_prompt
from minisgl.api.requests.fields import Fields, anything, boolean, check_integer, integer, refused, string
from minisgl.api.requests.openai import ADD_SPECIAL_TOKENS, HARMLESS, MODEL, TEXTS, served_model, text_prompts
from minisgl.api.requests.sampling import OPTIONS, options
from minisgl.arrays import F32
from minisgl.config import Config
from minisgl.errors import InvalidParam, RequestError
from minisgl.sampling_params import RequestOptions, SamplingParams

EMBEDDINGS = Fields(
    MODEL,
    anything("input", "A text, token ids, or an array of either.", TEXTS),
    MESSAGES,
    *RENDERING,
    string("encoding_format", "How vectors are written.", "float", "base64"),
    anything("dimensions", "Only so many of the vector's numbers.", {"type": "integer", "minimum": 1}),
    string("pooling", "The last token's state, or the mean over all tokens.", "last", "mean"),
    boolean("normalize", "Vectors have length one (default)."),
    ADD_SPECIAL_TOKENS,
    *OPTIONS,
    refused("explain_cache", False, sentence="explain_cache is for requests that generate text, not for /v1/embeddings."),
    integer("truncate_prompt_tokens", "Only so many tokens from the beginning of each; -1: as many as the context has.", -1),
    *HARMLESS,
    either=("input", "messages"),
)
_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0)


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """POST /v1/embeddings, checked.

    `dimensions`: the length of the vectors.  `normalize`: scale them to length one.  `options.pooling` is "last" or "mean".
    """

    model: str
    prompts: tuple[Prompt, ...]
    options: RequestOptions
    dimensions: int
    normalize: bool
    base64: bool
    ignored: tuple[str, ...]
    stream: bool = False  # never
    relaxed: tuple[str, ...] = ()


def parse_embeddings(config: Config, body: Mapping[str, Any]) -> EmbeddingRequest:
    """Check a body.  Raises RequestError: 400, or 404 for the model."""
    values, unknown = EMBEDDINGS.read(body)
    width = config.model.hidden_size
    model = served_model(config, values)
    prompts = _prompts(config, values)
    if len(prompts) > (limit := config.server.max_open_requests):
        raise InvalidParam("input", f"input holds {len(prompts)} inputs; this server admits {limit} at a time.")
    return EmbeddingRequest(
        model=model,
        prompts=prompts,
        options=replace(options(values), pooling=values.get("pooling", "last")),
        dimensions=check_integer("dimensions", values.get("dimensions", width), 1, width),
        normalize=values.get("normalize", True),
        base64=values.get("encoding_format") == "base64",
        ignored=unknown,
    )


def _prompts(config: Config, values: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """`input`, or the conversation in `messages`, which ends with its last message unless `add_generation_prompt` is true."""
    name, context = "truncate_prompt_tokens", config.max_context
    keep = values.get(name, 0)
    if name in values and (keep == 0 or keep > context):
        raise InvalidParam(name, f"{name} must be between 1 and {context}, the tokens of the context, or -1 for all of them.")
    keep = context if keep < 0 else keep
    if "messages" in values:
        return (replace(chat_prompt(config, {"add_generation_prompt": False, **values}), keep=keep),)
    return text_prompts("input", values["input"], add_special=values.get("add_special_tokens", True), keep=keep)


async def embed(engine: Engine, request: EmbeddingRequest) -> dict[str, Any]:
    """The answer.  Raises RequestError.  Cancelling the caller cancels the prompts that are not computed yet."""
    chunks, _ = await complete(engine, request.prompts, _ONE_TOKEN, request.options)
    tokens = sum(chunk.prompt_tokens for chunk in chunks)
    usage, turns, data = {"prompt_tokens": tokens, "total_tokens": tokens}, Turns(), []
    for i, chunk in enumerate(chunks):
        one = {"object": "embedding", "index": i, "embedding": _render(request, chunk.vector)}
        data.append(Rendered(json_pieces(one)) if len(chunks) > 1 else one)
        await turns.spend(50 + request.dimensions // 2)
    return {"object": "list", "data": data, "model": request.model, "usage": usage}


def _render(request: EmbeddingRequest, vector: F32 | None) -> Any:
    """The first `dimensions` numbers of the vector, normalized on request: a list, or little-endian f32 in base64."""
    if vector is None or not np.isfinite(vector).all():
        text = "The model made no finite vector of this input."
        raise RequestError(text, status=500, code="numerical_error")
    vector = vector[: request.dimensions]
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if request.normalize and norm > 0:
        vector = (vector / norm).astype(np.float32)
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if request.base64 else vector.tolist()
