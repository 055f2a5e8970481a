"""Requests, their parameters and the limits of the machine as plain values, with and without what people have written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any

import numpy as np

from minisgl.actors.scheduler.interface import SchedulerLimits
from minisgl.actors.scheduler.request import Request
from minisgl.arrays import I32
from minisgl.cache.no_cache import CACHES
from minisgl.errors import UserError
from minisgl.sampling_params import DEFAULT_OPTIONS, RequestOptions, SamplingParams

_PLAIN = SamplingParams()
_STATE = ("arrived", "order", "finish", "missing_pages", "overtaken_by", "resumed", "borrows", "retried", "scored")


def veil(params: SamplingParams) -> SamplingParams:
    """The parameters without words: a grammar, biases, stop tokens of the same size that say nothing, and no stop strings.

    What the scheduler decides depends on the sizes alone; the tokens that end an answer are marked in its results.
    """
    if not (params.grammar or params.logit_bias or params.stop_token_ids or params.stop):
        return params
    return replace(
        params,
        grammar=_veiled(params.grammar),
        logit_bias=tuple((i, 0.0) for i in range(len(params.logit_bias))),
        stop_token_ids=tuple(range(len(params.stop_token_ids))),
        stop=(),
    )


def _veiled(text: str) -> str:
    """A text of as many characters, and as many bytes in UTF-8."""
    more = len(text.encode()) - len(text)
    wide, rest = divmod(more, 3)
    return "😀" * wide + ("", "é", "€")[rest] + "x" * (len(text) - wide - (rest > 0))


def _changes(default: Any) -> Callable[[Any], dict[str, Any]]:
    """What tells the fields in which another of its kind differs from `default`, without asking for their names again."""
    names = tuple(f.name for f in fields(default))
    values = attrgetter(*names)
    plain = values(default)

    def found(other: Any) -> dict[str, Any]:
        mine = values(other)
        return {} if mine == plain else {n: v for n, v, d in zip(names, mine, plain, strict=True) if v != d}

    return found


_params, _options = _changes(_PLAIN), _changes(DEFAULT_OPTIONS)


def params_of(params: SamplingParams) -> dict[str, Any]:
    """The fields that are not the default."""
    return _params(params)


def options_of(options: RequestOptions, salt: str) -> dict[str, Any]:
    """The fields that are not the default, with another salt."""
    found = _options(options)
    return found | {"cache_salt": salt} if salt else found


def make_request(uid: int, ids: I32, values: Sequence[Any]) -> Request:
    """A request from the further values of its record, see snapshot.request_values."""
    limit, seed, params, options, n_prompt, scored = values
    if "logit_bias" in params:
        params = params | {"logit_bias": tuple(map(tuple, params["logit_bias"]))}
    made = SamplingParams(**params)
    request = Request(uid, ids, limit, seed, made, RequestOptions(**options), n_prompt=n_prompt, scored=scored)
    request.salt = request.options.cache_salt  # recorded is the cache's, not the client's
    return request


def state_of(request: Request) -> list[Any]:
    """What the machine has written into a request."""
    return [getattr(request, name) for name in _STATE]


def set_state(request: Request, state: list[Any]) -> None:
    """The inverse of `state_of`."""
    for name, value in zip(_STATE, state, strict=True):
        setattr(request, name, value)


# ---------------- limits
def limits_of(limits: SchedulerLimits) -> dict[str, Any]:
    """The limits as plain values.  Raises UserError for a cache that has no name."""
    names = {cache: name for name, cache in CACHES.items()}
    if limits.cache not in names:
        raise UserError(f"a journal knows the caches {', '.join(CACHES)}, not {limits.cache.__name__}")
    values = {f.name: getattr(limits, f.name) for f in fields(limits)}
    return values | {"cache": names[limits.cache], "eos_ids": list(limits.eos_ids)}


def make_limits(values: dict[str, Any]) -> SchedulerLimits:
    """The inverse of `limits_of`.  Raises UserError for values of another version."""
    try:
        return SchedulerLimits(**{**values, "cache": CACHES[values["cache"]], "eos_ids": tuple(values["eos_ids"])})
    except (KeyError, TypeError) as e:
        raise UserError(f"the journal was written by a version with other limits ({e})") from e


def pack(array: Any) -> bytes:
    """The elements of an array of integers as i32."""
    raw: bytes = np.ascontiguousarray(array, "<i4").tobytes()
    return raw


def unpack(raw: bytes) -> I32:
    """The inverse of `pack`, writable."""
    found: I32 = np.frombuffer(raw, "<i4").astype(np.int32)
    return found
