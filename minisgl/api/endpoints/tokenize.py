"""POST /tokenize and /detokenize, as vLLM has them: text to token ids and back, without a model.  Runs in the api process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from minisgl.api.engine import ChatPrompt, Engine, OnIds, OnText, TextPrompt
from minisgl.api.requests.chat_prompt import chat_prompt
from minisgl.api.requests.fields import Fields, wrong_type
from minisgl.api.requests.generate import served_names
from minisgl.api.requests.openai import MAX_PROMPTS, served_model, unknown_fields
from minisgl.api.requests.sampling import token_ids
from minisgl.errors import InvalidParam, RequestError

TOKENIZE_FIELDS = frozenset({"model", "prompt", "messages", "add_special_tokens", "chat_template_kwargs"})
DETOKENIZE_FIELDS = frozenset({"model", "tokens", "skip_special_tokens"})
T = TypeVar("T")


async def ask(engine: Engine, start: Callable[[Callable[[T | RequestError], None]], int]) -> T:
    """One answer of the tokenizer.  Raises RequestError."""
    future: asyncio.Future[T | RequestError] = asyncio.get_running_loop().create_future()
    uid = start(lambda answer: None if future.done() else future.set_result(answer))
    try:
        answer = await future
    finally:
        engine.close(uid)
    if isinstance(answer, RequestError):
        raise answer
    return answer


async def ids_of(engine: Engine, prompt: TextPrompt | ChatPrompt) -> tuple[int, ...]:
    """The token ids of a prompt.  Raises RequestError."""

    def start(on_ids: OnIds) -> int:
        return engine.tokenize(prompt, on_ids)

    return await ask(engine, start)


async def tokenize(engine: Engine, body: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """POST /tokenize: `prompt`, a text or several, or `messages`.  Returns the answer and the names of unknown fields."""
    fields = Fields(body)
    served_model(fields, served_names(engine.config))
    if (body.get("prompt") is None) == (body.get("messages") is None):
        raise InvalidParam("prompt", "give either prompt or messages.", "missing_required_parameter")
    unknown = unknown_fields(body, TOKENIZE_FIELDS)
    tokens: Any
    if body.get("messages") is not None:
        tokens = await ids_of(engine, chat_prompt(body))
        count = len(tokens)
    else:
        given = body["prompt"]
        add_special = fields.boolean("add_special_tokens", True)
        several = isinstance(given, list)
        texts: list[Any] = given if isinstance(given, list) else [given]
        if not all(isinstance(t, str) for t in texts):
            raise wrong_type("prompt", "a string or an array of strings", given)
        if len(texts) > MAX_PROMPTS:
            raise InvalidParam("prompt", f"prompt holds {len(texts)} texts; one request may have {MAX_PROMPTS}.")
        lists = [await ids_of(engine, TextPrompt(t, add_special)) for t in texts]
        tokens, count = (lists if several else lists[0]), sum(map(len, lists))
    return {"tokens": tokens, "count": count, "max_model_len": engine.config.max_context}, unknown


async def detokenize(engine: Engine, body: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """POST /detokenize: `tokens`, a list of ids.  Special tokens have a text, unless `skip_special_tokens` says no."""
    fields = Fields(body)
    served_model(fields, served_names(engine.config))
    given = fields.get("tokens", list, "an array of token ids")
    if given is None:
        raise InvalidParam("tokens", "tokens is required.", "missing_required_parameter")
    ids, skip = token_ids("tokens", given), fields.boolean("skip_special_tokens")

    def start(on_text: OnText) -> int:
        return engine.detokenize(ids, skip, on_text)

    return {"prompt": await ask(engine, start)}, unknown_fields(body, DETOKENIZE_FIELDS)
