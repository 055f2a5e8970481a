"""Lists the endpoints that answer a JSON body, for HTTP, the batch socket and /v1/batches.  Runs in the api process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from minisgl.api.endpoints import anthropic, embeddings, render, responses, sglang, tokenize
from minisgl.api.endpoints.anthropic_blocks import Message
from minisgl.api.endpoints.openai_answers import OpenAIAnswer
from minisgl.api.endpoints.responses_items import Response
from minisgl.api.endpoints.sglang_answers import NativeAnswer
from minisgl.api.engine import Chunk, Engine, TokenPrompt
from minisgl.api.events import Events
from minisgl.api.generation import StreamedAnswer
from minisgl.api.requests import generate
from minisgl.api.requests.fields import Fields
from minisgl.api.requests.openai import CHAT, COMPLETION, GenerationRequest, parse_chat, parse_completion
from minisgl.api.requests.unknown_fields import check_unknown
from minisgl.api.usage import Timings
from minisgl.config import Config
from minisgl.errors import InvalidParam, context_overflow


class Checked(Protocol):
    """A checked request.  `ignored`: the names of its fields without effect.  `stream`: whether it asks for a stream.

    `relaxed`: the keywords of its JSON schemas that the answer may not keep to.
    """

    @property
    def ignored(self) -> tuple[str, ...]: ...

    @property
    def stream(self) -> bool: ...

    @property
    def relaxed(self) -> tuple[str, ...]: ...


class Answer(Events, Protocol):
    """Renders the answer to a request in one dialect, as a body or as events."""

    @property
    def request(self) -> GenerationRequest: ...

    async def complete(self, chunks: list[Chunk], timings: Timings) -> Any:
        """The body of the answer, from one chunk for each choice.

        It is rendered a little at a time (see rendering.py): what is large in it is `Rendered`.
        """


R = TypeVar("R", bound=Checked)
_MAX_IGNORED = 100


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[R]):
    """`parse` checks a body, `answer` gives the complete answer, `stream` begins one in events.  All raise RequestError.

    `generates`: its requests wait for a slot of the engine.
    """

    summary: str
    fields: Fields
    parse: Callable[[Config, Mapping[str, Any]], R]
    answer: Callable[[Engine, R], Awaitable[Any]]
    stream: Callable[[Engine, R], Awaitable[StreamedAnswer]] | None = None
    generates: bool = True

    async def ask(self, engine: Engine, body: Mapping[str, Any]) -> Any:
        """The complete answer to a body that must not ask for a stream.  Raises RequestError."""
        return await self.answer(engine, self.checked(engine.config, body))

    def checked(self, config: Config, body: Mapping[str, Any]) -> R:
        """The request of such a body.  Raises RequestError."""
        request = self.parse(config, body)
        check_unknown(config, self.fields, request.ignored)
        if request.stream:
            raise InvalidParam("stream", "stream must be false here: the answer is sent in one piece.", "unsupported_value")
        return request


def _generating(
    summary: str, fields: Fields, parse: Callable[[Config, Mapping[str, Any]], R], make: Callable[[Config, R], Answer]
) -> Endpoint[R]:
    """The endpoint of a dialect.  `make` begins the answer to a checked request."""

    async def answer(engine: Engine, request: R) -> Any:
        answer = make(engine.config, request)
        return await generate.generate(engine, answer.request, answer.complete)

    async def stream(engine: Engine, request: R) -> StreamedAnswer:
        answer = make(engine.config, request)
        return await generate.begin(engine, answer.request, answer)

    return Endpoint(summary, fields, parse, answer, stream)


ENDPOINTS: Mapping[str, Endpoint[Any]] = {
    "/v1/chat/completions": _generating("Answer a conversation.", CHAT, parse_chat, OpenAIAnswer),
    "/v1/completions": _generating("Continue texts.", COMPLETION, parse_completion, OpenAIAnswer),
    "/v1/chat/completions/render": Endpoint(
        "The tokens of a conversation, for routers.", CHAT, parse_chat, render.render_chat, generates=False
    ),
    "/v1/completions/render": Endpoint(
        "The tokens of such texts, for routers.", COMPLETION, parse_completion, render.render_completion, generates=False
    ),
    "/v1/responses": _generating(
        "Answer, in the shape of the Responses API; stateless.", responses.RESPONSE, responses.parse_responses, Response
    ),
    "/v1/responses/input_tokens": Endpoint(
        "How long a prompt would be.",
        responses.INPUT_TOKENS,
        responses.parse_input_tokens,
        responses.input_tokens,
        generates=False,
    ),
    "/v1/messages": _generating("Answer, in Anthropic's shape.", anthropic.MESSAGE, anthropic.parse_messages, Message),
    "/v1/messages/count_tokens": Endpoint(
        "How long a prompt would be.", anthropic.COUNT, anthropic.parse_count, anthropic.count_tokens, generates=False
    ),
    "/v1/embeddings": Endpoint("Vectors of texts.", embeddings.EMBEDDINGS, embeddings.parse_embeddings, embeddings.embed),
    "/generate": _generating(
        "Continue texts or token ids; the answer has the ids, too.", sglang.GENERATE, sglang.parse_generate, NativeAnswer
    ),
    "/tokenize": Endpoint(
        "Text or messages to token ids.", tokenize.TOKENIZE, tokenize.parse_tokenize, tokenize.tokenize, generates=False
    ),
    "/detokenize": Endpoint(
        "Token ids to text.", tokenize.DETOKENIZE, tokenize.parse_detokenize, tokenize.detokenize, generates=False
    ),
}
BATCHED = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")  # for batches and the batch socket


def compact(config: Config, request: Any) -> Any:
    """A checked request in the form that is cheap to send to another process.

    Token ids become arrays; of the names of unknown fields the first are enough.  Raises InvalidParam for more tokens than the
    context has.
    """
    prompts = []
    for prompt in getattr(request, "prompts", ()):
        if isinstance(prompt, TokenPrompt):
            if (n := len(prompt.ids)) > config.max_context:
                raise context_overflow("prompt", config.max_context, n, f"{n} in the prompt, 0 in the completion")
            prompt = TokenPrompt(np.array(prompt.ids, np.int32))  # noqa: PLW2901
        prompts.append(prompt)
    changed: dict[str, Any] = {"prompts": tuple(prompts)} if prompts else {}
    return replace(request, ignored=request.ignored[:_MAX_IGNORED], **changed)
