"""Serves POST /tokenize and /detokenize, as vLLM has them: text to token ids and back.  Runs in the api process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from minisgl.api.engine import ChatPrompt, Engine, Prompt, TextPrompt, TokenPrompt
from minisgl.api.rendering import SLICE, Turns, rendered_list, rendered_numbers
from minisgl.api.requests import tools
from minisgl.api.requests.chat_prompt import MESSAGES, RENDERING, chat_prompt
from minisgl.api.requests.fields import Field, Fields, array, boolean, required, wrong_type
from minisgl.api.requests.generate import ask
from minisgl.api.requests.openai import ADD_SPECIAL_TOKENS, HARMLESS, MAX_PROMPTS, MODEL, TEXT_OR_TEXTS, served_model
from minisgl.api.requests.sampling import check_token_ids
from minisgl.api.tokenizer_pool import CHARS_PER_TOKEN
from minisgl.config import Config
from minisgl.errors import InvalidParam

T = TypeVar("T")
MAX_TIMES_CONTEXT = 4  # the texts of one request together, in contexts


def _check_texts(name: str, value: Any) -> Any:
    texts: list[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(t, str) for t in texts):
        raise wrong_type(name, "a string or an array of strings", value)
    if len(texts) > MAX_PROMPTS:
        raise InvalidParam(name, f"{name} holds {len(texts)} texts; one request may have {MAX_PROMPTS}.")
    return value


TOKENIZE = Fields(
    MODEL,
    Field("prompt", "A text, or several.", TEXT_OR_TEXTS, _check_texts),
    MESSAGES,
    *RENDERING,
    tools.FIELDS[0],
    ADD_SPECIAL_TOKENS,
    *HARMLESS,
    either=("prompt", "messages"),
)
DETOKENIZE = Fields(
    MODEL,
    required(array("tokens", "Token ids.", {"type": "integer"}, "an array of token ids")),
    boolean("skip_special_tokens", "Special tokens have no text."),
    *HARMLESS,
)


@dataclass(frozen=True, slots=True)
class TokenizerRequest(Generic[T]):
    """A checked request that needs the tokenizer alone."""

    value: T
    ignored: tuple[str, ...]
    stream: bool = False  # never
    relaxed: tuple[str, ...] = ()


Prompts = tuple[list[TextPrompt | ChatPrompt], bool]  # the prompts, and whether the answer has a list for each


def parse_tokenize(config: Config, body: Mapping[str, Any]) -> TokenizerRequest[Prompts]:
    """Check a body: `prompt`, a text or several, or `messages`.  Raises RequestError: 400, or 404 for the model."""
    values, unknown = TOKENIZE.read(body)
    served_model(config, values)
    offered = tools.read(values, config.server.tool_call_parser)
    if "messages" in values:
        return TokenizerRequest(([chat_prompt(config, values, offered.given)], False), unknown)
    given, add_special = values["prompt"], values.get("add_special_tokens", True)
    several = isinstance(given, list)
    return TokenizerRequest(([TextPrompt(t, add_special) for t in (given if several else [given])], several), unknown)


async def tokenize(engine: Engine, request: TokenizerRequest[Prompts]) -> dict[str, Any]:
    """The answer to POST /tokenize.  Raises RequestError."""
    prompts, several = request.value
    check_chars(engine.config, prompts)
    lists = [await ids_of(engine, prompt) for prompt in prompts]
    turns = Turns()
    written = [await rendered_numbers(ids, turns) if len(ids) > SLICE else ids for ids in lists]
    tokens = await rendered_list(written, turns, 20) if several else written[0]
    return {"tokens": tokens, "count": sum(map(len, lists)), "max_model_len": engine.config.max_context}


def check_chars(config: Config, prompts: Sequence[Prompt]) -> None:
    """Raises InvalidParam for more text than one request may have tokenized."""
    limit = MAX_TIMES_CONTEXT * CHARS_PER_TOKEN * config.max_context
    chars = sum(len(p.text) if isinstance(p, TextPrompt) else len(p.payload) for p in prompts if not isinstance(p, TokenPrompt))
    if chars > limit:
        raise InvalidParam("prompt", f"prompt holds {chars} characters in all; one request may have {limit}.")


def parse_detokenize(config: Config, body: Mapping[str, Any]) -> TokenizerRequest[tuple[tuple[int, ...], bool]]:
    """Check a body.  Special tokens have a text unless `skip_special_tokens` is true.  Raises RequestError."""
    values, unknown = DETOKENIZE.read(body)
    served_model(config, values)
    limit = config.max_context
    if (n := len(values["tokens"])) > limit:
        raise InvalidParam("tokens", f"tokens holds {n} ids; one request may have {limit}.")
    return TokenizerRequest((check_token_ids("tokens", values["tokens"]), values.get("skip_special_tokens", False)), unknown)


async def detokenize(engine: Engine, request: TokenizerRequest[tuple[tuple[int, ...], bool]]) -> dict[str, Any]:
    """The answer to POST /detokenize.  Raises RequestError."""
    ids, skip_special = request.value
    return {"prompt": await ask(engine, lambda on_text: engine.detokenize(ids, skip_special, on_text))}


async def ids_of(engine: Engine, prompt: Prompt) -> tuple[int, ...]:
    """The token ids of a prompt.  Raises RequestError."""
    if isinstance(prompt, TokenPrompt):
        return tuple(prompt.ids)
    return await ask(engine, lambda on_ids: engine.tokenize(prompt, on_ids))
