"""Maps the paths that generate to their endpoints, for HTTP, the batch socket and /v1/batches.  Runs in the api process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from minisgl.api.endpoints import embeddings
from minisgl.api.endpoints.anthropic import parse_messages
from minisgl.api.endpoints.anthropic_blocks import Message
from minisgl.api.endpoints.openai_answers import OpenAIAnswer
from minisgl.api.endpoints.responses import parse_responses
from minisgl.api.endpoints.responses_items import Response
from minisgl.api.endpoints.sglang import parse_generate
from minisgl.api.endpoints.sglang_answers import NativeAnswer
from minisgl.api.engine import Chunk, Engine
from minisgl.api.generation import Events, StreamedAnswer, Timings
from minisgl.api.requests import generate
from minisgl.api.requests.openai import GenerationRequest
from minisgl.api.requests.unknown_fields import check_unknown
from minisgl.config import Config
from minisgl.errors import InvalidParam


class Checked(Protocol):
    """A checked request.  `ignored`: the names of its unknown fields.  `stream`: whether it asks for a stream."""

    @property
    def ignored(self) -> tuple[str, ...]: ...

    @property
    def stream(self) -> bool: ...


class Answer(Events, Protocol):
    """Renders the answer to a request in one dialect, as a body or as events."""

    @property
    def request(self) -> GenerationRequest: ...

    def complete(self, chunks: Sequence[Chunk], timings: Timings) -> Any:
        """The body of the answer, from one chunk for each choice."""


R = TypeVar("R", bound=Checked)


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[R]):
    """`parse` checks a body, `answer` gives the complete answer, `stream` begins one in events.  All raise RequestError."""

    parse: Callable[[Engine, Mapping[str, Any]], R]
    answer: Callable[[Engine, R], Awaitable[Any]]
    stream: Callable[[Engine, R], Awaitable[StreamedAnswer]] | None = None

    async def ask(self, engine: Engine, body: Mapping[str, Any]) -> Any:
        """The complete answer to a body that must not ask for a stream.  Raises RequestError."""
        request = self.parse(engine, body)
        check_unknown(engine.config, request.ignored)
        if request.stream:
            raise InvalidParam("stream", "stream must be false here: the answer is sent in one piece.", "unsupported_value")
        return await self.answer(engine, request)


def _generating(parse: Callable[[Engine, Mapping[str, Any]], R], make: Callable[[Config, R], Answer]) -> Endpoint[R]:
    """The endpoint of a dialect.  `make` begins the answer to a checked request."""

    async def answer(engine: Engine, request: R) -> Any:
        answer = make(engine.config, request)
        return answer.complete(*await generate.generate(engine, answer.request))

    async def stream(engine: Engine, request: R) -> StreamedAnswer:
        answer = make(engine.config, request)
        return await generate.begin(engine, answer.request, answer)

    return Endpoint(parse, answer, stream)


ENDPOINTS: Mapping[str, Endpoint[Any]] = {
    "/v1/chat/completions": _generating(generate.chat_request, OpenAIAnswer),
    "/v1/completions": _generating(generate.completion_request, OpenAIAnswer),
    "/v1/embeddings": Endpoint(embeddings.parse_embeddings, embeddings.embed),
    "/v1/responses": _generating(parse_responses, Response),
    "/v1/messages": _generating(parse_messages, Message),
    "/generate": _generating(parse_generate, NativeAnswer),
}
BATCHED = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")  # for batches and the batch socket
