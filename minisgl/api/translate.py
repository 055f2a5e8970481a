"""What /v1/responses and /v1/messages have in common: both become a chat.  Runs in the api process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from minisgl.api.answers import Result
from minisgl.api.fields import wrong_type
from minisgl.api.openai import ChatRequest
from minisgl.api.requests import Engine
from minisgl.api.stream import generate
from minisgl.errors import InvalidParam


def text_of(content: Any, at: str, kinds: Sequence[str]) -> str:
    """A string, or the texts of an array of parts whose `type` is one of `kinds`.  Raises InvalidParam."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong_type(at, "a string or an array of text parts", content)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict):
            raise wrong_type(f"{at}[{i}]", "an object", part)
        if part.get("type") not in kinds:
            raise InvalidParam(f"{at}[{i}].type", "only text parts are supported by this model.", "unsupported_value")
        if not isinstance(part.get("text"), str):
            raise wrong_type(f"{at}[{i}].text", "a string", part.get("text"))
        texts.append(part["text"])
    return "\n".join(texts)


async def whole(engine: Engine, request: ChatRequest) -> tuple[Result, int]:
    """The answer to a chat of one choice, and its last token (-1: none)."""
    result = Result(logprobs=None if request.params.logprobs is None else [])
    texts, last = [], -1
    async with aclosing(generate(engine, request.prompts[0], request.params, request.options)) as stream:
        async for chunk in stream:
            result.add(chunk)
            texts.append(chunk.text)
            last = chunk.token_ids[-1] if chunk.token_ids else last
            if result.logprobs is not None:
                result.logprobs.extend(chunk.logprobs)
    result.text = "".join(texts)
    return result, last
