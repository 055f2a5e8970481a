"""Request bodies: what is accepted, what it becomes, and how everything else is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from conftest import fake_spec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minisgl.api.engine import ChatPrompt, TextPrompt, TokenPrompt
from minisgl.api.requests import openai as api
from minisgl.api.requests.chat_prompt import MAX_MESSAGES
from minisgl.api.requests.fields import Fields, Support, harmless, integer, parse_json, refused, required
from minisgl.api.requests.openai import Usage, parse_chat, parse_completion
from minisgl.api.requests.sampling import MAX_CHOICES
from minisgl.config import Config, SamplingDefaults, ServerConfig
from minisgl.errors import InvalidParam, RequestError
from minisgl.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    RequestOptions,
    SamplingParams,
)

SERVED = Config(fake_spec(), server=ServerConfig(served_names=("tiny", "alias")))
USER = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> api.ChatRequest:
    return parse_chat(SERVED, {"messages": USER, **fields})


def completion(**fields: Any) -> api.CompletionRequest:
    return parse_completion(SERVED, {"prompt": "hi", **fields})


def refusal(call: Any, *args: Any, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        call(*args, **fields)
    return caught.value


def attempt(call: Any, *args: Any, **fields: Any) -> Any:
    try:
        return call(*args, **fields)
    except RequestError as e:
        return e


def rendered(request: api.ChatRequest) -> dict[str, Any]:
    (prompt,) = request.prompts
    assert isinstance(prompt, ChatPrompt)
    return json.loads(prompt.payload)


# ---------------- JSON
@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"", "line 1, column 1"),
        (b'{\n "a": 1,\n oops}', "line 3, column 2"),
        (b"[1, 2]", "must be an object, not an array"),
        (b"null", "must be an object, not null"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1} trailing', "line 1, column 10"),
    ],
)
def test_what_is_not_plain_json_is_refused_with_its_place(raw: bytes, fault: str) -> None:
    error = refusal(parse_json, raw)
    assert (error.status, error.code, error.param) == (400, "invalid_json", None)
    assert fault in error.message


def test_a_json_error_never_repeats_the_body() -> None:
    for raw in (
        b'{"key": SECRET}',
        b'{"SECRET": "\\q"}',
        b'{"SECRET": "\n"}',
        b'{"SECRET": NaN}',
        b'"SECRET"',
        b'{"SECRET": "\\ud800"}',
    ):
        assert "SECRET" not in refusal(parse_json, raw).message


def test_json_is_read_as_json() -> None:
    assert parse_json(b'{"a": 1, "a": 2, "b": "\\ud83d\\ude00", "c": 0.5}') == {"a": 2, "b": "\U0001f600", "c": 0.5}


# ---------------- defaults and the fields that are used
def test_a_minimal_chat_may_go_on_to_the_end_of_the_context() -> None:
    request = chat()
    assert request.params == SamplingParams()
    assert (request.model, request.stream, request.usage, request.ignored) == ("tiny", False, Usage(), ())
    assert rendered(request) == {"messages": USER, "kwargs": {}}


def test_a_minimal_completion_has_sixteen_tokens() -> None:
    request = completion()
    assert request.params == SamplingParams(max_tokens=16)
    assert request.prompts == (TextPrompt("hi", True),)


def test_every_sampling_field_reaches_the_engine() -> None:
    fields = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "seed": -3,
        "stop": ["a", "b"],
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "presence_penalty": -0.5,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"7": 5, "0": -100},
        "min_tokens": 3,
    }
    want = SamplingParams(**{**fields, "stop": ("a", "b"), "stop_token_ids": (1, 2), "logit_bias": ((7, 5.0), (0, -100.0))})
    assert chat(**fields).params == want
    assert completion(**fields).params == want


def test_log_probabilities_and_echo_are_asked_for_in_the_way_of_each_endpoint() -> None:
    assert chat(logprobs=True).params == SamplingParams(logprobs=0)
    assert chat(logprobs=True, top_logprobs=20).params == SamplingParams(logprobs=20)
    for off in ({"logprobs": False}, {"top_logprobs": 0}, {"logprobs": False, "top_logprobs": 0}):
        assert chat(**off).params.logprobs is None
    assert completion(logprobs=0).params == SamplingParams(max_tokens=16, logprobs=0)
    assert completion(logprobs=False).params.logprobs is None
    assert completion(logprobs=1, echo=True, max_tokens=0).params == SamplingParams(max_tokens=0, logprobs=1, echo=True)
    assert completion(echo=False).params.echo is False
    assert refusal(chat, logprobs=1).code == "invalid_type"
    assert refusal(completion, logprobs=True).code == "invalid_type"
    assert refusal(chat, logprobs=False, top_logprobs=2).param == "top_logprobs"
    assert refusal(completion, max_tokens=0).param == "max_tokens"


def test_several_answers_are_asked_for_with_n_and_best_of_may_only_repeat_it() -> None:
    assert (chat().n, chat(n=3).n, completion(n=2, best_of=2).n, completion(best_of=1).n) == (1, 3, 2, 1)
    for call in (chat, completion):
        assert (refusal(call, best_of=2).param, refusal(call, n=3, best_of=2).code) == ("best_of", "unsupported_value")


def test_off_may_be_said_in_several_ways() -> None:
    assert chat(top_k=-1).params.top_k == 0
    assert chat(stop="x").params.stop == ("x",)
    assert chat(stop=[]).params.stop == ()
    assert chat(max_completion_tokens=5).params.max_tokens == 5
    assert chat(max_tokens=9, max_completion_tokens=5).params.max_tokens == 5
    assert completion(add_special_tokens=False).prompts == (TextPrompt("hi", False),)


def test_null_is_the_same_as_nothing_for_every_optional_field() -> None:
    for call, fields in ((chat, api.CHAT), (completion, api.COMPLETION)):
        names = {field.name for field in fields} - {"messages", "prompt"}
        assert call(**dict.fromkeys(names)) == call()


def test_every_field_has_one_support() -> None:
    for fields in (api.CHAT, api.COMPLETION):
        kinds = [{field.name for field in fields.having(support)} for support in Support]
        assert len(set().union(*kinds)) == sum(map(len, kinds)) == len(list(fields))
        assert {field.name for field in api.HARMLESS} <= kinds[1]


def test_a_field_cannot_be_declared_twice() -> None:
    with pytest.raises(ValueError, match="twice"):
        Fields(*harmless("user", "user"))


def test_a_declaration_alone_makes_a_field_supported_harmless_or_refused() -> None:
    fields = Fields(
        required(integer("size", "How large.", 1, 9)),
        *harmless("note"),
        refused("twice", False),
        refused("no", sentence="Never."),
    )
    assert fields.read({"size": 3, "note": [1], "twice": False, "colour": 1, "x": None}) == (
        {"size": 3, "note": [1], "twice": False},
        ("colour", "x", "note"),
    )
    for nothing in (None, False, "", [], {}):
        assert fields.read({"size": 3, "note": nothing})[1] == ()
    for body, param, message in (
        ({}, "size", "size is required."),
        ({"size": None}, "size", "size is required."),
        ({"size": 10}, "size", "size must be between 1 and 9."),
        ({"size": True}, "size", "size must be an integer, not a boolean."),
        ({"size": 1, "twice": 0}, "twice", "twice is not supported by this server; leave it out."),
        ({"size": 1, "no": 1}, "no", "Never."),
    ):
        error = refusal(fields.read, body)
        assert (error.param, error.message) == (param, message)


def test_neutral_values_of_unsupported_fields_change_nothing() -> None:
    for call, fields in ((chat, api.CHAT), (completion, api.COMPLETION)):
        for field in fields.having(Support.REFUSED):
            for value in field.neutral:
                assert call(**{field.name: value}) == call(), field.name
    assert chat(presence_penalty=0.0, repetition_penalty=1.0, logit_bias=[], min_tokens=0, n=1) == chat()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("functions", [{}]),
        ("modalities", ["audio"]),
        ("chat_template", "{{ 1 }}"),
        ("echo", True),
        ("echo", 0),
        ("use_beam_search", True),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(name: str, value: object) -> None:
    error = refusal(chat, **{name: value})
    assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")
    assert name in error.message


def test_completions_refuse_what_they_cannot_do() -> None:
    error = refusal(completion, suffix="x")
    assert (error.status, error.param, error.code) == (400, "suffix", "unsupported_parameter")


def test_unknown_and_harmless_fields_are_reported() -> None:
    request = chat(user="u", metadata={"a": [1]}, store=True, frobnicate=1, stream=True, stream_options={"colour": True})
    assert request.ignored == ("frobnicate", "user", "metadata", "store", "stream_options.colour")


# ---------------- wrong types and ranges
@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("max_tokens", "5", "invalid_type"),
        ("max_tokens", 5.0, "invalid_type"),
        ("max_tokens", True, "invalid_type"),
        ("max_tokens", 0, "invalid_value"),
        ("max_completion_tokens", -1, "invalid_value"),
        ("max_tokens", 10**400, "invalid_value"),
        ("temperature", "hot", "invalid_type"),
        ("temperature", False, "invalid_type"),
        ("temperature", -0.1, "invalid_value"),
        ("temperature", 2.1, "invalid_value"),
        ("temperature", 10**400, "invalid_value"),
        ("top_p", -1, "invalid_value"),
        ("top_p", 1.5, "invalid_value"),
        ("top_k", -2, "invalid_value"),
        ("top_k", 1 << 31, "invalid_value"),
        ("min_p", -1, "invalid_value"),
        ("seed", 1 << 63, "invalid_value"),
        ("seed", "lucky", "invalid_type"),
        ("stop", 5, "invalid_type"),
        ("stop", [5], "invalid_type"),
        ("stop", "", "invalid_value"),
        ("stop", "x" * (MAX_STOP_CHARS + 1), "invalid_value"),
        ("stop", ["x"] * (MAX_STOP_STRINGS + 1), "invalid_value"),
        ("stop", {}, "invalid_type"),
        ("stop_token_ids", 5, "invalid_type"),
        ("stop_token_ids", ["5"], "invalid_type"),
        ("stop_token_ids", [True], "invalid_type"),
        ("stop_token_ids", [-1], "invalid_value"),
        ("stop_token_ids", [1 << 31], "invalid_value"),
        ("stop_token_ids", [1] * (MAX_STOP_TOKEN_IDS + 1), "invalid_value"),
        ("ignore_eos", 1, "invalid_type"),
        ("n", 0, "invalid_value"),
        ("n", MAX_CHOICES + 1, "invalid_value"),
        ("best_of", "2", "invalid_type"),
        ("presence_penalty", 2.1, "invalid_value"),
        ("presence_penalty", "0", "invalid_type"),
        ("frequency_penalty", -2.1, "invalid_value"),
        ("frequency_penalty", [], "invalid_type"),
        ("repetition_penalty", 0, "invalid_value"),
        ("repetition_penalty", 101, "invalid_value"),
        ("repetition_penalty", True, "invalid_type"),
        ("logit_bias", {"1": 101}, "invalid_value"),
        ("logit_bias", {"1": "5"}, "invalid_type"),
        ("logit_bias", {"1": False}, "invalid_type"),
        ("logit_bias", {"one": 5}, "invalid_value"),
        ("logit_bias", {"-1": 5}, "invalid_value"),
        ("logit_bias", {"01": 5}, "invalid_value"),
        ("logit_bias", {"\u0661": 5}, "invalid_value"),
        ("logit_bias", {"9999999999": 5}, "invalid_value"),
        ("logit_bias", {str(i): 1 for i in range(MAX_LOGIT_BIAS + 1)}, "invalid_value"),
        ("logit_bias", [1], "invalid_type"),
        ("min_tokens", -1, "invalid_value"),
        ("min_tokens", 1.0, "invalid_type"),
        ("logprobs", "yes", "invalid_type"),
        ("n", True, "invalid_type"),
        ("n", 10**400, "invalid_value"),
        ("stream", "true", "invalid_type"),
        ("stream_options", {"include_usage": True}, "invalid_value"),
        ("stream_options", [1], "invalid_type"),
        ("model", 5, "invalid_type"),
    ],
)
def test_wrong_values_name_their_field(name: str, value: object, code: str) -> None:
    for call in (chat, completion):
        error = refusal(call, **{name: value})
        assert (error.status, error.param, error.code) == (400, name, code)
        assert name in error.message
        assert len(error.message) < 300, "values are not repeated"


@pytest.mark.parametrize(("name", "value"), [("top_logprobs", 21), ("top_logprobs", -1), ("top_logprobs", True)])
def test_alternatives_are_counted(name: str, value: object) -> None:
    assert refusal(chat, logprobs=True, **{name: value}).param == name
    assert refusal(completion, logprobs=21).param == "logprobs"


def test_no_more_tokens_can_be_asked_for_at_least_than_at_most() -> None:
    assert refusal(chat, max_tokens=3, min_tokens=4).param == "min_tokens"


def test_options_of_a_stream_are_booleans() -> None:
    for name, usage in (("include_usage", Usage(last=True)), ("continuous_usage_stats", Usage(so_far=True))):
        assert chat(stream=True, stream_options={name: True}).usage == usage
        assert chat(stream=True, stream_options={name: None}).usage == Usage()
        error = refusal(chat, stream=True, stream_options={name: 1})
        assert (error.param, error.code) == (f"stream_options.{name}", "invalid_type")


# ---------------- model
def test_any_served_name_is_accepted_and_the_first_is_reported() -> None:
    for model in (None, "tiny", "alias"):
        assert chat(model=model).model == "tiny"


def test_an_unknown_model_is_a_404_that_lists_the_names() -> None:
    error = refusal(chat, model="gpt-4" * 100)
    assert (error.status, error.kind, error.param, error.code) == (404, "invalid_request_error", "model", "model_not_found")
    assert "tiny, alias" in error.message
    assert len(error.message) < 300


# ---------------- messages
def test_text_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts}, {"role": "user", "content": "ü\u2028"}]
    assert rendered(chat(messages=messages))["messages"] == [
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "ü\u2028"},
    ]


def test_tool_calls_of_an_assistant_reach_the_template() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "__class__": "x"},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    got = rendered(chat(messages=messages))["messages"]
    assert got[1] == {"role": "assistant", "content": None, "tool_calls": [call]}
    assert got[2] == {"role": "tool", "content": "42", "tool_call_id": "c1"}


def tool_call(arguments: object) -> list[dict[str, Any]]:
    return [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]


@pytest.mark.parametrize(
    ("messages", "param", "code"),
    [
        (None, "messages", "missing_required_parameter"),
        ("hi", "messages", "invalid_type"),
        ([], "messages", "invalid_value"),
        (USER * (MAX_MESSAGES + 1), "messages", "invalid_value"),
        (["hi"], "messages[0]", "invalid_type"),
        ([{"content": "x"}], "messages[0].role", "missing_required_parameter"),
        ([{"role": "wizard", "content": "x"}], "messages[0].role", "invalid_value"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role", "invalid_type"),
        ([*USER, {"role": "user"}], "messages[1].content", "missing_required_parameter"),
        ([{"role": "user", "content": None, "tool_calls": [{}]}], "messages[0].content", "missing_required_parameter"),
        ([{"role": "assistant", "content": None}], "messages[0].content", "missing_required_parameter"),
        ([{"role": "user", "content": 5}], "messages[0].content", "invalid_type"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]", "invalid_type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "missing_required_parameter"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0].type",
            "unsupported_value",
        ),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name", "invalid_type"),
        ([{"role": "assistant", "tool_calls": 5}], "messages[0].tool_calls", "invalid_type"),
        ([{"role": "assistant", "tool_calls": [{}] * 129}], "messages[0].tool_calls", "invalid_value"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function", "invalid_type"),
        (tool_call(5), "messages[0].tool_calls[0].function.arguments", "invalid_type"),
    ],
)
def test_a_bad_conversation_names_the_place(messages: object, param: str, code: str) -> None:
    error = refusal(chat, messages=messages)
    assert (error.status, error.param, error.code) == (400, param, code)


def test_template_switches_pass_but_cannot_replace_the_template() -> None:
    kwargs = {"enable_thinking": False, "effort": "low", "budget": None}
    assert rendered(chat(chat_template_kwargs=kwargs))["kwargs"] == kwargs
    for bad in (
        {"chat_template": "x"},
        {"messages": "x"},
        {"tokenize": True},
        {"__x": 1},
        {"a b": 1},
        {"a": [1]},
        "x",
        {f"a{i}": 1 for i in range(33)},
    ):
        assert refusal(chat, chat_template_kwargs=bad).param == "chat_template_kwargs"


# ---------------- prompts
def test_a_prompt_is_text_or_token_ids_or_a_list_of_either() -> None:
    assert completion(prompt=["a", "b"]).prompts == (TextPrompt("a"), TextPrompt("b"))
    assert completion(prompt=[1, 2]).prompts == (TokenPrompt((1, 2)),)
    assert completion(prompt=[[1, 2], [3]]).prompts == (TokenPrompt((1, 2)), TokenPrompt((3,)))
    assert len(completion(prompt=["x"] * api.MAX_PROMPTS).prompts) == api.MAX_PROMPTS


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        (None, "missing_required_parameter"),
        (5, "invalid_type"),
        ({}, "invalid_type"),
        ([], "invalid_value"),
        (["a", [1]], "invalid_type"),
        (["a", None], "invalid_type"),
        ([1, "a"], "invalid_type"),
        ([1, None], "invalid_type"),
        ([[1], [0.5]], "invalid_type"),
        ([True], "invalid_type"),
        ([-1], "invalid_value"),
        ([[10**400]], "invalid_value"),
        (["x"] * (api.MAX_PROMPTS + 1), "invalid_value"),
    ],
)
def test_other_prompts_are_refused(prompt: object, code: str) -> None:
    error = refusal(completion, prompt=prompt)
    assert (error.status, error.param, error.code) == (400, "prompt", code)
    assert len(error.message) < 300


# ---------------- anything at all
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "type", "text", "x"]) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = sorted({field.name for field in (*api.CHAT, *api.COMPLETION)})


@settings(max_examples=600, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
@example({"temperature": 10**400})
@example({"logit_bias": {}})
def test_any_json_in_any_field_is_accepted_or_refused_by_name(fields: dict[str, Any]) -> None:
    for call in (chat, completion):
        got = attempt(call, **fields)
        if isinstance(got, RequestError):
            assert got.status == (404 if got.code == "model_not_found" else 400)
            assert got.code
            assert got.param is not None
            assert got.param.split(".")[0].split("[")[0] in fields
        else:
            assert isinstance(got.params, SamplingParams)


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=60)
    | JSON.map(lambda v: json.dumps(v).encode())
    | st.text(alphabet='{}[]",:\\u0dD8 1eN', max_size=30).map(str.encode)
)
def test_any_bytes_are_an_object_or_a_400(raw: bytes) -> None:
    got = attempt(parse_json, raw)
    assert isinstance(got, dict) or (got.status, got.code) == (400, "invalid_json")


def test_refusals_are_invalid_params_with_an_openai_body() -> None:
    error = refusal(chat, temperature=9)
    assert isinstance(error, InvalidParam)
    assert error.body() == {
        "error": {
            "message": "temperature must be between 0 and 2.",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": "invalid_value",
        }
    }


def test_priority_timeout_and_salt_become_options() -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "priority": 3, "timeout": 2.5, "cache_salt": "tenant"}
    assert parse_chat(SERVED, body).options == RequestOptions(priority=3, timeout=2.5, cache_salt="tenant")
    assert parse_chat(SERVED, {**body, "priority": None, "timeout": None, "cache_salt": None}).options == RequestOptions()


@pytest.mark.parametrize(("field", "value"), [("priority", 101), ("priority", "high"), ("timeout", -1), ("cache_salt", 5)])
def test_an_option_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(InvalidParam) as refused:
        parse_chat(SERVED, {"messages": [{"role": "user", "content": "x"}], field: value})
    assert refused.value.param == field


def test_defaults_hold_where_the_request_says_nothing():
    config = Config(replace(fake_spec(), generation=SamplingDefaults(temperature=0.6, top_k=20)))
    for parse, body in ((parse_chat, {"messages": USER}), (parse_completion, {"prompt": "hi"})):
        assert parse(config, body).params.temperature == 0.6
        params = parse(config, {**body, "temperature": 0, "top_k": None, "top_p": 0.5}).params
        assert (params.temperature, params.top_k, params.top_p) == (0.0, 20, 0.5)
        assert parse(config, {**body, "top_k": -1}).params.top_k == 0
        assert parse(SERVED, body).params.temperature == 1.0
