"""Lists the endpoints that answer a JSON body, for HTTP, the batch socket and /v1/batches.  Runs in the api process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from minisgl.api.endpoints import anthropic, embeddings, openai, responses, sglang, tokenize
from minisgl.api.engine import Engine
from minisgl.api.generation import StreamedAnswer
from minisgl.api.requests import generate
from minisgl.api.requests.fields import Fields
from minisgl.api.requests.openai import CHAT, COMPLETION
from minisgl.api.requests.unknown_fields import check_unknown
from minisgl.errors import InvalidParam


class Checked(Protocol):
    """The part that all checked requests have in common."""

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of unknown fields."""

    @property
    def stream(self) -> bool:
        """Whether the answer is to be streamed."""


R = TypeVar("R", bound=Checked)


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[R]):
    """`parse` checks a body, `answer` returns a complete answer, `stream` begins a stream of events.

    All three raise RequestError.
    """

    summary: str
    fields: Fields
    parse: Callable[[Engine, Mapping[str, Any]], R]
    answer: Callable[[Engine, R], Awaitable[Any]]
    stream: Callable[[Engine, R], Awaitable[StreamedAnswer]] | None = None

    async def ask(self, engine: Engine, body: Mapping[str, Any]) -> Any:
        """The answer in one piece, where streams are not possible.  Raises RequestError."""
        request = self.parse(engine, body)
        check_unknown(engine.config, request.ignored)
        if request.stream:
            raise InvalidParam("stream", "stream must be false here: the answer is sent in one piece.", "unsupported_value")
        return await self.answer(engine, request)


ENDPOINTS: Mapping[str, Endpoint[Any]] = {
    "/v1/chat/completions": Endpoint("Answer a conversation.", CHAT, generate.chat_request, openai.answer, openai.stream),
    "/v1/completions": Endpoint("Continue texts.", COMPLETION, openai.parse_completions, openai.answer, openai.stream),
    "/v1/responses": Endpoint(
        "Answer, in the shape of the Responses API; stateless.",
        responses.RESPONSE,
        responses.parse_responses,
        responses.respond,
        responses.stream,
    ),
    "/v1/messages": Endpoint(
        "Answer, in Anthropic's shape.", anthropic.MESSAGE, anthropic.parse_messages, anthropic.message, anthropic.stream
    ),
    "/v1/messages/count_tokens": Endpoint(
        "How long a prompt would be.", anthropic.COUNT, anthropic.parse_count, anthropic.count_tokens
    ),
    "/v1/embeddings": Endpoint("Vectors of texts.", embeddings.EMBEDDINGS, embeddings.parse_embeddings, embeddings.embed),
    "/generate": Endpoint(
        "Continue texts or token ids; the answer has the ids, too.",
        sglang.GENERATE,
        sglang.parse_generate,
        sglang.generate,
        sglang.stream,
    ),
    "/tokenize": Endpoint("Text or messages to token ids.", tokenize.TOKENIZE, tokenize.parse_tokenize, tokenize.tokenize),
    "/detokenize": Endpoint("Token ids to text.", tokenize.DETOKENIZE, tokenize.parse_detokenize, tokenize.detokenize),
}
BATCHED = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")  # allowed in a batch
