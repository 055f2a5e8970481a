"""Checks the bodies of POST /v1/chat/completions and /v1/completions, and turns them into typed requests.

The declarations say how each field is treated (see fields.py).  Pure functions; run in the api process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from minisgl import grammar
from minisgl.api.engine import Prompt, TextPrompt, TokenPrompt
from minisgl.api.parsers.reply import PLAIN, Form
from minisgl.api.requests import fields, sampling, structured_output, tools
from minisgl.api.requests.chat_prompt import MESSAGES, RENDERING, chat_prompt
from minisgl.api.requests.fields import Fields, Schema, refused, wrong_type
from minisgl.api.requests.sampling import OPTIONS, check_token_ids
from minisgl.api.requests.structured_output import Constraint, constraint
from minisgl.config import Config
from minisgl.errors import InvalidParam, RequestError
from minisgl.sampling_params import RequestOptions, SamplingParams

MAX_PROMPTS = 1024  # in one completion request
COMPLETION_TOKENS = 16  # max_tokens of /v1/completions when the request does not say
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")  # of reasoning
_VERBOSITIES = ("low", "medium", "high")
_USAGE = ("include_usage", "continuous_usage_stats")  # of stream_options


# ---------------- declarations
MODEL = fields.string("model", "One of the names in /v1/models; may be left out.")
STREAM = fields.boolean("stream", "Answer with server-sent events.")
ADD_SPECIAL_TOKENS = fields.boolean("add_special_tokens", "The tokenizer adds its own, such as BOS.")
_TOKENS: Schema = {"type": "array", "items": {"type": "integer"}}
TEXT_OR_TEXTS: Schema = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
TEXTS: Schema = {"oneOf": [*TEXT_OR_TEXTS["oneOf"], _TOKENS, {"type": "array", "items": _TOKENS}]}  # see text_prompts
EFFORT = fields.string("reasoning_effort", "Whether a model that thinks does so; its template may know degrees.", *_EFFORTS)
HARMLESS = fields.harmless(
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    "prediction",  # makes an answer faster elsewhere, never different
)
# What vLLM, SGLang and llama.cpp know beyond the dialects and would change the answer, with the values that ask for nothing.
EXTENSIONS = (
    refused("truncate_prompt_tokens", sentence="truncate_prompt_tokens is for /v1/embeddings: a prompt to go on is never cut."),
    refused("bad_words", [], sentence="bad_words is not supported by this server; logit_bias forbids single tokens."),
    *(
        refused(name, *neutral)
        for name, neutral in {
            "length_penalty": (1,),
            "use_beam_search": (False,),
            "prompt_logprobs": (),
            "allowed_token_ids": ([],),
            "logits_processors": ([],),
            "custom_logit_processor": ("",),
            "logprob_token_ids": ([],),
            "repetition_detection": (),
            "thinking_token_budget": (),
            "stop_regex": ([], ""),
            "lora_path": (),
            "lora_request": (),
            "prompt_embeds": (),
            "input_embeds": (),
            "image_data": ([],),
            "session_params": (),
            "include_stop_str_in_output": (False,),
            "no_stop_trim": (False,),
            "kv_transfer_params": (),
            "separate_reasoning": (True,),
            "repeat_penalty": (1,),
            "typical_p": (1,),
            "mirostat": (0,),
            "dry_multiplier": (0,),
            "xtc_probability": (0,),
        }.items()
    ),
)
_COMMON = (
    MODEL,
    *sampling.SAMPLING,
    *structured_output.FIELDS,
    *sampling.CHOICES,
    STREAM,
    fields.json_object(
        "stream_options",
        "include_usage: a last event has the counts of tokens; continuous_usage_stats: every event has those so far.",
        schema=fields.an_object({}, **dict.fromkeys(_USAGE, fields.BOOLEAN)),
    ),
    fields.boolean("return_cached_tokens_details", "sglext.cached_tokens_details, as SGLang reports the prefix cache."),
    *OPTIONS,
    sampling.EXPLAIN,
    *EXTENSIONS,
    *HARMLESS,
)
CHAT = Fields(
    fields.required(MESSAGES),
    *sampling.length(1),
    *sampling.CHAT_LOGPROBS,
    *tools.FIELDS,
    EFFORT,
    refused("echo", False),
    refused("functions", []),
    refused("function_call", "none", "auto"),
    refused("modalities", ["text"], []),
    refused("audio"),
    refused("moderation"),
    fields.string("verbosity", "Reported as ignored unless it is medium: no model here has degrees.", *_VERBOSITIES),
    refused("web_search_options"),
    *RENDERING,
    refused("documents", []),
    refused("add_special_tokens", False),
    *_COMMON,
)
COMPLETION = Fields(
    fields.required(fields.anything("prompt", "A text, token ids, or an array of either.", TEXTS)),
    ADD_SPECIAL_TOKENS,
    *sampling.length(0),
    sampling.COMPLETION_LOGPROBS,
    fields.boolean("echo", "The prompt stands before the answer."),
    refused("suffix", ""),
    *_COMMON,
)


# ---------------- requests
@dataclass(frozen=True, slots=True)
class Usage:
    """The token counts that an answer reports in addition.

    In a stream, the totals in a `last` event, and the counts `so_far` in every event.  `cached`: SGLang's details of the cache.
    """

    last: bool = False
    so_far: bool = False
    cached: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """The part that all requests for text have in common.

    `model`: the served name to report.  `n`: the number of answers to each prompt.  `ignored`: names of fields without
    effect.  `bound_by`: the field that prescribes params.grammar, `relaxed`: the keywords of its schemas that the grammar only
    approximates.  `form`: how an answer is parsed.
    """

    model: str
    prompts: tuple[Prompt, ...]
    n: int
    params: SamplingParams
    options: RequestOptions
    stream: bool
    usage: Usage
    ignored: tuple[str, ...]
    bound_by: str = ""
    form: Form = PLAIN
    relaxed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions; has exactly one prompt, a ChatPrompt.  `namespaces`: see tools.Tools."""

    namespaces: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CompletionRequest(GenerationRequest):
    """POST /v1/completions; choice i continues prompt i // n."""


def parse_chat(config: Config, body: Mapping[str, Any], *, name_chars: int = tools.NAME_CHARS) -> ChatRequest:
    """Check the body of POST /v1/chat/completions, for the model that is served.

    Without `max_tokens` the answer may go on to the end of the context.  `name_chars`: how long a tool's name may be.  Raises
    RequestError: 400, or 404 for the model.
    """
    body, left_out = tools.results_in_words(body)
    values, unknown = CHAT.read(body)
    model = served_model(config, values)
    usage, unknown_options = _usage(values)
    reasoning_style = config.server.reasoning_parser
    unheeded = _apply_effort(values, reasoning_style)
    bound = constraint(values)
    offered = tools.read(values, config.server.tool_call_parser, bind=bool(bound.grammar), name_chars=name_chars)
    bound = _chat_constraint(bound, offered)
    params = sampling.params(values, None, config, logprobs=sampling.chat_logprobs(values), grammar=bound.grammar)
    return ChatRequest(
        model=model,
        prompts=(chat_prompt(config, values, offered.given),),
        n=sampling.choices(values),
        params=replace(params, reasoning=reasoning_style, tools=offered.style),
        options=sampling.options(values),
        stream=values.get("stream", False),
        usage=usage,
        ignored=unknown + unknown_options + unheeded + left_out + offered.ignored + _without_degrees(values),
        bound_by=bound.field,
        form=Form(reasoning_style, offered.style, offered.names, offered.parallel, offered.parameters),
        relaxed=bound.relaxed,
        namespaces=offered.namespaces,
    )


def _apply_effort(values: dict[str, Any], reasoning_style: str) -> tuple[str, ...]:
    """Put `reasoning_effort` into the switches of a reasoning model's template; returns it as ignored for other models.

    Some clients ask every model for an effort; for a model that cannot reason the request is not wrong.
    """
    effort = values.get("reasoning_effort")
    if reasoning_style and effort is not None:
        switches = {"enable_thinking": effort != "none", "reasoning_effort": effort}
        values["chat_template_kwargs"] = {**switches, **values.get("chat_template_kwargs", {})}
        return ()
    return ("reasoning_effort",) if effort not in (None, "none") else ()


def _without_degrees(values: Mapping[str, Any]) -> tuple[str, ...]:
    """`verbosity` as ignored, if it asks for anything."""
    return ("verbosity",) if values.get("verbosity", "medium") != "medium" else ()


def _chat_constraint(bound: Constraint, offered: tools.Tools) -> Constraint:
    """What binds an answer that may or must call tools: a call is bound by its tool, text by `response_format`."""
    if offered.must and bound.grammar and bound.field != "response_format":
        text = f"{bound.field} and a tool_choice that demands a call exclude each other: an answer can have one form."
        raise InvalidParam(bound.field, text)
    if offered.must:
        return offered.bound
    if offered.given and bound.grammar:
        text = grammar.either(bound.grammar, offered.bound.grammar)
        return Constraint(text, bound.field, tuple(dict.fromkeys(bound.relaxed + offered.bound.relaxed)))
    return bound


def parse_completion(config: Config, body: Mapping[str, Any]) -> CompletionRequest:
    """Check the body of POST /v1/completions: `prompt` is a string, token ids, or a list of either.

    Without `max_tokens` a completion has 16 tokens.  Raises RequestError: 400, or 404 for the model.
    """
    values, unknown = COMPLETION.read(body)
    model = served_model(config, values)
    usage, unknown_options = _usage(values)
    bound = constraint(values)
    logprobs, echo = values.get("logprobs"), values.get("echo", False)
    return CompletionRequest(
        model=model,
        prompts=text_prompts("prompt", values["prompt"], add_special=values.get("add_special_tokens", True)),
        n=sampling.choices(values),
        params=sampling.params(values, COMPLETION_TOKENS, config, logprobs=logprobs, echo=echo, grammar=bound.grammar),
        options=sampling.options(values),
        stream=values.get("stream", False),
        usage=usage,
        ignored=unknown + unknown_options,
        bound_by=bound.field,
        relaxed=bound.relaxed,
    )


def served_names(config: Config) -> tuple[str, ...]:
    """The names of the model in /v1/models; answers report the first."""
    return config.server.served_names or (config.model.name,)


def check_model(config: Config, name: str) -> None:
    """Raises RequestError (404 `model_not_found`) with the names that are served, if `name` is another."""
    if name not in served_names(config) and not config.server.any_model_name:
        text = f"The model `{name[:100]}` does not exist. This server serves: {', '.join(served_names(config))}."
        raise RequestError(text, status=404, param="model", code="model_not_found")


def served_model(config: Config, values: Mapping[str, Any]) -> str:
    """The name of the model to report.  Raises RequestError (404) if the request has one that is not served."""
    if "model" in values:
        check_model(config, values["model"])
    return served_names(config)[0]


def _usage(values: Mapping[str, Any]) -> tuple[Usage, tuple[str, ...]]:
    """(the counts that the stream reports, the names of unknown stream options).  Raises InvalidParam."""
    given: Mapping[str, Any] = values.get("stream_options", {})
    if given and not values.get("stream"):
        raise InvalidParam("stream_options", "stream_options is only allowed together with stream: true.")
    for name in _USAGE:
        if not isinstance(given.get(name), bool | None):
            raise wrong_type(f"stream_options.{name}", "a boolean", given[name])
    unknown = tuple(f"stream_options.{k}" for k, v in given.items() if k not in _USAGE and v is not None)
    last, so_far = (bool(given.get(name)) for name in _USAGE)
    return Usage(last, so_far, values.get("return_cached_tokens_details", False)), unknown


def text_prompts(name: str, value: Any, *, add_special: bool, keep: int = 0) -> tuple[Prompt, ...]:
    """The prompts in the field `name`: a string, token ids, or a list of either.  Raises InvalidParam.

    `keep`: only so many tokens from the beginning of each, 0 for all.
    """

    def ids(value: list[Any]) -> Prompt:
        return TokenPrompt(check_token_ids(name, value)[: keep or None], name)

    if isinstance(value, str):
        return (TextPrompt(value, add_special, keep, name),)
    if not isinstance(value, list):
        raise wrong_type(name, "a string, an array of strings, token ids or an array of token ids", value)
    if not value:
        raise InvalidParam(name, f"{name} is empty: there is nothing to continue.")
    if isinstance(value[0], int):
        return (ids(value),)
    if len(value) > MAX_PROMPTS:
        raise InvalidParam(name, f"{name} holds {len(value)} prompts; one request may have {MAX_PROMPTS}.")
    if all(isinstance(p, str) for p in value):
        return tuple(TextPrompt(p, add_special, keep, name) for p in value)
    if all(isinstance(p, list) for p in value):
        return tuple(map(ids, value))
    raise InvalidParam(name, f"the {name}s of one request must be all strings or all arrays of token ids.", "invalid_type")
