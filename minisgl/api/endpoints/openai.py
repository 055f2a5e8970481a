"""POST /v1/chat/completions and /v1/completions: checked bodies in, OpenAI's answers out.  Runs in the api process."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from minisgl.api.endpoints.openai_answers import AnswerEvents, Head, chat_body, completion_body
from minisgl.api.engine import Engine
from minisgl.api.generation import StreamedAnswer
from minisgl.api.parsers.reply import Reply
from minisgl.api.requests import generate
from minisgl.api.requests.openai import ChatRequest, CompletionRequest, GenerationRequest, parse_completion


def parse_completions(engine: Engine, body: Mapping[str, Any]) -> CompletionRequest:
    """Check the body of POST /v1/completions, for the model that is served.  Raises RequestError."""
    return parse_completion(body, generate.served_names(engine.config), engine.config.sampling_defaults)


async def answer(engine: Engine, request: GenerationRequest) -> dict[str, Any]:
    """The answer without a stream.  Raises RequestError."""
    results, timings = await generate.generate(engine, request)
    for result in results if request.form else ():
        result.reply = Reply(request.form)
        result.reply.feed(result.text, end=True)
    head = _head(request)
    if isinstance(request, ChatRequest):
        return chat_body(head, results, timings)
    return completion_body(head, results, request.n, request.params.logprobs or 0, timings)


async def stream(engine: Engine, request: GenerationRequest) -> StreamedAnswer:
    """The streamed answer.  Raises RequestError."""
    return await generate.begin(engine, request, AnswerEvents(_head(request), request))


def _head(request: GenerationRequest) -> Head:
    kind = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
    return Head(f"{kind}-{uuid.uuid4().hex}", int(time.time()), request.model)
