"""OpenAI request bodies: JSON -> checked, typed values.  Pure functions; run in the api process.

A field is handled in one of four ways, and the tables below say which:

    used         it becomes part of the prompt or of the SamplingParams
    harmless     it cannot change the answer (bookkeeping, cache hints): accepted, nothing happens
    unsupported  it would change the answer, so anything but its neutral value is refused (`unsupported_parameter`)
    unknown      accepted, and its name is reported in the X-Ignored-Params header

`null` means the same as leaving the field out, everywhere.  Every refusal is a RequestError whose `param` is the field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from minisgl import grammar
from minisgl.api.engine import Prompt, TextPrompt, TokenPrompt
from minisgl.api.parsers.reply import WHOLE, Form
from minisgl.api.requests import structured_output
from minisgl.api.requests.chat_prompt import chat_prompt
from minisgl.api.requests.fields import Fields, parse_json, wrong_type
from minisgl.api.requests.sampling import chat_logprobs, choices, completion_logprobs, options, sampling, token_ids
from minisgl.api.requests.structured_output import Constraint, constraint
from minisgl.api.requests.tools import tools
from minisgl.errors import InvalidParam, RequestError
from minisgl.reasoning import STYLES
from minisgl.sampling_params import RequestOptions, SamplingParams

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")  # of thinking
MAX_PROMPTS = 1024  # of one completion request
COMPLETION_TOKENS = 16  # max_tokens of /v1/completions when the request does not say

HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",  # makes an answer faster elsewhere, never different
    }
)
_USED = frozenset(
    {
        "model",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "skip_special_tokens",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "min_tokens",
        "logprobs",
        "n",
        "best_of",
        "stream",
        "stream_options",
        "priority",
        "timeout",
        "cache_salt",
    }
)
CHAT_USED = (
    _USED
    | structured_output.USED
    | {"messages", "chat_template_kwargs", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "reasoning_effort"}
)
COMPLETION_USED = _USED | structured_output.USED | {"prompt", "add_special_tokens", "echo"}

# Field -> the values that ask for nothing.  null always does.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
}
CHAT_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    **_UNSUPPORTED,
    "echo": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"], []),
    "audio": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "chat_template": (),  # templates come with the model, never from a request
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
}
COMPLETION_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    **_UNSUPPORTED,
    "suffix": ("",),
}


__all__ = ["ChatRequest", "CompletionRequest", "GenerationRequest", "parse_chat", "parse_completion", "parse_json"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Which counts of tokens a stream tells: those of the whole in a last event, those so far in every event."""

    last: bool = False
    so_far: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What the two endpoints have in common.

    `model` is the served name to report; `n` the number of answers to each prompt; `usage` the counts of tokens that a stream
    tells; `ignored` are unknown field names; `bound_by` is the field to which params.grammar is due, `form` what an answer is
    taken apart into.
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
    form: Form = WHOLE


@dataclass(frozen=True, slots=True)
class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions; has exactly one prompt, a ChatPrompt."""


@dataclass(frozen=True, slots=True)
class CompletionRequest(GenerationRequest):
    """POST /v1/completions; choice i continues prompt i // n."""


_NONE: Mapping[str, Any] = {}
_USAGE = ("include_usage", "continuous_usage_stats")  # of stream_options


# ---------------- requests
def parse_chat(
    body: Mapping[str, Any],
    served: Sequence[str],
    defaults: Mapping[str, Any] = _NONE,
    tool_style: str = "",
    reasoning_style: str = "",
) -> ChatRequest:
    """Check the body of POST /v1/chat/completions.  `served`: the names this server answers to, the main one first.

    `defaults`: sampling parameters that hold where the body has none.  `tool_style`, `reasoning_style`: how the model writes
    calls of tools and thoughts, "" where it does not.  Without `max_tokens` the answer may go on to the end of the context.
    Raises RequestError: 400, or 404 for the model.
    """
    fields = Fields(body)
    model = served_model(fields, served)
    refuse_unsupported(body, CHAT_UNSUPPORTED)
    stream, usage, ignored = _stream(fields)
    switches, unheeded = _template_switches(fields, reasoning_style)
    body, ignored = {**body, "chat_template_kwargs": switches}, ignored + unheeded
    offered = tools(fields, tool_style)
    bound = constraint(fields)
    if offered.must and bound.grammar:
        text = f"{bound.field} and a tool_choice that demands a call exclude each other: an answer can have one form."
        raise InvalidParam(bound.field, text)
    if offered.must:
        bound = Constraint(offered.grammar, "tools")
    elif offered.given and bound.grammar:  # an answer of that form, or calls
        bound = Constraint(grammar.either(bound.grammar, offered.grammar), bound.field)
    text = _behind_thought(bound.grammar, reasoning_style)
    params = sampling(fields, None, defaults, logprobs=chat_logprobs(fields), grammar=text)
    if offered.style in ("llama3", "mistral"):  # whose calls begin with a special token
        params = replace(params, skip_special_tokens=False)
    return ChatRequest(
        model=model,
        prompts=(chat_prompt(body, offered.given),),
        n=choices(fields),
        params=params,
        options=options(fields),
        stream=stream,
        usage=usage,
        ignored=unknown_fields(body, CHAT_USED | CHAT_UNSUPPORTED.keys()) + ignored,
        bound_by=bound.field,
        form=Form(reasoning_style, offered.style, offered.names, offered.parallel),
    )


def _template_switches(fields: Fields, reasoning_style: str) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """`chat_template_kwargs`, behind what `reasoning_effort` says to the template of a model that thinks; and what is ignored.

    Some clients ask every model for an effort; one that cannot think does not make the request wrong.
    """
    given: dict[str, Any] | None = fields.get("chat_template_kwargs", dict, "an object")
    effort = fields.get("reasoning_effort", str, "a string")
    if effort not in (None, *EFFORTS):
        raise InvalidParam("reasoning_effort", f"reasoning_effort must be one of {', '.join(EFFORTS)}.")
    if reasoning_style and effort is not None:
        return {"enable_thinking": effort != "none", "reasoning_effort": effort, **(given or {})}, ()
    return given, ("reasoning_effort",) if effort not in (None, "none") else ()


def _behind_thought(text: str, style: str) -> str:
    """A model that thinks may do so before it is bound."""
    return grammar.after_thought(text, begun=STYLES[style].opened_by_prompt) if text and style else text


def parse_completion(body: Mapping[str, Any], served: Sequence[str], defaults: Mapping[str, Any] = _NONE) -> CompletionRequest:
    """Check the body of POST /v1/completions: `prompt` is a string, token ids, or a list of either.

    `defaults` as for a chat.  Without `max_tokens` a completion has 16 tokens.  Raises RequestError: 400, or 404 for the model.
    """
    fields = Fields(body)
    model = served_model(fields, served)
    refuse_unsupported(body, COMPLETION_UNSUPPORTED)
    stream, usage, ignored = _stream(fields)
    bound = constraint(fields)
    echo = fields.boolean("echo") or None
    return CompletionRequest(
        model=model,
        prompts=text_prompts("prompt", body.get("prompt"), add_special=fields.boolean("add_special_tokens", True)),
        n=choices(fields),
        params=sampling(
            fields, COMPLETION_TOKENS, defaults, logprobs=completion_logprobs(fields), echo=echo, grammar=bound.grammar
        ),
        options=options(fields),
        stream=stream,
        usage=usage,
        ignored=unknown_fields(body, COMPLETION_USED | COMPLETION_UNSUPPORTED.keys()) + ignored,
        bound_by=bound.field,
    )


def unknown_model(name: str, served: Sequence[str]) -> RequestError:
    """404 `model_not_found`, with the names that would do."""
    text = f"The model `{name[:100]}` does not exist. This server serves: {', '.join(served)}."
    return RequestError(text, status=404, param="model", code="model_not_found")


def served_model(fields: Fields, served: Sequence[str]) -> str:
    name = fields.get("model", str, "a string")
    if name is not None and name not in served:
        raise unknown_model(name, served)
    return served[0]


def _stream(fields: Fields) -> tuple[bool, Usage, tuple[str, ...]]:
    """(stream, what it tells of usage, names of unknown stream options)."""
    stream = fields.boolean("stream")
    options = fields.get("stream_options", dict, "an object")
    if not options:
        return stream, Usage(), ()
    if not stream:
        raise InvalidParam("stream_options", "stream_options is only allowed together with stream: true.")
    for name in _USAGE:
        if not isinstance(options.get(name), bool | None):
            raise wrong_type(f"stream_options.{name}", "a boolean", options[name])
    unknown = tuple(f"stream_options.{k}" for k, v in options.items() if k not in _USAGE and v is not None)
    return stream, Usage(*(bool(options.get(name)) for name in _USAGE)), unknown


def text_prompts(name: str, value: Any, *, add_special: bool) -> tuple[Prompt, ...]:
    """The prompts in the field `name`: a string, token ids, or a list of either.  Raises InvalidParam."""
    if value is None:
        raise InvalidParam(name, f"{name} is required.", "missing_required_parameter")
    if isinstance(value, str):
        return (TextPrompt(value, add_special),)
    if not isinstance(value, list):
        raise wrong_type(name, "a string, an array of strings, token ids or an array of token ids", value)
    if not value:
        raise InvalidParam(name, f"{name} is empty: there is nothing to continue.")
    if isinstance(value[0], int):
        return (TokenPrompt(token_ids(name, value)),)
    if len(value) > MAX_PROMPTS:
        raise InvalidParam(name, f"{name} holds {len(value)} prompts; one request may have {MAX_PROMPTS}.")
    if all(isinstance(p, str) for p in value):
        return tuple(TextPrompt(p, add_special) for p in value)
    if all(isinstance(p, list) for p in value):
        return tuple(TokenPrompt(token_ids(name, p)) for p in value)
    raise InvalidParam(name, f"the {name}s of one request must be all strings or all arrays of token ids.", "invalid_type")


# ---------------- fields that are not used
def refuse_unsupported(body: Mapping[str, Any], table: Mapping[str, tuple[Any, ...]]) -> None:
    for name, value in body.items():
        if name in table and value is not None and not any(_equal(value, neutral) for neutral in table[name]):
            raise InvalidParam(name, f"{name} is not supported by this server; leave it out.", "unsupported_parameter")


def _equal(value: Any, neutral: Any) -> bool:
    """Python holds that 0 == False; a field that takes the one does not mean it by the other."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def unknown_fields(body: Mapping[str, Any], known: Set[str]) -> tuple[str, ...]:
    return tuple(name for name in body if name not in known and name not in HARMLESS)
