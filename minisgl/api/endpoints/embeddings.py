"""POST /v1/embeddings: the final hidden states of a prompt as one vector.  Runs in the api process."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minisgl.api.engine import Engine, Prompt
from minisgl.api.generation import complete
from minisgl.api.requests.fields import Fields
from minisgl.api.requests.generate import served_names
from minisgl.api.requests.openai import HARMLESS, refuse_unsupported, served_model, text_prompts, unknown_fields
from minisgl.api.requests.sampling import options
from minisgl.arrays import F32
from minisgl.errors import InvalidParam, RequestError
from minisgl.sampling_params import RequestOptions, SamplingParams

EMBEDDING_FIELDS = frozenset(
    {
        "model",
        "input",
        "encoding_format",
        "dimensions",
        "pooling",
        "normalize",
        "add_special_tokens",
        "priority",
        "timeout",
        "cache_salt",
    }
)
EMBEDDING_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {"truncate_prompt_tokens": ()}
_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0)


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """POST /v1/embeddings, checked.  `options.pooling` says how; `dimensions`: how many of the vector's numbers are wanted."""

    model: str
    prompts: tuple[Prompt, ...]
    options: RequestOptions
    dimensions: int
    normalize: bool
    base64: bool
    ignored: tuple[str, ...]
    stream: bool = False  # never


def parse_embeddings(engine: Engine, body: Mapping[str, Any]) -> EmbeddingRequest:
    """Check a body.  Raises RequestError: 400, or 404 for the model."""
    fields, width = Fields(body), engine.config.model.hidden_size
    model = served_model(fields, served_names(engine.config))
    refuse_unsupported(body, EMBEDDING_UNSUPPORTED)
    encoding, pooling = (fields.get(name, str, "a string") for name in ("encoding_format", "pooling"))
    if encoding not in (None, "float", "base64"):
        raise InvalidParam("encoding_format", "encoding_format must be float or base64.")
    if pooling not in (None, "last", "mean"):
        raise InvalidParam("pooling", "pooling must be last or mean.")
    prompts = text_prompts("input", body.get("input"), add_special=fields.boolean("add_special_tokens", True))
    if len(prompts) > (limit := engine.config.server.max_open_requests):
        raise InvalidParam("input", f"input holds {len(prompts)} inputs; this server admits {limit} at a time.")
    return EmbeddingRequest(
        model=model,
        prompts=prompts,
        options=replace(options(fields), pooling=pooling or "last"),
        dimensions=fields.integer("dimensions", 1, width) or width,
        normalize=fields.boolean("normalize", True),
        base64=encoding == "base64",
        ignored=unknown_fields(body, EMBEDDING_FIELDS | HARMLESS | EMBEDDING_UNSUPPORTED.keys()),
    )


async def embed(engine: Engine, request: EmbeddingRequest) -> dict[str, Any]:
    """The answer.  Raises RequestError; cancelling the caller cancels what is not computed yet."""
    chunks, _ = await complete(engine, request.prompts, _ONE_TOKEN, request.options)
    tokens = sum(chunk.prompt_tokens for chunk in chunks)
    data = [{"object": "embedding", "index": i, "embedding": _told(request, c.vector)} for i, c in enumerate(chunks)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}


def _told(request: EmbeddingRequest, vector: F32 | None) -> Any:
    """The first `dimensions` numbers, of length one if that is wanted: a list, or little-endian f32 in base64."""
    if vector is None or not np.isfinite(vector).all():
        text = "The model made no finite vector of this input."
        raise RequestError(text, status=500, kind="server_error", code="numerical_error")
    vector = vector[: request.dimensions]
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if request.normalize and norm > 0:
        vector = (vector / norm).astype(np.float32)
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if request.base64 else vector.tolist()
