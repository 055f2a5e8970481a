"""Checks what a request says against the model: token ids, vocabulary, EOS, room in the context.  Runs in the api process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from minisgl.api.engine import ChatPrompt, Prompt
from minisgl.arrays import I32
from minisgl.config import Config
from minisgl.errors import InvalidParam, context_overflow
from minisgl.grammar import after_thought
from minisgl.sampling_params import RequestOptions, SamplingParams


def source_of(prompt: Prompt, options: RequestOptions) -> str:
    """The request field that holds the prompt, for error messages."""
    usual = "input" if options.pooling else "messages" if isinstance(prompt, ChatPrompt) else "prompt"
    return prompt.source or usual


def check_eos(config: Config, field: str) -> None:
    """Raises InvalidParam for a grammar in `field` if the model has no EOS token."""
    if not config.model.eos_ids:
        text = "A grammar needs a model with an EOS token, to end its answers."
        raise InvalidParam(field, text, "unsupported_value")


def check_vocabulary(config: Config, params: SamplingParams) -> None:
    """Raises InvalidParam for parameters with a token id that the model does not have."""
    vocab = config.model.vocab_size
    for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", [t for t, _ in params.logit_bias])):
        if ids and max(ids) >= vocab:
            raise InvalidParam(name, f"{name} holds the token id {max(ids)}; this model's end at {vocab - 1}.")


def check_ids(config: Config, ids: Sequence[int] | I32, field: str) -> I32:
    """The ids as an array.  Raises InvalidParam for one that the model does not have."""
    vocab = config.model.vocab_size
    try:
        values = np.asarray(ids, np.int64)
    except OverflowError:
        raise InvalidParam(field, f"{field} holds a number that is not a token id.") from None
    if len(values) and not 0 <= values.min() <= values.max() < vocab:
        bad = values[(values < 0) | (values >= vocab)][0]
        raise InvalidParam(field, f"token id {bad} is not in the vocabulary (0 to {vocab - 1}).")
    return values.astype(np.int32)


def check_length(config: Config, n: int, source: str, params: SamplingParams, options: RequestOptions) -> int:
    """The most tokens that the answer to a prompt of `n` tokens may have.  Raises RequestError if they do not fit.

    `source`: the request field that holds the prompt.
    """
    context, requested = config.max_context, params.max_tokens
    if n == 0:
        raise InvalidParam(source, f"{source} is empty: there is nothing to continue.")
    drawn = 0 if requested == 0 or options.pooling else requested or 1  # a token that is dropped needs no place
    if n + drawn > context:
        parts = f"{n} in the {source}, {requested or 0} in the completion"
        raise context_overflow(source, context, n + (requested or 0), parts)
    if requested is not None:
        return requested
    bound = config.server.default_max_tokens
    return min(context - n, max(bound, params.min_tokens) if bound else context)


def with_thinking(params: SamplingParams, thinking: bool) -> SamplingParams:
    """The parameters of a request whose prompt has been rendered: a grammar binds the answer behind the thought."""
    bound = after_thought(params.grammar, params.reasoning, begun=thinking) if params.grammar else ""
    return replace(params, thinking=thinking, grammar=bound)
