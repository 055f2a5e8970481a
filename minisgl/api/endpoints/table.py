"""The endpoints that generate, by path, for HTTP, the batch socket and /v1/batches alike.  Runs in the api process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from minisgl.api.endpoints import anthropic, embeddings, openai, responses, sglang
from minisgl.api.engine import Engine
from minisgl.api.generation import StreamedAnswer
from minisgl.api.requests import generate
from minisgl.api.requests.unknown_fields import check_unknown
from minisgl.errors import InvalidParam


class Checked(Protocol):
    """What all checked requests have.  `ignored`: names of unknown fields; `stream`: whether it asks for one."""

    @property
    def ignored(self) -> tuple[str, ...]: ...

    @property
    def stream(self) -> bool: ...


R = TypeVar("R", bound=Checked)


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[R]):
    """`parse` checks a body, `answer` gives the whole answer, `stream` begins one in events.  All raise RequestError."""

    parse: Callable[[Engine, Mapping[str, Any]], R]
    answer: Callable[[Engine, R], Awaitable[Any]]
    stream: Callable[[Engine, R], Awaitable[StreamedAnswer]] | None = None

    async def ask(self, engine: Engine, body: Mapping[str, Any]) -> Any:
        """The answer in one piece, where there is no other.  Raises RequestError."""
        request = self.parse(engine, body)
        check_unknown(engine.config, request.ignored)
        if request.stream:
            raise InvalidParam("stream", "stream must be false here: the answer is sent in one piece.", "unsupported_value")
        return await self.answer(engine, request)


ENDPOINTS: Mapping[str, Endpoint[Any]] = {
    "/v1/chat/completions": Endpoint(generate.chat_request, openai.answer, openai.stream),
    "/v1/completions": Endpoint(openai.parse_completions, openai.answer, openai.stream),
    "/v1/embeddings": Endpoint(embeddings.parse_embeddings, embeddings.embed),
    "/v1/responses": Endpoint(responses.parse_responses, responses.respond, responses.stream),
    "/v1/messages": Endpoint(anthropic.parse_messages, anthropic.message, anthropic.stream),
    "/generate": Endpoint(sglang.parse_generate, sglang.generate, sglang.stream),
}
BATCHED = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")  # those that a batch may ask
