"""POST /generate: text or token ids in, text and token ids out, as SGLang has it.  Runs in the api process."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minisgl.api.engine import Engine
from minisgl.api.requests.fields import Fields, wrong_type
from minisgl.api.requests.generate import served_names
from minisgl.api.requests.openai import GenerationRequest, Usage, served_model, text_prompts, unknown_fields
from minisgl.api.requests.sampling import options, sampling
from minisgl.api.requests.structured_output import constraint
from minisgl.errors import InvalidParam
from minisgl.sampling_params import MAX_LOGPROBS

GENERATE_TOKENS = 128  # max_new_tokens where a request does not say
GENERATE_FIELDS = frozenset(
    {
        "model",
        "text",
        "input_ids",
        "sampling_params",
        "stream",
        "incremental",
        "return_logprob",
        "logprob_start_len",
        "top_logprobs_num",
        "priority",
        "timeout",
        "cache_salt",
        "rid",
    }
)
_FORMS = ("json_schema", "regex", "ebnf")
_RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
SAMPLING_FIELDS = frozenset(
    {
        *_RENAMED,
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "skip_special_tokens",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "n",
        *_FORMS,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeRequest(GenerationRequest):
    """`several`: the answer is an array.  `incremental`: events have what is new instead of all there is.
    `top`: alternatives of which log probabilities are told, None without; `scored`: those of the prompt, too."""

    several: bool
    incremental: bool
    top: int | None
    scored: bool
    rid: str


def parse_generate(engine: Engine, body: Mapping[str, Any]) -> NativeRequest:
    """Check the body of POST /generate, for the model that is served.  Raises RequestError."""
    fields, defaults = Fields(body), engine.config.sampling_defaults
    model = served_model(fields, served_names(engine.config))
    if (body.get("text") is None) == (body.get("input_ids") is None):
        raise InvalidParam("text", "give either text or input_ids.", "missing_required_parameter")
    name = "text" if body.get("text") is not None else "input_ids"
    given, kind = body[name], str if name == "text" else int
    several = isinstance(given, list) and not (name == "input_ids" and given and isinstance(given[0], int))
    first = given[0] if isinstance(given, list) and given else given
    if isinstance(first, list) and first:
        first = first[0]
    if isinstance(first, str | int) and not isinstance(first, kind):
        raise wrong_type(name, "a string or an array of them" if kind is str else "an array of token ids", first)
    prompts = text_prompts(name, given, add_special=True)
    inner = fields.get("sampling_params", dict, "an object") or {}
    if inner.get("n") not in (None, 1):
        raise InvalidParam("sampling_params.n", "sampling_params.n must be 1 here.", "unsupported_value")
    stream, wanted = fields.boolean("stream"), fields.boolean("return_logprob")
    start = fields.integer("logprob_start_len", -1, 1 << 31)
    scored = wanted and start is not None and start >= 0
    if scored and stream:
        raise InvalidParam("logprob_start_len", "the prompt is not scored in a stream; leave one of the two out.")
    top = (fields.integer("top_logprobs_num", 0, MAX_LOGPROBS) or 0) if wanted else None
    names = {_RENAMED.get(k, k): v for k, v in inner.items()}
    bound = constraint(Fields({name: inner.get(name) for name in _FORMS}))
    params = sampling(Fields(names), GENERATE_TOKENS, defaults, logprobs=top, echo=scored or None, grammar=bound.grammar)
    ignored = tuple(f"sampling_params.{k}" for k, v in inner.items() if k not in SAMPLING_FIELDS and v is not None)
    return NativeRequest(
        model=model,
        prompts=prompts,
        n=1,
        params=params,
        options=options(fields),
        stream=stream,
        usage=Usage(),
        bound_by=bound.field,
        ignored=unknown_fields(body, GENERATE_FIELDS) + ignored,
        several=several,
        incremental=fields.boolean("incremental"),
        top=top,
        scored=scored,
        rid=fields.get("rid", str, "a string") or uuid.uuid4().hex,
    )
