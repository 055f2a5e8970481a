"""How an answer is read: what is thought, what is a call, what is for the user, whatever the template and the request do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from scripted import Server, save_scripted, serve

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 50, "temperature": 0}


def template(on: str, off: str, off_first: bool) -> str:
    """A hybrid template, its branches in either order, that opens no thought behind a tool's result."""
    branches = f"{{% if enable_thinking is defined and not enable_thinking %}}{off}{{% else %}}{on}{{% endif %}}"
    if not off_first:
        branches = f"{{% if enable_thinking is not defined or enable_thinking %}}{on}{{% else %}}{off}{{% endif %}}"
    after_tool = "{% if messages[-1].role == 'tool' %}<|im_start|>assistant\n{% else %}"
    return f"{HEAD}{{% if add_generation_prompt %}}{after_tool}<|im_start|>assistant\n{branches}{{% endif %}}{{% endif %}}"


# ---------------- where an answer begins
KINDS = {  # what a template puts before an answer that begins with a thought, and before one without
    "closed": ("<think>\n", "<think>\n\n</think>\n\n"),
    "absent": ("<think>\n", ""),
    "only closed": ("<think>", "</think>"),
}


@pytest.fixture(scope="module", params=[("closed", False), ("absent", True)], ids=str)
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A hybrid model: it thinks where the prompt has opened a thought, and answers at once where not."""
    kind, off_first = request.param
    on, off = KINDS[kind]
    says_off = off[-len("</think>\n\n") :] or "assistant\n"
    scripts = {"<think>\n": ["hm.", "so", "</think>\n", "Yes."], says_off: ["Sure."]}
    if says_off != "assistant\n":
        scripts["assistant\n"] = ["Sure."]
    path = tmp_path_factory.mktemp("hybrid")
    with serve("--model", save_scripted(path / "m", template(on, off, off_first), scripts)) as server:
        yield server


OFF: list[dict[str, Any]] = [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}]


def test_a_model_that_thinks_is_read_so(hybrid: Server) -> None:
    answer = hybrid.post("/v1/chat/completions", ASK)
    message = hybrid.chat()["message"]
    assert (message["content"], message["reasoning_content"]) == ("Yes.", "hm.so")
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2


@pytest.mark.parametrize("off", OFF)
def test_an_answer_without_a_thought_is_content(hybrid: Server, off: dict[str, Any]) -> None:
    message = hybrid.chat(**off)["message"]
    assert (message["content"], message["reasoning_content"]) == ("Sure.", None)
    assert hybrid.post("/v1/chat/completions", ASK | off)["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_an_answer_to_a_tools_result_is_read_as_its_prompt_begins_it(hybrid: Server) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "tool", "content": "rain", "tool_call_id": "x"}]
    message = hybrid.chat(messages=messages)["message"]
    assert (message["content"], message["reasoning_content"]) == ("Sure.", None)


def test_every_dialect_reads_alike(hybrid: Server) -> None:
    body = {"model": "m", "max_tokens": 50, "messages": ASK["messages"], "temperature": 0}
    with_thought = hybrid.post("/v1/messages", body)
    assert [b["type"] for b in with_thought["content"]] == ["thinking", "text"]
    without = hybrid.post("/v1/messages", body | {"thinking": {"type": "disabled"}})
    assert without["content"] == [{"type": "text", "text": "Sure."}]
    response = hybrid.post("/v1/responses", {"input": "hi", "temperature": 0})
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
    response = hybrid.post("/v1/responses", {"input": "hi", "temperature": 0, "reasoning": {"effort": "none"}})
    assert [item["type"] for item in response["output"]] == ["message"]
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == 0


def test_a_form_binds_the_answer_where_it_begins(hybrid: Server) -> None:
    form = {"guided_choice": ["Sure."]}
    message = hybrid.chat(**form, **OFF[0])["message"]
    assert (message["content"], message["reasoning_content"]) == ("Sure.", None)
    message = hybrid.chat(guided_choice=["Yes."])["message"]
    assert (message["content"], message["reasoning_content"]) == ("Yes.", "hm.so")


# ---------------- stop strings
def test_a_stop_string_in_a_thought_stops_nothing(hybrid: Server) -> None:
    for stop in ("hm", "so", "\n\n", "</think>", "think"):
        choice = hybrid.chat(stop=stop)
        message = choice["message"]
        assert (message["content"], message["reasoning_content"]) == ("Yes.", "hm.so"), stop
    message = hybrid.chat(stop=["so", "es."])["message"]
    assert (message["content"], message["reasoning_content"]) == ("Y", "hm.so")
    assert hybrid.chat(stop="ur", **OFF[0])["message"]["content"] == "S"


def test_a_completion_has_no_thought_to_be_spared(hybrid: Server) -> None:
    body = {"prompt": "<think>\n", "temperature": 0, "max_tokens": 20, "stop": "so"}
    assert hybrid.post("/v1/completions", body)["choices"][0]["text"] == "hm."
    native = {"text": "<think>\n", "sampling_params": {"temperature": 0, "max_new_tokens": 20, "stop": "so"}}
    assert hybrid.post("/generate", native)["text"] == "hm."


# ---------------- forms of answers, whatever tokens their marks are
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def asked(marks: str, begin: str) -> str:
    """A template that mentions a form's marks and begins answers with the last message, so that each has its own script."""
    return f"{HEAD}{{% if tools %}}{{# {marks} #}}{{% endif %}}{begin}{{{{ messages[-1].content }}}}"


def read(message: dict[str, Any]) -> tuple[Any, Any, list[tuple[str, Any]]]:
    calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", ())]
    return message["content"], message.get("reasoning_content"), calls


@pytest.fixture(scope="module")
def harmony(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    scripts = {
        "ask": [
            *("<|channel|>", "analysis", "<|message|>", "hm.", "so.", "<|end|>", "<|start|>"),
            *("assistant<|channel|>final<|message|>", "Yes", ". No"),
        ],
        "call": ["<|channel|>commentary", " to=functions.f ", "<|constrain|>", "json<|message|>", '{"a":', ' "x."}'],
        "json": ["<|channel|>analysis<|message|>", "hm", "<|end|><|start|>assistant", "<|channel|>final<|message|>", "{}"],
    }
    special = [p for script in scripts.values() for p in script if "<|" in p]
    path = tmp_path_factory.mktemp("harmony")
    with serve("--model", save_scripted(path / "m", asked("<|channel|>", "<|start|>assistant"), scripts, special=special)) as s:
        yield s


def test_the_channels_of_harmony_are_thought_answer_and_calls(harmony: Server) -> None:
    assert read(harmony.chat("ask")["message"]) == ("Yes. No", "hm.so.", [])
    usage = harmony.post("/v1/chat/completions", ASK | {"messages": [{"role": "user", "content": "ask"}]})["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 2
    assert read(harmony.chat("ask", stop=".")["message"]) == ("Yes", "hm.so.", [])
    choice = harmony.chat("call", tools=TOOLS, stop=".")
    assert read(choice["message"]) == (None, None, [("f", {"a": "x."})])
    assert choice["finish_reason"] == "tool_calls"
    response = harmony.post("/v1/responses", {"input": "ask", "temperature": 0})
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
    blocks = harmony.post(
        "/v1/messages", {"messages": [{"role": "user", "content": "ask"}], "max_tokens": 50, "temperature": 0}
    )
    assert [block["type"] for block in blocks["content"]] == ["thinking", "text"]


def test_a_form_binds_the_final_message_of_harmony(harmony: Server) -> None:
    answer = harmony.chat("json", response_format={"type": "json_object"})
    assert read(answer["message"]) == ("{}", "hm", [])
