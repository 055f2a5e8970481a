"""What goes into a prompt: every call, result and thought of a conversation, in the form that the chat template wants."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from conftest import fake_config

from minisgl import SamplingParams, llm
from minisgl.api.endpoints.table import ENDPOINTS
from minisgl.api.engine import ChatPrompt
from minisgl.api.requests.chat_prompt import check_messages
from minisgl.api.requests.openai import parse_chat
from minisgl.errors import RequestError
from minisgl.model.text.chat_template import ChatTemplate
from minisgl.model.text.conversation import Forms

# ---------------- templates, each with what its family does differently
_LOOP = "{%- for m in messages %}"
_END = "{%- endfor %}{% if add_generation_prompt %}<A>{% endif %}"
TEMPLATES = {
    # Qwen: objects or text, "" or null, reasoning_content behind the last question
    "qwen": _LOOP
    + "<{{ m.role }}>{% if m.reasoning_content is string %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    + "{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}"
    + '<tool_call>{"name": "{{ c.function.name }}", "arguments": '
    + "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
    + "{{ c.function.arguments | tojson }}{% endif %}"
    + "}</tool_call>{% endfor %}"
    + _END,
    # Llama 3.1: objects alone, and either text or one call
    "llama": _LOOP
    + "{% if m.tool_calls is defined %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
    + '<assistant>{"name": "{{ m.tool_calls[0].function.name }}", '
    + '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    + "{% else %}<{{ m.role }}>{{ m.content | trim }}{% endif %}"
    + _END,
    # Qwen3-Coder, GLM: walks through the arguments
    "xml": _LOOP
    + "<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}<function={{ c.function.name }}>"
    + "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}</function>{% endfor %}"
    + _END,
    # DeepSeek R1 and its distills: null marks a call, arguments are spliced in as text, thoughts are cut out of the content
    "r1": _LOOP
    + "{% if m['role'] == 'assistant' and m['content'] is none %}{% for c in m['tool_calls'] %}"
    + "{{ '<call>' + c['type'] + '<sep>' + c['function']['name'] }}"
    + "{{ '\n```json\n' + c['function']['arguments'] + '\n```</call>' }}"
    + "{% endfor %}{% endif %}{% if m['role'] == 'assistant' and m['content'] is not none %}"
    + "{{ '<assistant>' + m['content'].split('</think>')[-1] + '<end>' }}{% endif %}"
    + "{% if m['role'] in ('user', 'system') %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}"
    + "{% if m['role'] == 'tool' %}{{ '<tool>' + m['content'] }}{% endif %}"
    + _END,
    # gpt-oss: `thinking`, and never together with text in a message that calls
    "harmony": _LOOP
    + "{% if m.role == 'assistant' and m.tool_calls %}{% if m.content and m.thinking %}{{ raise_exception('both') }}{% endif %}"
    + "{% if m.content or m.thinking %}<analysis>{{ m.content or m.thinking }}{% endif %}"
    + "<call {{ m.tool_calls[0].function.name }}>{{ m.tool_calls[0].function.arguments | tojson }}"
    + "{% else %}<{{ m.role }}>{{ m.content }}{% endif %}"
    + _END,
    # Mistral: objects, calls without text, ids of nine characters, users and assistants alternate
    "mistral": "{% set ns = namespace(i=0) %}"
    + _LOOP
    + "{% if m.role == 'user' or (m.role == 'assistant' and m.tool_calls is not defined) %}"
    + "{% if (m.role == 'user') != (ns.i % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    + "{% set ns.i = ns.i + 1 %}{% endif %}"
    + "{% if m.tool_calls is defined %}[TOOL_CALLS]{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    + "{{ raise_exception('ids of nine') }}{% endif %}{{ c.function | tojson }}{% endfor %}"
    + "{% elif m.role == 'tool' %}[RESULT]{{ m.content }}"
    + "{% elif m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}"
    + "{% else %}{{ raise_exception('Only user, assistant and tool roles are supported!') }}{% endif %}"
    + _END,
    # ChatML: knows no calls
    "chatml": _LOOP + "<{{ m.role }}>{{ m.content }}\n" + _END,
    # Plain concatenation, where null is an error, and a call without a name that stands in its id
    "kimi": _LOOP
    + "{{ '<' + m.role + '>' + m.content }}{% for c in m.tool_calls or [] %}"
    + "<{{ c.id }}>{{ c.function.arguments | tojson }}{% endfor %}"
    + _END,
}
CUT = '{"city": "Par'  # by max_tokens
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "12 degrees"}
USER = {"role": "user", "content": "How warm?"}


def call(arguments: Any, content: str | None = None, **more: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    calls = [{"id": "abcdefghi", "type": "function", "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls, **more}


def rendered(template: str, *messages: dict[str, Any], **kwargs: Any) -> str:
    return ChatTemplate({"default": TEMPLATES.get(template, template)}, {}).render(check_messages("messages", messages), kwargs)


@pytest.mark.parametrize("content", [None, "", "Let me see."])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_call_its_text_and_its_result_reach_every_template(template: str, content: str | None) -> None:
    text = rendered(template, USER, call('{"city": "Köln", "days": [1, {"a": null}]}', content), RESULT)
    for part in ("How warm?", "city", "Köln", "days", "12 degrees", *filter(None, [content])):
        assert part in text, text
    assert "weather" in text or template == "kimi"
    assert "None" not in text.replace("'a': None", "")
    assert "\\u" not in text
    at = [text.index(part) for part in ("How warm?", *filter(None, [content]), "city", "12 degrees")]
    assert at == sorted(at)
    if template != "xml":
        written = [text[i:] for i in range(len(text)) if text.startswith('{"city"', i)]
        assert [json.JSONDecoder().raw_decode(w)[0] for w in written] == [{"city": "Köln", "days": [1, {"a": None}]}]


@pytest.mark.parametrize(
    "arguments",
    [CUT, "Paris", "[1, 2]", '"Paris"', "5", "null", '{"x": NaN}', '{"x": "\\ud800"}', '{"x":' + "[" * 500 + "]" * 500 + "}",
     '{"x": ' + "1" * 5000 + "}"],
)  # fmt: skip
@pytest.mark.parametrize("template", TEMPLATES)
def test_arguments_that_are_no_json_object_are_neither_refused_nor_lost(template: str, arguments: str) -> None:
    text = rendered(template, USER, call(arguments, None), RESULT)
    assert arguments in text or json.dumps(arguments)[1:-1] in text, text
    assert "12 degrees" in text


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_call_without_arguments_has_an_empty_object(template: str, arguments: Any) -> None:
    text = rendered(template, USER, call(arguments), RESULT)
    assert "{}" in text or (template == "xml" and "<function=weather></function>" in text)


def test_cut_arguments_stand_where_the_model_wrote_them_as_it_wrote_them() -> None:
    assert f'"arguments": {CUT}' in rendered("qwen", USER, call(CUT), USER)
    assert f"```json\n{CUT}\n```" in rendered("r1", USER, call(CUT), USER)


def test_a_call_without_text_has_neither_an_empty_turn_nor_a_null_before_it() -> None:
    arguments = "{% for c in m.tool_calls or [] %}<call>{{ c.function.arguments }}{% endfor %}"
    fixed = _LOOP + "{% if m.content is not none %}<{{ m.role }}>{{ m.content }}{% endif %}" + arguments + _END
    assert rendered(fixed, USER, call('{"a": 1}')) == '<user>How warm?<call>{"a": 1}<A>'
    printing = _LOOP + "<{{ m.role }}>{{ m.content }}" + arguments + _END
    assert rendered(printing, USER, call('{"a": 1}')) == '<user>How warm?<assistant><call>{"a": 1}<A>'


def test_the_older_function_call_and_role_are_a_call_and_its_result() -> None:
    old = {"role": "assistant", "content": "Hm.", "function_call": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    text = rendered("qwen", USER, old, {"role": "function", "name": "weather", "content": "12 degrees"})
    assert text == '<user>How warm?<assistant>Hm.<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>' + (
        "<tool>12 degrees<A>"
    )


def test_a_refusal_in_the_history_is_what_the_assistant_said() -> None:
    for said in ({"content": None, "refusal": "I won't."}, {"content": [{"type": "refusal", "refusal": "I won't."}]}):
        assert "<assistant>I won't." in rendered("qwen", USER, {"role": "assistant", **said}, USER)


def test_a_result_has_the_name_of_the_tool_that_was_called() -> None:
    template = _LOOP + "{% if m.role == 'tool' %}<{{ m.name }}>{{ m.content }}{% else %}{{ m.content }}{% endif %}" + _END
    assert "<weather>12 degrees" in rendered(template, USER, call("{}"), RESULT)
    assert "<other>12 degrees" in rendered(template, USER, call("{}"), {**RESULT, "name": "other"})


# ---------------- thoughts
@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("wanted", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("content", ["", "Warm.", None])
def test_a_thought_is_given_to_the_template_by_the_name_that_it_knows(given: str, wanted: str, content: str | None) -> None:
    template = _LOOP + "<{{ m.role }}>{% if m.WANTED %}<think>{{ m.WANTED }}</think>{% endif %}{{ m.content }}" + _END
    answer = {"role": "assistant", "content": content, given: "Let me think."}
    text = rendered(template.replace("WANTED", wanted), USER, answer, USER)
    assert text == f"<user>How warm?<assistant><think>Let me think.</think>{content or ''}<user>How warm?<A>"


def test_a_template_that_reads_two_names_shows_a_thought_once() -> None:
    template = _LOOP + "<{{ m.role }}>{{ m.reasoning_content or m.reasoning }}{{ m.thinking }}{{ m.content }}" + _END
    answer = {"role": "assistant", "content": "Warm.", "reasoning_content": "Hm.", "reasoning": "Hm."}
    assert rendered(template, USER, answer, USER).count("Hm.") == 1


def test_a_template_that_looks_for_tags_in_the_content_finds_them() -> None:
    template = _LOOP + "<{{ m.role }}>{{ m.content.replace('</think>', '</thought>') }}" + _END
    answer = {"role": "assistant", "content": "Warm.", "reasoning": "Hm."}
    assert "<think>\nHm.\n</thought>\n\nWarm." in rendered(template, USER, answer, USER)
    assert "Hm." not in rendered("r1", USER, answer, USER)  # which drops earlier thoughts
    assert rendered("chatml", USER, answer, USER) == rendered("chatml", USER, {**answer, "reasoning": None}, USER)


def test_a_thought_before_a_call_is_shown_with_it() -> None:
    assert "<think>Hm.</think><tool_call>" in rendered("qwen", USER, call("{}", reasoning="Hm."), RESULT)
    assert "<analysis>Hm.<call weather>" in rendered("harmony", USER, call("{}", reasoning_content="Hm."), RESULT)
    text = rendered("harmony", USER, call("{}", "I look.", thinking="Hm."), RESULT)  # too much for one message there
    assert "<assistant>I look.<analysis>Hm.<call weather>{}" in text


def test_a_thought_in_the_content_does_not_hide_a_call() -> None:
    for content in (None, "", "I look."):
        text = rendered("r1", USER, call('{"a": 1}', content, reasoning="Hm."), RESULT)
        assert text == rendered("r1", USER, call('{"a": 1}', content), RESULT).replace("<assistant>I", "<assistant>\n\nI")


# ---------------- several system messages
@pytest.mark.parametrize(
    "template",
    [
        "chatml",
        "{% for m in messages if m.role == 'system' %}{% if loop.last %}<system>{{ m.content }}{% endif %}{% endfor %}"
        + "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('only first') }}{% endif %}"
        + "<{{ m.role }}>{{ m.content }}{% endfor %}",
        "{% set ns = namespace(begun=false) %}{% for m in messages %}"
        + "{% if m.role != 'system' %}{% set ns.begun = true %}{% endif %}"
        + "{% if not (ns.begun and m.role == 'system') %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}",
        "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}{% endif %}"
        + "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    ],
)
def test_no_system_message_is_lost_or_refused(template: str) -> None:
    system = [{"role": role, "content": f"{role}'s rule"} for role in ("system", "developer")]
    for messages in (
        [*system, USER],
        [USER, system[1]],
        [system[0], USER, {"role": "assistant", "content": "x"}, system[1], USER],
    ):
        text = rendered(template, *messages)
        assert all(m["content"] in text for m in messages), text
    assert rendered("chatml", USER, *system).index("How warm?") < rendered("chatml", USER, *system).index("system's rule")


# ---------------- what a template cannot show is said
@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        ("mistral", [{"role": "system", "content": "s"}, USER], ["Only user, assistant and tool", "role system", "role user"]),
        ("mistral", [USER, USER], ["must alternate", "user, user"]),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", [
            {"role": "developer", "content": "s"}, USER], ["leaves out", "role system", "role user"]),
        ("{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}", [
            USER, call("{}"), RESULT], ["leaves out", "role tool"]),
    ],
)  # fmt: skip
def test_a_conversation_that_a_template_cannot_show_is_refused_with_the_way_out(
    template: str, messages: list[dict[str, Any]], words: list[str]
) -> None:
    with pytest.raises(RequestError) as e:
        rendered(template, *messages)
    assert (e.value.status, e.value.param, e.value.code) == (400, "messages", "chat_template_error")
    for word in words:
        assert word in e.value.message


def test_a_history_with_calls_uses_the_template_for_tools_even_without_tools() -> None:
    template = ChatTemplate({"default": TEMPLATES["chatml"], "tool_use": TEMPLATES["qwen"]}, {})
    assert "<tool_call>" in template.render(check_messages("messages", [USER, call('{"a": 1}'), RESULT]), {})


def test_a_template_is_asked_once_and_one_that_loops_for_ever_costs_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisgl.model.text.chat_template.MAX_SECONDS", 0.2)
    loops = "{% for m in messages %}{% if m.tool_calls %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    template = ChatTemplate({"default": loops + "{% endfor %}{% endif %}{{ m.content }}{% endfor %}"}, {})
    assert template.render([USER], {}) == "How warm?"
    assert template._forms == {"default": Forms()}
    asked = template._forms["default"]
    template.render([USER], {})
    assert template._forms["default"] is asked


# ---------------- one form, from wherever a conversation comes
CONVERSATION = [
    {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    USER,
    call(CUT, reasoning="Hm."),
    RESULT,
]


def test_an_offline_conversation_becomes_the_prompt_that_the_server_makes_of_it() -> None:
    prompt = llm._conversation(CONVERSATION, {"enable_thinking": False})
    assert isinstance(prompt, ChatPrompt)
    body = {"messages": CONVERSATION, "chat_template_kwargs": {"enable_thinking": False}}
    assert parse_chat(fake_config(), body).prompts == (prompt,)


def test_an_offline_conversation_that_is_wrong_fails_alone_and_names_the_place() -> None:
    with llm.LLM("fake", processes=False) as engine:
        good = [USER, {"role": "assistant", "content": "x"}, USER]
        bad = [USER, {"role": "wizard", "content": "x"}]
        first, second, third = engine.chat([good, bad, []], SamplingParams(max_tokens=2), errors="return")
    assert first.error is None
    assert second.error is not None
    assert second.error.param == "messages[1].role"
    assert third.error is not None
    assert third.error.param == "messages"


def chat_of(path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages that reach the tokenizer."""
    request: Any = ENDPOINTS[path].parse(fake_config(), body)
    [prompt] = (request.chat if path == "/v1/responses" else request).prompts
    messages: list[dict[str, Any]] = json.loads(prompt.payload)["messages"]
    return messages


def test_thoughts_and_cut_calls_come_back_through_every_dialect() -> None:
    said = {"role": "assistant", "content": None, "reasoning_content": "Hm."}
    of_chat = chat_of("/v1/chat/completions", {"messages": [USER, call(CUT, reasoning="Hm."), RESULT]})
    assert of_chat[1] == {**said, "tool_calls": call(CUT)["tool_calls"]}
    items: list[dict[str, Any]] = [
        USER,
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "abcdefghi", "name": "weather", "arguments": CUT},
        {"type": "function_call_output", "call_id": "abcdefghi", "output": "12 degrees"},
        {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "Aha."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Warm."}]},
        USER,
        {"type": "reasoning", "id": "rs_3", "summary": [], "encrypted_content": "x"},  # which cannot be read
        {"type": "reasoning", "id": "rs_4", "summary": [], "content": [{"type": "reasoning_text", "text": "Cut"}]},
    ]
    got = chat_of("/v1/responses", {"input": items})
    assert got[:3] == of_chat
    assert got[3:] == [
        {"role": "assistant", "content": "Warm.", "reasoning_content": "Aha."},
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "Cut"},
    ]
    use = {"type": "tool_use", "id": "abcdefghi", "name": "weather", "input": {"city": "Köln"}}
    thinking = {"type": "thinking", "thinking": "Hm.", "signature": ""}
    blocks = [
        USER,
        {"role": "assistant", "content": [thinking, {"type": "redacted_thinking", "data": "x"}, use]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "abcdefghi", "content": "12 degrees"}]},
    ]
    got = chat_of("/v1/messages", {"max_tokens": 5, "messages": blocks})
    assert got == [USER, {**said, "tool_calls": call('{"city": "Köln"}')["tool_calls"]}, RESULT]
    use["input"] = CUT
    assert chat_of("/v1/messages", {"max_tokens": 5, "messages": blocks}) == of_chat


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/responses", {"instructions": "s", "input": [USER, {"role": "wizard", "content": "x"}]}, "input[1].role"),
        ("/v1/responses", {"input": [USER, {"type": "function_call", "call_id": "c", "arguments": "{}"}]}, "input[1].name"),
        (
            "/v1/responses",
            {"input": [USER, {"role": "assistant", "content": "x"}, {"type": "function_call", "call_id": 5, "name": "f"}]},
            "input[2].call_id",
        ),
        ("/v1/responses", {"input": [{"type": "function_call_output", "call_id": 5, "output": "x"}]}, "input[0].call_id"),
        ("/v1/responses", {"input": [USER] * 5000}, "input"),
        ("/v1/messages", {"system": "s", "max_tokens": 5, "messages": [USER, {"role": "user"}]}, "messages[1].content"),
        (
            "/v1/messages",
            {
                "system": "s",
                "max_tokens": 5,
                "messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a"}]}, USER],
            },
            "messages[0].content[0].name",
        ),
    ],
)
def test_an_error_names_the_place_in_the_clients_own_words(path: str, body: dict[str, Any], name: str) -> None:
    with pytest.raises(RequestError) as e:
        ENDPOINTS[path].parse(fake_config(), body)
    assert e.value.param == name
    assert name in e.value.message
    assert not re.search(r"messages\[\d+\]", e.value.message) or path == "/v1/messages"
