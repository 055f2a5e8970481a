"""What can be asked without a stream, by path: for the batch socket and for /v1/batches.  Runs in the api process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from minisgl.api.embeddings import embed, parse_embeddings
from minisgl.api.http import check_unknown
from minisgl.api.requests import Engine
from minisgl.api.responses import parse_responses, respond
from minisgl.api.serving import chat, completion, refuse_stream


async def embeddings(engine: Engine, body: Mapping[str, Any]) -> dict[str, Any]:
    """POST /v1/embeddings.  Raises RequestError."""
    request = parse_embeddings(engine, body)
    check_unknown(engine.config, request.ignored)
    return await embed(engine, request)


async def responses(engine: Engine, body: Mapping[str, Any]) -> dict[str, Any]:
    """POST /v1/responses.  Raises RequestError."""
    request = parse_responses(engine, body)
    check_unknown(engine.config, request.ignored)
    refuse_stream(request.stream)
    return await respond(engine, request)


ENDPOINTS: Mapping[str, Callable[[Engine, Mapping[str, Any]], Awaitable[dict[str, Any]]]] = {
    "/v1/chat/completions": chat,
    "/v1/completions": completion,
    "/v1/embeddings": embeddings,
    "/v1/responses": responses,
}
