"""Defines the parameters of a request and the reasons for its end: plain values that every process understands.

Standard library only.
"""

from __future__ import annotations

import difflib
import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from minisgl.errors import InvalidParam
from minisgl.reasoning import CALL_STYLES, STYLES

T = TypeVar("T")
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_EOS_IDS = 128  # EOS tokens of a model that `min_tokens` can rule out
MAX_LOGIT_BIAS = 1024  # tokens with a bias
MAX_LOGPROBS = 20  # alternatives to a token
MAX_REPETITION_PENALTY = 100.0
MAX_SEED = (1 << 63) - 1
MAX_PRIORITY = 100  # and down to its negative: a bounded number of lanes
MAX_SALT_CHARS = 256
MAX_TIMEOUT = 1e6  # seconds
POOLINGS = ("", "mean", "last")  # "": the answer is text, not a vector
_MAX_INT = (1 << 31) - 1  # the 32-bit fields of a plan hold no more

_RANGES: dict[str, tuple[float, float]] = {  # fields of SamplingParams -> lowest and highest value
    "max_tokens": (0, _MAX_INT),
    "top_k": (0, _MAX_INT),
    "seed": (-MAX_SEED, MAX_SEED),
    "min_tokens": (0, _MAX_INT),
    "logprobs": (0, MAX_LOGPROBS),
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.0, MAX_REPETITION_PENALTY),
}
_OPTIONAL = ("max_tokens", "seed", "logprobs")  # may be None
_SWITCHES = ("ignore_eos", "skip_special_tokens", "echo", "thinking")


class Finish(enum.IntEnum):
    """Why a request ended.  One byte on the wire; 0 means that it continues."""

    NONE = 0
    STOP = 1  # an EOS token, a stop token or a stop string
    LENGTH = 2  # max_tokens or the context was reached
    ABORT = 3  # the client went away or cancelled
    GRAMMAR = 4  # its grammar became too complex to follow
    NAN = 5  # its logits were no finite numbers

    @property
    def reason(self) -> str | None:
        """The OpenAI `finish_reason`; the members from ABORT on reach clients as errors."""
        return "error" if self is Finish.NAN else self.name.lower() if self else None


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """How a request is scheduled and answered, apart from its text.

    `priority`: higher runs first and is retracted last.  `timeout`: seconds from arrival until it is ended with an error, 0 for
    none; `began`: when it arrived, on the clock of the api process, 0: now.  `cache_salt`: prompts share cached prefixes only
    with prompts of the same salt.

    `client` and `call`: whose request it is, as opaque numbers.  Clients share the engine equally, calls of a client its share.
    `owner`: the tenant whose prompt it is, as such a number, 0 without keys.

    `explain_cache`: the answer says why no more of its prompt was cached.

    `pooling`: the answer is a vector instead of text, the mean or the last of the prompt's final hidden states.  Such a
    request draws one token, which is dropped.
    Raises `InvalidParam` naming the field when a value cannot be used.
    """

    priority: int = 0
    timeout: float = 0.0
    cache_salt: str = ""
    pooling: str = ""
    client: int = 0
    call: int = 0
    began: float = 0.0
    explain_cache: bool = False
    owner: int = 0

    def __post_init__(self) -> None:
        _check_number("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        _check_number("timeout", self.timeout, 0.0, MAX_TIMEOUT)
        _check_text("cache_salt", self.cache_salt, "a string")
        if len(self.cache_salt) > MAX_SALT_CHARS:
            raise InvalidParam("cache_salt", f"cache_salt may have at most {MAX_SALT_CHARS} characters.")
        if self.pooling not in POOLINGS:
            raise InvalidParam("pooling", "pooling must be mean or last.")


def _names_fields(cls: type[T]) -> type[T]:
    """Have the constructor of a dataclass refuse an unknown field by its name, with the one that may be meant."""
    init, names = cls.__init__, cls.__annotations__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        for name in given.keys() - names.keys():
            near = difflib.get_close_matches(name, names, 1)
            meant = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(names)}."
            raise InvalidParam(name, f"{cls.__name__} has no field {name}; {meant}", "unknown_parameter")
        init(self, *args, **given)

    cls.__init__ = checked  # type: ignore[method-assign]
    return cls


@_names_fields
@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue one prompt.

    `max_tokens=None` generates until the end of the context, or LLM's `default_max_tokens`; 0 is for `echo` alone.
    `temperature=0` and `top_p=0` are greedy.  `top_k=0`, `top_p=1` and `min_p=0` switch those filters off; they apply in that
    order, to the distribution after temperature.
    With an explicit `seed` the same prompt gives the same text whatever else is running: the random number of a token
    is a function of (seed, position).

    Before that, the logits change in this order: `logit_bias` is added (token id -> bias; a mapping or pairs), and EOS and stop
    tokens are impossible before `min_tokens`; `repetition_penalty` divides the positive and multiplies the negative logits of
    all tokens of prompt and answer (Keskar et al., arXiv:1909.05858); `frequency_penalty` is subtracted from a token's logit
    once for each of its occurrences in the answer, `presence_penalty` once if there is any.

    `logprobs` returns the log probability of every token and of this number of alternatives, in the model's own distribution:
    before bias, penalties and temperature.  `echo` puts the prompt before the answer, with its log probabilities if `logprobs`
    is set.

    `grammar`, made by a function of minisgl.grammar, constrains the answer; it outranks `min_tokens` and every bias.

    `reasoning` and `tools`: how thoughts (reasoning.STYLES) and tool calls (parsers.tool_calls.FORMATS) are written that are
    told from the answer: stop strings count outside of them, and their marks have a text.  `thinking`: the prompt ends inside
    a thought.
    Raises `InvalidParam` naming the field when there is none of that name, or a value cannot be used.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    echo: bool = False
    grammar: str = ""
    reasoning: str = ""
    thinking: bool = False
    tools: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _as_pairs(self.logit_bias))
        self._check_numbers()
        self._check_stops()
        self._check_logit_bias()
        _check_text("grammar", self.grammar, "a string, as minisgl.grammar makes it")
        for name, known in (("reasoning", STYLES), ("tools", CALL_STYLES)):
            style = getattr(self, name)
            if style != "" and (not isinstance(style, str) or style not in known):
                raise InvalidParam(name, f"{name} must be one of {', '.join(known)}, or empty.")

    def _check_numbers(self) -> None:
        for name in (*_RANGES, *_SWITCHES):
            if hasattr(value := getattr(self, name), "tolist"):
                object.__setattr__(self, name, _plain(value))
        for name, (low, high) in _RANGES.items():
            if (value := getattr(self, name)) is not None or name not in _OPTIONAL:
                _check_number(name, value, low, high)
        for name in _SWITCHES:
            if not isinstance(value := getattr(self, name), bool):
                raise InvalidParam(name, f"{name} must be True or False, got {type(value).__name__}.", "invalid_type")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidParam("max_tokens", f"max_tokens must be between 1 and {_MAX_INT}, got 0.")
        if self.top_p == 0.0:  # the likeliest token alone
            object.__setattr__(self, "temperature", 0.0)
            object.__setattr__(self, "top_p", 1.0)
        if self.repetition_penalty == 0.0:
            raise InvalidParam("repetition_penalty", "repetition_penalty must be greater than 0 (1 is no penalty).")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParam("min_tokens", f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens}).")

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidParam("stop", f"stop holds {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed.")
        for text in self.stop:
            _check_text("stop", text, "a string or a list of strings")
            if not 0 < len(text) <= MAX_STOP_CHARS:
                raise InvalidParam("stop", f"each stop string must have 1 to {MAX_STOP_CHARS} characters.")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidParam("stop_token_ids", f"stop_token_ids may hold at most {MAX_STOP_TOKEN_IDS} ids.")
        for token in self.stop_token_ids:
            _check_number("stop_token_ids", token, 0, _MAX_INT)

    def _check_logit_bias(self) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidParam("logit_bias", f"logit_bias may hold at most {MAX_LOGIT_BIAS} tokens.")
        for token, value in self.logit_bias:
            _check_number("logit_bias", token, 0, _MAX_INT)
            _check_number("logit_bias", value, -100.0, 100.0)
        if len(dict(self.logit_bias)) < len(self.logit_bias):
            raise InvalidParam("logit_bias", "logit_bias names a token twice.")

    @property
    def penalised(self) -> bool:
        """Whether tokens of the answer change the logits of later ones."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)


def _as_tuple(value: object) -> tuple[object, ...]:
    """A list as a tuple, and a single value as a tuple of one: offline, `stop="\n"` is natural to write.  None: nothing."""
    value = _plain(value)
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else () if value is None else (value,)


def _plain(value: Any) -> Any:
    """Numbers, arrays and tensors as Python's own: nothing else fits into a message."""
    return value.tolist() if hasattr(value, "tolist") else value


def _as_pairs(value: object) -> tuple[tuple[int, float], ...]:
    value = () if value is None else tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        raise InvalidParam("logit_bias", "logit_bias must map token ids to numbers.", "invalid_type")
    return tuple((_plain(token), _plain(bias)) for token, bias in value)


def _check_text(name: str, value: object, kind: str) -> None:
    """Refuse what is not a string; `kind`: what the field must be."""
    if not isinstance(value, str):
        raise InvalidParam(name, f"{name} must be {kind}.", "invalid_type")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise InvalidParam(name, f"{name} holds half of a surrogate pair, which is not text.") from e


def _check_number(name: str, value: object, low: float, high: float) -> None:
    """Refuse a value outside low..high, NaN included, and a fraction where the bounds are integers."""
    integer = isinstance(low, int)
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        kind = "an integer" if integer else "a number"
        raise InvalidParam(name, f"{name} must be {kind}, got {type(value).__name__}.", "invalid_type")
    if not low <= value <= high:
        bounds = f"{low} and {high}" if integer else f"{low:g} and {high:g}"
        raise InvalidParam(name, f"{name} must be between {bounds}, got {value}.")


DEFAULT_OPTIONS = RequestOptions()
