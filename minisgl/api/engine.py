"""What the facade hands to the engine and gets back: prompts in, chunks out.

`Engine` is the whole interface between the HTTP routes, the batch socket and the LLM class on one side and the ledger
(gateway.py) on the other.  Everything runs in the api process, on one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from minisgl.config import Config
from minisgl.errors import RequestError
from minisgl.sampling_params import DEFAULT_OPTIONS, Finish, RequestOptions, SamplingParams


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text to continue; `add_special` adds the tokenizer's own special tokens (BOS), as a completion does."""

    text: str
    add_special: bool = True


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation for the chat template: JSON bytes of {"messages": [...], "kwargs": {...}}."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids to continue, taken as they are."""

    ids: tuple[int, ...]


Prompt = TextPrompt | ChatPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """What the model held of a token: its log probability (natural), None for the first token of a prompt.

    `text` are its bytes, perhaps less than a character; `offset`: characters of the request's text that stand before it.
    `top`: (token id, bytes, log probability) of the most likely tokens at its place, in order.
    """

    token_id: int
    text: bytes
    logprob: float | None
    offset: int
    top: tuple[tuple[int, bytes, float], ...]


class Chunk(NamedTuple):
    """News of one request.  `finish` is Finish.NONE until the last chunk.

    `text` may lag behind `token_ids`: half of a UTF-8 character or of a stop string is held back.  `logprobs`, if they were
    asked for: of the `token_ids`, with `echo` behind those of the prompt.  `vector` f32[hidden size], if one was asked for.

    `queued`: seconds from the request's arrival at the scheduler to the first step that computes something of its prompt.
    `thought_tokens`: of all its tokens so far, those of its thought (see reasoning.py), once that has ended.
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


Deliver = Callable[[Chunk | RequestError], None]
TakeIds = Callable[[tuple[int, ...] | RequestError], None]
TakeText = Callable[[str | RequestError], None]


class Engine(Protocol):
    """The ledger of open requests, as its callers see it."""

    config: Config

    @property
    def stats(self) -> dict[str, int]:
        """Of the scheduler, by name; at most a second old while it works."""

    @property
    def tokenizer_info(self) -> dict[str, Any]:
        """What the tokenizer says of itself; empty until it is loaded."""

    @property
    def state(self) -> str:
        """ "starting", "ready", "draining", then "stopped"; or "dead"."""

    @property
    def open_requests(self) -> int: ...

    def open(self, prompt: Prompt, params: SamplingParams, deliver: Deliver, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        """Start a request; returns its uid.  `deliver` is called later (never from inside `open`) with chunks, the last of
        which has a `finish`, or with one RequestError, after which nothing follows.

        Raises RequestError at once where nothing needs to be asked: 503 while not ready, 429 when full, 400 when oversized.
        """

    def tokenize(self, prompt: TextPrompt | ChatPrompt, take: TakeIds) -> int:
        """The token ids of a prompt, which is not continued; returns a uid.  `take` is called once, later; raises as `open`."""

    def detokenize(self, ids: Sequence[int], skip_special: bool, take: TakeText) -> int:
        """The text of token ids, likewise."""

    def close(self, uid: int) -> None:
        """Nobody listens any more: cancel the request if it is still open.  Idempotent; `deliver` is not called again."""

    def flush_cache(self) -> None:
        """Empty the prefix cache, but for what running requests use."""
