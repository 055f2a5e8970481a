"""Declares the interface of the engine to its callers: prompts in, chunks out.

`Engine` is the only interface between the HTTP routes, the batch socket and the LLM class on one side and the ledger
(gateway.py) on the other.  Everything runs in the api process, on one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from minisgl.api.cache_reasons import CacheExplanation, CacheReasons
from minisgl.api.journals import Journals
from minisgl.api.traces import Traces
from minisgl.arrays import I32
from minisgl.config import Config
from minisgl.errors import RequestError
from minisgl.sampling_params import DEFAULT_OPTIONS, Finish, RequestOptions, SamplingParams


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text to continue; `add_special` adds the tokenizer's own special tokens (BOS), as a completion does.

    `keep`: only so many tokens from its beginning, 0 for all.  `source`, of every kind of prompt: the request field that it
    comes from, for error messages; "": the usual one.
    """

    text: str
    add_special: bool = True
    keep: int = 0
    source: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation for the chat template: JSON bytes of {"messages": [...], "kwargs": {...}}."""

    payload: bytes
    keep: int = 0
    source: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids to continue, without any change."""

    ids: tuple[int, ...] | I32
    source: str = field(default="", compare=False)


Prompt = TextPrompt | ChatPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The natural log probability of a token, None for the first token of a prompt.

    `text`: the bytes of the token, which may end inside a character.  `offset`: characters of the request's text before the
    token.  `top`: (token id, bytes, log probability) of the most likely tokens in its place, in order.
    """

    token_id: int
    text: bytes
    logprob: float | None
    offset: int
    top: tuple[tuple[int, bytes, float], ...]


class Chunk(NamedTuple):
    """New tokens of one request.  `finish` is Finish.NONE until the last chunk.

    `text` may lag behind `token_ids`: half of a UTF-8 character or of a stop string is held back.  `logprobs`: of the
    `token_ids`, preceded with `echo` by those of the prompt; empty unless requested.  `vector`: f32[hidden size] if requested.

    `queued`: seconds from the request's arrival at the scheduler to the first step that computes a part of its prompt, and
    `waited` to the same from its opening.
    `thought_tokens`: tokens of the thoughts (see parsers/outline.py), once they have ended.  `thinking`: the answer begins
    inside a thought, as its prompt shows; None: nobody has looked.  `explanation`: of the last chunk, if it was asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    prompt_tokens: int
    cached_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    vector: npt.NDArray[np.float32] | None = None
    queued: float = 0.0
    thought_tokens: int = 0
    thinking: bool | None = None
    waited: float = 0.0
    explanation: CacheExplanation | None = None


OnChunk = Callable[[Chunk | RequestError], None]
OnIds = Callable[[tuple[int, ...] | RequestError], None]
OnText = Callable[[str | RequestError], None]


class Kept:
    """Counts what waits in this process of all answers: tokens with their log probabilities, in bytes."""

    def __init__(self) -> None:
        self.bytes = 0


class Engine(Protocol):
    """The ledger of open requests, as its callers see it."""

    config: Config
    kept: Kept

    @property
    def stats(self) -> dict[str, int]:
        """The scheduler's statistics by name, at most a second old while it works."""

    @property
    def tokenizer_info(self) -> dict[str, Any]:
        """The tokenizer's description of itself, empty until it is loaded."""

    @property
    def state(self) -> str:
        """ "starting", "ready" or "recovering" (requests are taken, and wait), "draining", then "stopped"; or "dead"."""

    @property
    def open_requests(self) -> int: ...

    @property
    def down(self) -> list[str]:
        """The processes that are being started."""

    @property
    def restarts(self) -> Mapping[str, int]:
        """How often each process has been started again."""

    def still(self, seconds: float) -> list[str]:
        """The processes that stand still: no sign of life for so long, or a step that has taken so long."""

    def open(self, prompt: Prompt, params: SamplingParams, on_chunk: OnChunk, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        """Start a request; returns its uid.

        `on_chunk` is called later, never from inside `open`: with chunks up to the one that has a `finish`, or with a
        RequestError, which is final.  Raises RequestError where the answer is known at once: 503 while not ready, 429 when
        full, 400 when oversized.
        """

    def check_open(self, client: int = 0, generates: bool = True) -> None:
        """Raise the RequestError with which `open`, or without `generates` a question, would refuse any prompt of it now."""

    def tokenize(self, prompt: TextPrompt | ChatPrompt, on_ids: OnIds, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        """Tokenize a prompt without continuing it; returns a uid.  `on_ids` is called once, later.  Raises as `open` does.

        `options`, of this and the other questions: whose it is, and by when it must be answered.
        """

    def detokenize(
        self, ids: Sequence[int], skip_special: bool, on_text: OnText, options: RequestOptions = DEFAULT_OPTIONS
    ) -> int:
        """Make the text of token ids; returns a uid.  `on_text` is called once, later.  Raises as `open` does."""

    def check_grammar(self, grammar: str, field: str, on_grammar: OnText, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        """Try a grammar out within limits of time and memory; returns a uid.  `field` is the request field that prescribes it.

        `on_grammar` is called once, later, with the text to serve or the InvalidParam that refuses it.  Raises as `open` does.
        """

    def close(self, uid: int) -> None:
        """Cancel the request if it is still open; its callback is not called again.  Idempotent."""

    def accepted(self, uid: int) -> bool:
        """Whether the request has passed every check of this process and the tokenizer, and been sent to the scheduler."""

    @property
    def journals(self) -> Journals:
        """The journals of the scheduler."""

    @property
    def traces(self) -> Traces:
        """The trace of all processes."""

    @property
    def cache_reasons(self) -> CacheReasons:
        """Why prompts were not cached."""

    def flush_cache(self) -> None:
        """Empty the cache of prefixes, except those that running requests use."""


class WrappedEngine:
    """An Engine that passes everything on to another one.  A subclass changes what it is there for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.config, self.kept = engine.config, engine.kept

    @property
    def stats(self) -> dict[str, int]:
        return self._engine.stats

    @property
    def tokenizer_info(self) -> dict[str, Any]:
        return self._engine.tokenizer_info

    @property
    def state(self) -> str:
        return self._engine.state

    @property
    def open_requests(self) -> int:
        return self._engine.open_requests

    @property
    def down(self) -> list[str]:
        return self._engine.down

    @property
    def restarts(self) -> Mapping[str, int]:
        return self._engine.restarts

    def still(self, seconds: float) -> list[str]:
        return self._engine.still(seconds)

    def open(self, prompt: Prompt, params: SamplingParams, on_chunk: OnChunk, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        return self._engine.open(prompt, params, on_chunk, options)

    def check_open(self, client: int = 0, generates: bool = True) -> None:
        self._engine.check_open(client, generates)

    def tokenize(self, prompt: TextPrompt | ChatPrompt, on_ids: OnIds, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        return self._engine.tokenize(prompt, on_ids, options)

    def detokenize(
        self, ids: Sequence[int], skip_special: bool, on_text: OnText, options: RequestOptions = DEFAULT_OPTIONS
    ) -> int:
        return self._engine.detokenize(ids, skip_special, on_text, options)

    def check_grammar(self, grammar: str, field: str, on_grammar: OnText, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        return self._engine.check_grammar(grammar, field, on_grammar, options)

    def close(self, uid: int) -> None:
        self._engine.close(uid)

    def accepted(self, uid: int) -> bool:
        return self._engine.accepted(uid)

    @property
    def journals(self) -> Journals:
        return self._engine.journals

    @property
    def traces(self) -> Traces:
        return self._engine.traces

    @property
    def cache_reasons(self) -> CacheReasons:
        return self._engine.cache_reasons

    def flush_cache(self) -> None:
        self._engine.flush_cache()
