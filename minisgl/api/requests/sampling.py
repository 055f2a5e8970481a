"""The fields of a request body that say how to sample: JSON -> SamplingParams and RequestOptions.

Pure functions; run in the api process.  Every refusal is an InvalidParam that names its field and does not repeat the value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from minisgl.api.requests.fields import Fields, json_type, wrong_type
from minisgl.errors import InvalidParam
from minisgl.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_STOP_TOKEN_IDS,
    MAX_TIMEOUT,
    RequestOptions,
    SamplingParams,
)

MAX_CHOICES = 128  # n
_INT32 = (1 << 31) - 1
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def choices(fields: Fields) -> int:
    """`n`, the number of answers to each prompt."""
    n = fields.integer("n", 1, MAX_CHOICES) or 1
    if fields.integer("best_of", 1, MAX_CHOICES) not in (None, 1, n):
        raise InvalidParam("best_of", "best_of must be n: every answer that is made is given.", "unsupported_value")
    return n


def chat_logprobs(fields: Fields) -> int | None:
    """How many alternatives to each token are wanted, None without log probabilities."""
    wanted, top = fields.boolean("logprobs"), fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top and not wanted:
        raise InvalidParam("top_logprobs", "top_logprobs is only allowed together with logprobs: true.")
    return top or 0 if wanted else None


def completion_logprobs(fields: Fields) -> int | None:
    """0 asks for the log probability of the chosen token alone; false, which some clients send, for nothing."""
    return None if fields.get("logprobs", object, "") is False else fields.integer("logprobs", 0, MAX_LOGPROBS)


def _logit_bias(fields: Fields) -> dict[int, float] | None:
    """OpenAI's form: token ids, which JSON writes as strings, to numbers from -100 to 100."""
    given = fields.get("logit_bias", dict | list, "an object")
    if isinstance(given, list) and given:
        raise wrong_type("logit_bias", "an object", given)
    if not given:
        return None
    if len(given) > MAX_LOGIT_BIAS:
        raise InvalidParam("logit_bias", f"logit_bias may hold at most {MAX_LOGIT_BIAS} tokens.")
    if not all(_TOKEN_ID.fullmatch(key) for key in given):
        raise InvalidParam("logit_bias", "the names in logit_bias must be token ids.")
    for value in given.values():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type("logit_bias", "numbers by token id", value)
        if not -100 <= value <= 100:
            raise InvalidParam("logit_bias", "logit_bias must be between -100 and 100.")
    bias = {int(key): float(value) for key, value in given.items()}
    if len(bias) < len(given):
        raise InvalidParam("logit_bias", "logit_bias names a token twice.")
    return bias


def sampling(
    fields: Fields,
    max_tokens: int | None,
    defaults: Mapping[str, Any],
    *,
    logprobs: int | None,
    echo: bool | None = None,
    grammar: str = "",
) -> SamplingParams:
    """The parameters of a request; `max_tokens` (None for the rest of the context) and `defaults` where it does not say."""
    asked = [fields.integer(name, 0 if echo else 1, _INT32) for name in ("max_completion_tokens", "max_tokens")]
    stop_token_ids = fields.get("stop_token_ids", list, "an array of integers") or []
    if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidParam("stop_token_ids", f"stop_token_ids may hold at most {MAX_STOP_TOKEN_IDS} ids.")
    given = {
        "max_tokens": next((n for n in asked if n is not None), max_tokens),
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.integer("top_k", -1, _INT32),
        "min_p": fields.number("min_p", 0, 1),
        "seed": fields.integer("seed", -MAX_SEED, MAX_SEED),
        "stop": fields.get("stop", str | list, "a string or an array of strings"),
        "stop_token_ids": token_ids("stop_token_ids", stop_token_ids),
        "ignore_eos": fields.boolean("ignore_eos"),
        "skip_special_tokens": fields.boolean("skip_special_tokens", True),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "repetition_penalty": fields.number("repetition_penalty", 0, MAX_REPETITION_PENALTY),
        "logit_bias": _logit_bias(fields),
        "min_tokens": fields.integer("min_tokens", 0, _INT32),
        "logprobs": logprobs,
        "echo": echo,
        "grammar": grammar,
    }
    if given["top_k"] == -1:  # vLLM's way of saying "off"
        given["top_k"] = 0
    return SamplingParams(**{**defaults, **{name: value for name, value in given.items() if value is not None}})


def options(fields: Fields) -> RequestOptions:
    """`priority`: higher is served first; `timeout` in seconds; `cache_salt`: whom to share cached prefixes with."""
    given = {
        "priority": fields.integer("priority", -MAX_PRIORITY, MAX_PRIORITY),
        "timeout": fields.number("timeout", 0, MAX_TIMEOUT),
        "cache_salt": fields.get("cache_salt", str, "a string"),
    }
    return RequestOptions(**{name: value for name, value in given.items() if value is not None})


def token_ids(name: str, ids: list[Any]) -> tuple[int, ...]:
    """The numbers of the field `name` as token ids, of whatever vocabulary."""
    bad = next((t for t in ids if type(t) is not int), 0)
    if type(bad) is not int:
        raise InvalidParam(name, f"{name} must hold integers, not {json_type(bad)}.", "invalid_type")
    if ids and not 0 <= min(ids) <= max(ids) <= _INT32:
        raise InvalidParam(name, f"{name} holds a number that is not a token id.")
    return tuple(ids)
