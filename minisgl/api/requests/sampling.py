"""Declares the sampling fields of a request body, and makes SamplingParams and RequestOptions of their values.

Pure functions; run in the api process.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from minisgl import sampling_params as limits
from minisgl.api.requests import fields
from minisgl.api.requests.fields import INT32, Field, Schema, check_integer, json_type, wrong_type
from minisgl.config import Config
from minisgl.errors import InvalidParam
from minisgl.sampling_params import RequestOptions, SamplingParams

MAX_CHOICES = 128  # n
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


# ---------------- checks
def check_token_ids(name: str, ids: list[Any]) -> tuple[int, ...]:
    """The items of the array in the field `name` as token ids of any vocabulary.  Raises InvalidParam."""
    bad = next((t for t in ids if type(t) is not int), 0)
    if type(bad) is not int:
        raise InvalidParam(name, f"{name} must hold integers, not {json_type(bad)}.", "invalid_type")
    if ids and not 0 <= min(ids) <= max(ids) <= INT32:
        raise InvalidParam(name, f"{name} holds a number that is not a token id.")
    return tuple(ids)


def _check_stop_token_ids(name: str, value: list[Any]) -> tuple[int, ...]:
    if len(value) > limits.MAX_STOP_TOKEN_IDS:
        raise InvalidParam(name, f"{name} may hold at most {limits.MAX_STOP_TOKEN_IDS} ids.")
    return check_token_ids(name, value)


def _check_logit_bias(name: str, value: Any) -> dict[int, float]:
    """OpenAI's form: token ids, which JSON writes as strings, to numbers from -100 to 100."""
    if value == []:
        return {}
    fields.check_object(name, value)
    if len(value) > limits.MAX_LOGIT_BIAS:
        raise InvalidParam(name, f"{name} may hold at most {limits.MAX_LOGIT_BIAS} tokens.")
    if not all(_TOKEN_ID.fullmatch(key) for key in value):
        raise InvalidParam(name, f"the names in {name} must be token ids.")
    for bias in value.values():
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise wrong_type(name, "numbers by token id", bias)
        if not -100 <= bias <= 100:
            raise InvalidParam(name, f"{name} must be between -100 and 100.")
    return {int(key): float(bias) for key, bias in value.items()}


def _check_count_or_false(name: str, value: Any) -> int | None:
    """Some clients send false for no log probabilities."""
    return None if value is False else check_integer(name, value, 0, limits.MAX_LOGPROBS)


# ---------------- declarations
STRINGS: Schema = {"type": "array", "items": {"type": "string"}, "maxItems": limits.MAX_STOP_STRINGS}
_TOKEN_IDS: Schema = {"type": "array", "items": {"type": "integer"}, "maxItems": limits.MAX_STOP_TOKEN_IDS}
_BIASES: Schema = {
    "type": "object",
    "propertyNames": {"pattern": f"^({_TOKEN_ID.pattern})$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
_STOP_IDS = fields.of_type(list, "an array of integers", _check_stop_token_ids)
STOP = Field(
    "stop",
    "The answer ends before the first of these texts.",
    {"oneOf": [{"type": "string"}, STRINGS]},
    fields.of_type(str | list, "a string or an array of strings"),
)
SAMPLING = (
    fields.number("temperature", "0 always takes the likeliest token.", 0, 2),
    fields.number("top_p", "Only the likeliest tokens that have this share together.", 0, 1),
    fields.integer("top_k", "Only so many of the likeliest tokens; 0 or -1: all.", -1),
    fields.number("min_p", "Only tokens at least this likely, relative to the likeliest.", 0, 1),
    fields.integer("seed", "The same seed and prompt give the same answer.", -limits.MAX_SEED, limits.MAX_SEED),
    STOP,
    Field("stop_token_ids", "The answer ends with the first of these tokens.", _TOKEN_IDS, _STOP_IDS),
    fields.boolean("ignore_eos", "Do not end at an end token."),
    fields.boolean("skip_special_tokens", "Special tokens have no text."),
    fields.number("presence_penalty", "Taken once from the logit of a token that the answer has.", -2, 2),
    fields.number("frequency_penalty", "Taken from a token's logit as often as the answer has it.", -2, 2),
    fields.number(
        "repetition_penalty", "Divides the logits of tokens of prompt and answer; 1: off.", 0, limits.MAX_REPETITION_PENALTY
    ),
    Field("logit_bias", "Token id -> what is added to its logit, from -100 to 100.", _BIASES, _check_logit_bias),
    fields.integer("min_tokens", "No end before so many tokens.", 0),
)
OPTIONS = (
    fields.integer("priority", "Higher is served first; at most --max-priority.", -limits.MAX_PRIORITY, limits.MAX_PRIORITY),
    fields.number("timeout", "Seconds until the request is given up; 0: never.", 0, limits.MAX_TIMEOUT),
    fields.string("cache_salt", "Cached prefixes are shared with the same salt only."),
)
EXPLAIN = fields.boolean("explain_cache", "cache_explanation says why no more of the prompt came from the prefix cache.")
CHOICES = (
    fields.integer("n", "Answers to each prompt.", 1, MAX_CHOICES),
    fields.integer("best_of", "1, or the same as n.", 1, MAX_CHOICES),
)
CHAT_LOGPROBS = (
    fields.boolean("logprobs", "With log probabilities."),
    fields.integer("top_logprobs", "Alternatives to each token.", 0, limits.MAX_LOGPROBS),
)
_ALTERNATIVES = fields.integer("logprobs", "Alternatives to each token.", 0, limits.MAX_LOGPROBS)
COMPLETION_LOGPROBS = replace(
    _ALTERNATIVES, schema={"oneOf": [_ALTERNATIVES.schema, {"enum": [False]}]}, check=_check_count_or_false
)  # 0: the log probability of the chosen token alone


def length(low: int) -> tuple[Field, Field]:
    """The fields with the length of the answer, checked by `sampling`.  `low`: 0 if an answer can be the prompt alone."""
    schema = {"type": "integer", "minimum": low}
    return (
        fields.anything("max_tokens", "Tokens of the answer, at most.", schema),
        fields.anything("max_completion_tokens", "The same as max_tokens, before which it counts.", schema),
    )


# ---------------- values
def params(
    values: Mapping[str, Any],
    max_tokens: int | None,
    config: Config,
    *,
    logprobs: int | None,
    echo: bool = False,
    grammar: str = "",
) -> SamplingParams:
    """The parameters of a request.

    `values`: as read.  Where the request has no value, `max_tokens` (None for the rest of the context) and the model's
    sampling defaults hold.
    """
    for name in ("max_tokens", "max_completion_tokens"):
        if name in values:
            max_tokens = check_integer(name, values[name], 0 if echo else 1, INT32)
    given = {**config.sampling_defaults, **_given(values, SAMPLING)}
    if given.get("top_k") == -1:  # vLLM's way of saying "off"
        given["top_k"] = 0
    return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, echo=echo, grammar=grammar, **given)


def options(values: Mapping[str, Any]) -> RequestOptions:
    return RequestOptions(**_given(values, (*OPTIONS, EXPLAIN)))


def _given(values: Mapping[str, Any], declared: Iterable[Field]) -> dict[str, Any]:
    return {field.name: values[field.name] for field in declared if field.name in values}


def choices(values: Mapping[str, Any]) -> int:
    """`n`, the number of answers to each prompt.  Raises InvalidParam."""
    n: int = values.get("n", 1)
    if values.get("best_of", 1) not in (1, n):
        raise InvalidParam("best_of", "best_of must be n: every answer that is made is given.", "unsupported_value")
    return n


def chat_logprobs(values: Mapping[str, Any]) -> int | None:
    """The number of alternatives to each token, None without log probabilities.  Raises InvalidParam."""
    requested, top = values.get("logprobs", False), values.get("top_logprobs", 0)
    if top and not requested:
        raise InvalidParam("top_logprobs", "top_logprobs is only allowed together with logprobs: true.")
    return top if requested else None
