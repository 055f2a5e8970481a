"""Reads the arguments of LLM, generate and chat: settings, prompts, conversations, sampling parameters.

Whatever a caller may write for them (numpy's numbers, tensors, tuples, mappings) becomes what the engine takes, or is refused
in a sentence that names the argument.  Pure functions; run in the process of LLM.
"""

from __future__ import annotations

import difflib
import json
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from minisgl.api.engine import Prompt, TextPrompt, TokenPrompt
from minisgl.api.requests import tools
from minisgl.api.requests.chat_prompt import check_messages, packed
from minisgl.config import EngineConfig, settings_of
from minisgl.errors import InvalidParam, RequestError, UserError
from minisgl.sampling_params import SamplingParams

# Names that are fields of SamplingParams and never variables of a template.
_SAMPLING = {f.name for f in fields(SamplingParams)} - {"tools", "thinking", "reasoning"}
_OURS = ("messages", "conversation", "tokenize", "prompts")  # names that a template never gets
# What other engines call the settings.
_ELSEWHERE = {
    **dict.fromkeys(("tensor_parallel_size", "tp_size"), "tp"),
    **dict.fromkeys(("max_model_len", "context_length", "n_ctx", "ctx_size", "max_seq_len"), "max_context"),
    **dict.fromkeys(("gpu_memory_utilization", "mem_fraction_static"), "memory_fraction"),
    **dict.fromkeys(("max_num_seqs", "max_running_requests", "max_batch_size"), "max_running"),
    **dict.fromkeys(("max_num_batched_tokens", "chunked_prefill_size"), "step_tokens"),
    **dict.fromkeys(("enable_prefix_caching", "disable_radix_cache"), "cache"),
    **dict.fromkeys(("model_path", "model_name"), "model"),
    **dict.fromkeys(("seed", "random_seed"), "sample_seed"),
    **dict.fromkeys(("max_tokens", "max_new_tokens"), "default_max_tokens"),
    **{"block_size": "page_size", "n_threads": "threads", "max_total_tokens": "kv_tokens", "enforce_eager": "graphs"},
}
_NO_LIST = (str, bytes, bytearray, set, frozenset, Mapping)  # that can be iterated over, but are no list of prompts or tokens


# ---------------- of LLM
def settings(given: Mapping[str, Any], others: Iterable[str]) -> dict[str, Any]:
    """The settings of the engine with values of their types; `others`: LLM's own arguments.

    Raises UserError for a name that is none, with the one that may be meant, and for a value of another type.
    """
    kinds = {name: type(default) for name, default, _ in settings_of(EngineConfig)}
    names = sorted([*kinds, *others])
    for name in given:
        if name not in kinds:
            near = [_ELSEWHERE[name]] if name in _ELSEWHERE else difflib.get_close_matches(name, names, 1)
            meant = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(names)}"
            raise UserError(f"LLM() has no setting {name!r}; {meant}")
    return {name: _setting(name, value, kinds[name]) for name, value in given.items()}


def _setting(name: str, value: Any, kind: type) -> Any:
    if value is None:
        return None
    if kind is str and not isinstance(value, str):
        raise UserError(f"{name} must be a string, not {type_of(value)}")
    if kind is int and not is_integer(value):
        raise UserError(f"{name} must be a whole number, not {type_of(value)}")
    if kind is float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise UserError(f"{name} must be a number, not {type_of(value)}")
    return kind(value)


# ---------------- of generate
def prompts_of(value: Any) -> list[Prompt]:
    """The prompts: a text, a list of token ids, a mapping with either of them, or a list of these.  Raises InvalidParam."""
    if isinstance(value, str | Mapping):
        return [_prompt(value, "prompts")]
    items = _items(value, "prompts", "a text, a list of token ids or a list of these")
    if items and is_integer(items[0]):
        return [_ids(items, "prompts")]
    return [_prompt(item, f"prompts[{i}]") for i, item in enumerate(items)]


def _prompt(value: Any, at: str) -> Prompt:
    if isinstance(value, str):
        return TextPrompt(value)
    if isinstance(value, Mapping):
        given = [name for name in ("prompt", "prompt_token_ids") if value.get(name) is not None]
        if len(given) != 1 or isinstance(value[given[0]], Mapping):
            text = f"{at} is a mapping: it must have either prompt, a text, or prompt_token_ids, a list of token ids."
            raise InvalidParam(at, text, "invalid_type")
        return _prompt(value[given[0]], f"{at}[{given[0]!r}]")
    return _ids(_items(value, at, "a text or a list of token ids"), at)


def _ids(ids: list[Any], at: str) -> TokenPrompt:
    for i, token in enumerate(ids):
        if type(token) is not int and not is_integer(token):
            raise wrong_type(f"{at}[{i}]", "a token id, which is a whole number", token)
    return TokenPrompt(tuple(map(int, ids)))


def _items(value: Any, at: str, expected: str) -> list[Any]:
    """What a list, an array, a tensor or another iterable holds."""
    if isinstance(value, _NO_LIST) or not isinstance(value, Iterable):
        raise wrong_type(at, expected, value)
    items = value.tolist() if hasattr(value, "tolist") else list(value)  # numpy's arrays, and tensors
    if not isinstance(items, list):  # an array without a dimension
        raise wrong_type(at, expected, value)
    return items


# ---------------- of chat
def conversations_of(value: Any) -> list[Any]:
    """The conversations in `messages`, which is one or a list of them; each is checked by `conversation`."""
    expected = 'a conversation, which is a list of messages such as {"role": "user", "content": "Hi"}, or a list of these'
    items = _items(value, "messages", expected)
    several = items and not isinstance(items[0], Mapping)
    for i, item in enumerate(items if several else ()):
        if isinstance(item, _NO_LIST) or not isinstance(item, Iterable):
            raise wrong_type(f"messages[{i}]", "a message (an object) or a list of messages", item)
    return [list(item) for item in items] if several else [items] if items else []


def conversation(messages: Any, variables: Mapping[str, Any]) -> Prompt | RequestError:
    """The prompt of a conversation as the server makes it, or what is wrong with it.  `variables`: see `variables_of`."""
    try:
        body, _ = tools.results_in_words({"messages": [dict(m) if isinstance(m, Mapping) else m for m in messages]})
        more = {name: value for name, value in variables.items() if name != "chat_template"}
        return packed(check_messages("messages", body["messages"]), more, variables.get("chat_template") or "")
    except RequestError as e:
        return e


def variables_of(kwargs: Any, template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a chat template: a mapping of them, and others.  Raises InvalidParam for what can be none."""
    if not isinstance(kwargs, Mapping | None):
        raise wrong_type("chat_template_kwargs", "a mapping", kwargs)
    found = {**(kwargs or {}), **template_kwargs}
    for name, value in found.items():
        if name in _SAMPLING:
            raise InvalidParam(name, f"{name} is no variable of a chat template: give it in SamplingParams({name}=...).")
        if name in _OURS:
            raise InvalidParam(name, f"{name} is no variable that a chat template may be given.")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as e:
            raise wrong_type(name, "a value that JSON can write, for the chat template", value) from e
    if not isinstance(template := found.get("chat_template"), str | None):
        raise wrong_type("chat_template", "a string", template)
    if found.get("continue_final_message") and found.get("add_generation_prompt"):
        name = "continue_final_message"
        raise InvalidParam(name, f"{name} and add_generation_prompt exclude each other.")
    if (given := found.pop("tools", None)) is None:
        return found
    if not isinstance(given, list):
        raise wrong_type("tools", "a list of tools", given)
    offered = tools.read({"tools": given}, "hermes").given  # for the template they are the same whatever the form of calls is
    return {**found, "tools": list(offered)} if offered else found


# ---------------- of both
def sampling_of(given: Any, n: int, of_what: str, defaults: Mapping[str, Any]) -> list[SamplingParams]:
    """The parameters of each of `n` prompts: those that are `given` for all or for each, over the defaults where that is a
    mapping.  Raises InvalidParam."""

    def one(value: Any, at: str) -> SamplingParams:
        if isinstance(value, SamplingParams):
            return value
        if not isinstance(value, Mapping | None):
            raise wrong_type(at, "a SamplingParams or a mapping of its fields", value)
        return SamplingParams(**{**defaults, **{str(name): v for name, v in (value or {}).items()}})

    if isinstance(given, SamplingParams | Mapping | None):
        return [one(given, "sampling_params")] * n
    each = _items(given, "sampling_params", "a SamplingParams, a mapping of its fields, or a list with one for each prompt")
    if len(each) != n:
        text = f"sampling_params holds {len(each)} SamplingParams for {n} {of_what}: give one, or one for each."
        raise InvalidParam("sampling_params", text)
    return [one(value, f"sampling_params[{i}]") for i, value in enumerate(each)]


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number, Python's or numpy's."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def type_of(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def wrong_type(at: str, expected: str, value: Any) -> InvalidParam:
    return InvalidParam(at, f"{at} must be {expected}, not {type_of(value)}.", "invalid_type")
