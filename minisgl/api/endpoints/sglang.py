"""Serves POST /generate, as SGLang has it: text or token ids in, text and token ids out.  Runs in the api process."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minisgl.api.requests import fields, openai, sampling
from minisgl.api.requests.fields import Field, Fields, wrong_type
from minisgl.api.requests.openai import GenerationRequest, Usage, served_model, text_prompts
from minisgl.api.requests.structured_output import NATIVE, constraint
from minisgl.config import Config
from minisgl.errors import InvalidParam
from minisgl.sampling_params import MAX_LOGPROBS

GENERATE_TOKENS = 128  # max_new_tokens where a request does not say
MAX_REPEATED = 4000  # log probabilities in one event of a stream whose events have all of the answer so far


def _check_prompt(name: str, value: Any) -> Any:
    """Texts in `text`, token ids in `input_ids`; text_prompts checks everything else."""
    kind, expected = (str, "a string or an array of them") if name == "text" else (int, "an array of token ids")
    first = value
    for _ in range(2):
        first = first[0] if isinstance(first, list) and first else first
    if isinstance(first, str | int) and not isinstance(first, kind):
        raise wrong_type(name, expected, first)
    return value


def _check_n(name: str, value: Any) -> Any:
    if value != 1:
        raise InvalidParam("sampling_params.n", "sampling_params.n must be 1 here.", "unsupported_value")
    return value


SAMPLING_PARAMS = Fields(sampling.length(0)[0], *sampling.SAMPLING, *NATIVE, Field("n", "Must be 1.", {"enum": [1]}, _check_n))
_RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
_NAMES = {name: new for new, name in _RENAMED.items()}
_PARAMS = fields.an_object({}, **{_NAMES.get(f.name, f.name): f.schema for f in SAMPLING_PARAMS})
GENERATE = Fields(
    openai.MODEL,
    Field("text", "A text, or several.", openai.TEXT_OR_TEXTS, _check_prompt),
    Field("input_ids", "Token ids, or several lists of them.", {"oneOf": openai.TEXTS["oneOf"][2:]}, _check_prompt),
    fields.json_object("sampling_params", "As those of a completion, under SGLang's names.", schema=_PARAMS),
    openai.STREAM,
    fields.boolean("incremental", "Events hold what is new, not all of the text so far."),
    fields.boolean("return_logprob", "With log probabilities."),
    fields.integer("logprob_start_len", "0: of the prompt, too; -1: of the answer alone.", -1),
    fields.integer("top_logprobs_num", "Alternatives to each token.", 0, MAX_LOGPROBS),
    *sampling.OPTIONS,
    fields.string("rid", "Comes back as meta_info.id."),
    *openai.HARMLESS,
    either=("text", "input_ids"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeRequest(GenerationRequest):
    """POST /generate, checked.

    `several`: the answer is an array.  `incremental`: events have new text only instead of all so far.  `top`: the number of
    alternatives to report with each log probability, None without log probabilities.  `scored`: the prompt has them, too.
    """

    several: bool
    incremental: bool
    top: int | None
    scored: bool
    rid: str


def parse_generate(config: Config, body: Mapping[str, Any]) -> NativeRequest:
    """Check the body of POST /generate, for the model that is served.  Raises RequestError: 400, or 404 for the model."""
    values, unknown = GENERATE.read(body)
    model = served_model(config, values)
    name = "text" if "text" in values else "input_ids"
    given = values[name]
    inner = {_RENAMED.get(k, k): v for k, v in values.get("sampling_params", {}).items() if v is not None}
    params, unknown_params = SAMPLING_PARAMS.read(inner)
    top, scored = _logprobs(values)
    bound = constraint(params)
    sampled = sampling.params(params, GENERATE_TOKENS, config, logprobs=top, echo=scored, grammar=bound.grammar)
    stream, incremental = values.get("stream", False), values.get("incremental", False)
    entries = (sampled.max_tokens or config.max_context) * (1 + (top or 0))
    if stream and not incremental and top is not None and entries > MAX_REPEATED:
        text = (
            f"every event of this stream would repeat up to {entries} log probabilities, of {MAX_REPEATED} that are allowed; "
        )
        raise InvalidParam("incremental", text + "use incremental: true, or fewer tokens or alternatives.")
    return NativeRequest(
        model=model,
        prompts=text_prompts(name, given, add_special=True),
        n=1,
        params=sampled,
        options=sampling.options(values),
        stream=stream,
        usage=Usage(),
        bound_by=bound.field,
        relaxed=bound.relaxed,
        ignored=unknown + tuple(f"sampling_params.{name}" for name in unknown_params),
        several=isinstance(given, list) and not (name == "input_ids" and given and isinstance(given[0], int)),
        incremental=incremental,
        top=top,
        scored=scored,
        rid=values.get("rid") or uuid.uuid4().hex,
    )


def _logprobs(values: Mapping[str, Any]) -> tuple[int | None, bool]:
    """(the number of alternatives, None without log probabilities; whether to score the prompt).  Raises InvalidParam."""
    if not values.get("return_logprob", False):
        return None, False
    scored = values.get("logprob_start_len", -1) >= 0
    if scored and values.get("stream", False):
        raise InvalidParam("logprob_start_len", "the prompt is not scored in a stream; leave one of the two out.")
    return values.get("top_logprobs_num", 0), scored
