"""LLM as a newcomer uses it: refusals, conversations, progress, lengths, and arguments of the wrong kind."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fake_config

import minisgl
from minisgl import LLM, PromptError, SamplingParams
from minisgl.actors.messages import ActorDied
from minisgl.api.requests.openai import parse_chat
from minisgl.config import Config, ServerConfig
from minisgl.errors import InvalidParam, RequestError, UserError
from minisgl.llm import DEFAULT_MAX_TOKENS, EngineDied
from minisgl.llm_arguments import conversation, variables_of
from minisgl.model.checkpoint.presets import random_shape

SIZES: dict[str, Any] = {"processes": False, "kv_tokens": 4096, "max_context": 256, "max_running": 8, "step_tokens": 64}
SHORT = SamplingParams(max_tokens=4)
USER = {"role": "user", "content": "Hi"}
TOO_LONG = "one two three four " * 50
# Without a model and without the embedded one's tokenizer: every byte is a token.
BYTES = replace(random_shape("qwen3-0.6b"), name="fake", format="fake", vocab_size=256)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(BYTES, **SIZES) as engine:
        yield engine


# ---------------- refusals
def test_a_refusal_is_raised_and_the_other_answers_are_kept(llm: LLM) -> None:
    with pytest.raises(PromptError, match=r"^prompts\[1\]: This model's maximum context length is 256 tokens") as e:
        llm.generate(["a", TOO_LONG, "b"], SHORT)
    assert e.value.index == 1
    assert (e.value.status, e.value.code, e.value.param) == (400, "context_length_exceeded", "prompt")
    assert [len(out.token_ids) for out in e.value.outputs] == [4, 0, 4]
    assert [out.token_ids for out in e.value.outputs[::2]] == [out.token_ids for out in llm.generate(["a", "b"], SHORT)]
    assert isinstance(e.value, RequestError)


def test_the_refusal_of_a_single_prompt_has_no_number(llm: LLM) -> None:
    with pytest.raises(PromptError, match=r"^This model's maximum context length"):
        llm.generate(TOO_LONG, SHORT)
    with pytest.raises(PromptError, match=r"^messages\[0\]\.role must be one of"):
        llm.chat([{"role": "wizard", "content": "x"}], SHORT)


def test_of_several_refusals_the_first_is_raised_and_all_are_counted(llm: LLM) -> None:
    with pytest.raises(PromptError, match=r"^conversations\[1\]: .* \(2 of 3 have no answer; \.outputs has those") as e:
        llm.chat([[USER], [{"role": "user", "content": TOO_LONG}], [{"role": "user", "content": TOO_LONG + "five"}]], SHORT)
    assert [out.error is None for out in e.value.outputs] == [True, False, False]


@pytest.mark.parametrize("bad", [[], [10**9], [1] * 300], ids=["empty", "unknown", "long"])
def test_what_can_be_refused_at_once_is_before_anything_is_computed(
    llm: LLM, bad: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(seconds: float) -> bool:
        raise AssertionError("something was computed")

    monkeypatch.setattr(llm.system, "pump", work)
    with pytest.raises(PromptError, match=r"^prompts\[1\]: ") as e:
        llm.generate([[1, 2, 3], bad], SHORT)
    assert e.value.index == 1
    assert e.value.outputs == []
    assert e.value.message.endswith("(Nothing has been computed.)")
    assert llm.system.gateway.open_requests == 0


def test_errors_can_be_returned_instead(llm: LLM) -> None:
    good, long, bad = llm.generate(
        ["a", TOO_LONG, "b"], [SHORT, SHORT, SamplingParams(stop_token_ids=(10**6,))], errors="return"
    )
    assert good.error is None
    assert len(good.token_ids) == 4
    assert long.error is not None
    assert long.error.code == "context_length_exceeded"
    assert long.finish_reason is None
    assert bad.error is not None
    assert bad.error.param == "stop_token_ids"
    one, two = llm.chat([[USER], [{"role": "wizard", "content": "x"}]], SHORT, errors="return")
    assert one.error is None
    assert two.error is not None
    assert two.error.param == "messages[0].role"
    with pytest.raises(InvalidParam, match='errors must be "raise" or "return"'):
        llm.generate("a", errors="ignore")  # type: ignore[arg-type]


def test_an_engine_that_dies_leaves_what_it_has_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(BYTES, **SIZES) as engine:
        pump, gateway = engine.system.pump, engine.system.gateway

        def until_the_first_is_done(seconds: float) -> bool:
            if gateway.open_requests == 1:
                gateway.give_up(ActorDied("worker0", -9), "the process worker0 was killed by signal 9")
            return pump(seconds)

        monkeypatch.setattr(engine.system, "pump", until_the_first_is_done)
        with pytest.raises(EngineDied, match="worker0 was killed by signal 9") as e:
            engine.generate(["a", "b"], [SHORT, SamplingParams(max_tokens=100, ignore_eos=True)])
        first, second = e.value.outputs
        assert (first.error, len(first.token_ids)) == (None, 4)
        assert second.error is not None
        with pytest.raises(UserError, match="worker0 was killed"):
            engine.generate("c")


def test_a_closed_llm_says_so() -> None:
    engine = LLM(BYTES, **SIZES)
    engine.close()
    with pytest.raises(UserError, match="this LLM is closed"):
        engine.generate("a")


# ---------------- conversations
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
IMAGE = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
CALL = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}


@pytest.mark.parametrize(
    ("messages", "variables", "body"),
    [
        ([USER], {}, {}),
        ([{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, USER], {}, {}),
        ([USER, CALL, {"role": "tool", "content": IMAGE, "tool_call_id": "1"}], {}, {}),
        ([USER], {"tools": [TOOL, {"type": "web_search"}]}, {"tools": [TOOL, {"type": "web_search"}]}),
        ([USER], {"tools": []}, {"tools": []}),
        ([USER], {"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ([USER], {"add_generation_prompt": False}, {"add_generation_prompt": False}),
        ([USER, {"role": "assistant", "content": "x"}], {"continue_final_message": True}, {"continue_final_message": True}),
        ([USER], {"chat_template": "{{ messages }}"}, {"chat_template": "{{ messages }}"}),
    ],
)
def test_a_conversation_becomes_the_prompt_that_the_server_makes_of_it(
    messages: list[Any], variables: dict[str, Any], body: dict[str, Any]
) -> None:
    server = ServerConfig(tool_call_parser="hermes", trust_request_chat_template=True)
    config = Config(fake_config().model, fake_config().engine, server)
    [expected] = parse_chat(config, {"messages": messages, **body}).prompts
    for kwargs, more in ((None, variables), (variables, {})):
        assert conversation(messages, variables_of(kwargs, more)) == expected
    assert conversation(tuple(messages), variables_of(None, variables)) == expected


def test_one_conversation_or_several(llm: LLM) -> None:
    [one] = llm.chat([USER], SHORT)
    first, second = llm.chat([[USER], (USER,)], SHORT)
    assert one.token_ids == first.token_ids == second.token_ids
    assert one.prompt_tokens > 3
    assert llm.chat([], SHORT) == llm.generate([], SHORT) == []
    with pytest.raises(PromptError, match=r"^conversations\[1\]: messages must hold 1 to"):
        llm.chat([[USER], []])


@pytest.mark.parametrize(
    ("given", "more", "text"),
    [
        ("Hi", {}, "messages must be a conversation, which is a list of messages .* not str"),
        (None, {}, "messages must be .* not None"),
        (5, {}, "messages must be .* not int"),
        (USER, {}, "messages must be a conversation, which is a list of messages"),
        ([[USER], USER], {}, r"messages\[1\] must be .* not dict"),
        (["Hi"], {}, r"messages\[0\] must be .* not str"),
        ([USER, "Hi"], {}, r"messages\[1\] must be an object, not a string"),
        ([{"role": "user", "content": ("a", "b")}], {}, r"messages\[0\].content must be .* not tuple"),
        ([USER], {"temperature": 0}, r"temperature is no variable of a chat template: give it in SamplingParams\(temperature"),
        ([USER], {"tokenize": False}, "tokenize is no variable"),
        ([USER], {"date": object()}, "date must be a value that JSON can write.* not object"),
        ([USER], {"chat_template_kwargs": "x"}, "chat_template_kwargs must be a mapping, not str"),
        ([USER], {"chat_template": 5}, "chat_template must be a string, not int"),
        ([USER], {"tools": TOOL}, "tools must be a list of tools, not dict"),
        ([USER], {"tools": ["f"]}, r"tools\[0\] must be an object, not a string"),
        ([USER], {"add_generation_prompt": True, "continue_final_message": True}, "exclude each other"),
    ],
)
def test_what_is_no_conversation_is_named(llm: LLM, given: Any, more: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        llm.chat(given, SHORT, **more)


# ---------------- prompts and parameters
def test_a_prompt_may_be_written_in_many_ways(llm: LLM) -> None:
    [expected] = llm.generate([[5, 6, 7]], SHORT)
    ids: tuple[Any, ...] = (
        *([5, 6, 7], (5, 6, 7), np.array([5, 6, 7]), torch.tensor([5, 6, 7]), [np.int64(5), np.int32(6), 7], range(5, 8)),
        *([[5, 6, 7]], [np.array([5, 6, 7], np.uint16)], np.array([[5, 6, 7]]), torch.tensor([[5, 6, 7]])),
        *({"prompt_token_ids": [5, 6, 7]}, [{"prompt_token_ids": np.array([5, 6, 7])}], iter([[5, 6, 7]])),
    )
    for given in ids:
        assert llm.generate(given, SHORT) == [expected], given
    texts: tuple[Any, ...] = ("a", ["a"], ("a",), {"prompt": "a"}, [{"prompt": "a", "prompt_token_ids": None}], np.array(["a"]))
    assert len({tuple(llm.generate(given, SHORT)[0].token_ids) for given in texts}) == 1


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        (5, "prompts must be a text, a list of token ids or a list of these, not int"),
        (None, "prompts must be .* not None"),
        (b"abc", "prompts must be .* not bytes"),
        ({"a", "b"}, "prompts must be .* not set"),
        ([None], r"prompts\[0\] must be a text or a list of token ids, not None"),
        (["a", 5], r"prompts\[1\] must be .* not int"),
        ([5, "a"], r"prompts\[1\] must be a token id, which is a whole number, not str"),
        ([[5, 6.0]], r"prompts\[0\]\[1\] must be a token id.* not float"),
        ([[True]], r"prompts\[0\]\[0\] must be a token id.* not bool"),
        (np.array([1.5]), r"prompts\[0\] must be .* not float"),
        ([["a"]], r"prompts\[0\]\[0\] must be a token id.* not str"),
        ([{"text": "a"}], r"prompts\[0\] is a mapping: it must have either prompt"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "prompts is a mapping: it must have either"),
        ([{"prompt": {"prompt": "a"}}], r"prompts\[0\] is a mapping"),
    ],
)
def test_what_is_no_prompt_is_named(llm: LLM, prompts: Any, text: str) -> None:
    with pytest.raises(InvalidParam, match=text):
        llm.generate(prompts, SHORT)


def test_parameters_may_be_a_mapping_over_the_recommendation(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "_defaults", {"temperature": 0.5, "top_k": 7})
    seen: list[SamplingParams] = []
    opened = llm.system.gateway.open
    monkeypatch.setattr(llm.system.gateway, "open", lambda prompt, p, *rest: (seen.append(p), opened(prompt, p, *rest))[1])
    llm.generate("a", {"max_tokens": 2, "temperature": np.float32(0.25)})
    llm.generate(["a", "b"], [SHORT, {"max_tokens": np.int64(3)}])
    llm.generate("a", params=SHORT)
    llm.chat([USER], sampling_params={"max_tokens": 2})
    assert seen == [
        SamplingParams(max_tokens=2, temperature=0.25, top_k=7),
        *(SHORT, SamplingParams(max_tokens=3, temperature=0.5, top_k=7), SHORT),
        SamplingParams(max_tokens=2, temperature=0.5, top_k=7),
    ]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"sampling_params": "hot"}, "sampling_params must be a SamplingParams, a mapping of its fields, or a list.* not str"),
        ({"sampling_params": 5}, "sampling_params must be .* not int"),
        ({"params": 5}, "sampling_params must be .* not int"),
        ({"sampling_params": [SHORT] * 3}, "sampling_params holds 3 SamplingParams for 2 prompts: give one, or one for each"),
        ({"sampling_params": []}, "sampling_params holds 0 SamplingParams for 2 prompts"),
        ({"sampling_params": [SHORT, 5]}, r"sampling_params\[1\] must be a SamplingParams or a mapping of its fields, not int"),
        ({"sampling_params": {"max_token": 5}}, "SamplingParams has no field max_token; did you mean max_tokens"),
        ({"sampling_params": {"temperature": "hot"}}, "temperature must be a number, got str"),
        ({"sampling_params": SHORT, "params": SHORT}, "params is another name for sampling_params"),
        ({"use_tqdm": "yes"}, "use_tqdm must be True, False, None or what to call instead of tqdm, not str"),
    ],
)
def test_what_are_no_parameters_is_named(llm: LLM, more: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidParam, match=text):
        llm.generate(["a", "b"], **more)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"max_token": 5}, "SamplingParams has no field max_token; did you mean max_tokens?"),
        ({"max_new_tokens": 5}, "has no field max_new_tokens; did you mean max_tokens?"),
        ({"zzz": 5}, "has no field zzz; the fields are max_tokens, "),
        ({"temperature": "hot"}, "temperature must be a number, got str"),
        ({"max_tokens": 1.5}, "max_tokens must be an integer, got float"),
        ({"max_tokens": np.array([5])}, "max_tokens must be an integer, got list"),
        ({"echo": "no"}, "echo must be True or False, got str"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got int"),
        ({"stop": 5}, "stop must be a string or a list of strings"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids must be an integer, got str"),
        ({"logit_bias": {"a": 1}}, "logit_bias must be an integer, got str"),
    ],
)
def test_sampling_parameters_name_what_is_wrong(given: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidParam) as e:
        SamplingParams(**given)
    assert text in e.value.message


def test_numbers_of_numpy_become_pythons_own() -> None:
    given = SamplingParams(
        max_tokens=np.int64(5),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_k=torch.tensor(3),  # type: ignore[arg-type]
        stop_token_ids=np.array([1, 2]),  # type: ignore[arg-type]
        logit_bias={np.int64(3): np.float32(1)},  # type: ignore[arg-type]
        echo=np.True_,  # type: ignore[arg-type]
        stop=None,  # type: ignore[arg-type]
    )
    assert given == SamplingParams(
        max_tokens=5, temperature=0.5, top_k=3, stop_token_ids=(1, 2), logit_bias=((3, 1.0),), echo=True, stop=()
    )
    assert (type(given.max_tokens), type(given.temperature), type(given.top_k), type(given.echo)) == (int, float, int, bool)
    assert [type(x) for pair in (given.stop_token_ids, *given.logit_bias) for x in pair] == [int, int, int, float]


# ---------------- lengths
ENDLESS = {"ignore_eos": True, "temperature": 0.0}


@pytest.mark.parametrize(
    ("default", "params", "length"),
    [
        (7, None, 7),
        (7, SamplingParams(**ENDLESS), 7),
        (7, {"temperature": 0}, 7),
        (7, SamplingParams(max_tokens=30, **ENDLESS), 30),
        (7, SamplingParams(min_tokens=30, **ENDLESS), 30),
        (1000, None, 253),
        (None, None, 253),
        (None, SamplingParams(**ENDLESS), 253),
        (np.int64(7), None, 7),
    ],
)
def test_an_answer_without_a_length_has_the_default_or_what_is_left_of_the_context(
    default: Any, params: Any, length: int
) -> None:
    with LLM(BYTES, **SIZES, default_max_tokens=default) as engine:
        [answer] = engine.generate([1, 2, 3], params)
    assert (len(answer.token_ids), answer.finish_reason) == (length, "length")


def test_the_default_length_is_sane() -> None:
    assert 256 <= DEFAULT_MAX_TOKENS <= 8192
    with LLM(BYTES, **{**SIZES, "max_context": 4096, "kv_tokens": 8192}) as engine:
        assert engine.system.config.server.default_max_tokens == DEFAULT_MAX_TOKENS
    assert ServerConfig().default_max_tokens == 0, "a server's answers are bounded by the context alone"
    for bad in (0, -1, 1.5, "many", True):
        with pytest.raises(UserError, match="default_max_tokens must be a whole number"):
            LLM(BYTES, default_max_tokens=bad)  # type: ignore[arg-type]


# ---------------- progress
class Bar:
    def __init__(self, log: list[Any], **options: Any) -> None:
        self.options, self.n, self.closed = options, 0, False
        log.append(self)

    def update(self, n: int) -> None:
        self.n += n

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_progress_is_told_to_whatever_is_called_instead_of_tqdm(llm: LLM) -> None:
    bars: list[Any] = []
    llm.generate(["a", "b", "c"], SHORT, use_tqdm=functools.partial(Bar, bars))
    with pytest.raises(PromptError):
        llm.generate(["a", TOO_LONG], SHORT, use_tqdm=functools.partial(Bar, bars))
    llm.chat([USER], SHORT, use_tqdm=functools.partial(Bar, bars))
    assert [(b.options["total"], b.n, b.closed) for b in bars] == [(3, 3, True), (2, 2, True), (1, 1, True)]


def test_a_bar_is_shown_on_a_terminal_or_when_it_is_asked_for(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(n: int, **more: Any) -> bool:
        llm.generate(["a"] * n, SHORT, **more)
        return "prompts: 100%" in capsys.readouterr().err

    assert not shown(3)
    assert not shown(3, use_tqdm=False)
    assert shown(3, use_tqdm=True)
    assert shown(1, use_tqdm=True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert shown(3)
    assert not shown(1)
    assert not shown(3, use_tqdm=False)


# ---------------- settings
@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"paeg_size": 4}, r"LLM\(\) has no setting 'paeg_size'; did you mean page_size\?"),
        ({"tensor_parallel_size": 2}, "'tensor_parallel_size'; did you mean tp"),
        ({"max_model_len": 2}, "'max_model_len'; did you mean max_context"),
        ({"gpu_memory_utilization": 0.9}, "did you mean memory_fraction"),
        ({"model_path": "x"}, "did you mean model"),
        ({"max_tokens": 5}, "did you mean default_max_tokens"),
        ({"zzz": 2}, "'zzz'; the settings are .*kv_tokens"),
        ({"tp": "2"}, "tp must be a whole number, not str"),
        ({"tp": True}, "tp must be a whole number, not bool"),
        ({"kv_tokens": 1.5}, "kv_tokens must be a whole number, not float"),
        ({"memory_fraction": "half"}, "memory_fraction must be a number, not str"),
        ({"dtype": torch.float16}, "dtype must be a string, not dtype"),
        ({"revision": 5}, "revision must be a string, not int"),
        ({"model": 5}, "model must be a path, a hub id or a ModelSpec, not int"),
        ({"tp": 0}, "--tp must be between 1 and"),
        ({"max_running": float("nan")}, "max_running must be a whole number"),
    ],
)
def test_settings_that_cannot_be_used_are_named(given: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        LLM(**{"model": BYTES, "processes": False, **given})


def test_settings_may_be_numbers_of_numpy_and_a_model_a_path(tmp_path: Path) -> None:
    with LLM(BYTES, **{**SIZES, "kv_tokens": np.int64(512), "memory_fraction": np.float32(0.5), "page_size": None}) as engine:
        assert type(engine.system.config.engine.kv_tokens) is int
        assert engine.system.config.engine.page_size == 16
    with pytest.raises(UserError, match=r"nothing\.gguf: no such file"):
        LLM(tmp_path / "nothing.gguf")


def test_the_package_shows_its_names() -> None:
    assert {"LLM", "SamplingParams", "BatchClient", "RequestError", "PromptError", "UserError"} <= set(dir(minisgl))
    assert all(getattr(minisgl, name) is not None for name in minisgl.__all__)


def test_the_constructor_of_sampling_parameters_shows_its_fields() -> None:
    assert list(inspect.signature(SamplingParams).parameters)[:2] == ["max_tokens", "temperature"]
