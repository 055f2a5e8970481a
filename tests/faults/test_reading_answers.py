"""How an answer is read: what is thought, what is a call, what is for the user, whatever the template and the request do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Server, save_scripted, serve

from minisgl import LLM
from minisgl.api.parsers.call_formats import FORMATS
from minisgl.api.parsers.outline import Outline
from minisgl.api.parsers.reply import Form, Reply
from minisgl.errors import InvalidParam
from minisgl.model.text import chat_format
from minisgl.model.text.chat_format import guess
from minisgl.reasoning import CALL_STYLES, STYLES, begins_inside
from minisgl.sampling_params import Finish, SamplingParams

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
    with serve("--model", save_scripted(path / "m", asked("<|message|>", "<|start|>assistant"), scripts, special=special)) as s:
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


@pytest.fixture(scope="module", params=["qwen", "mistral"])
def marked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Models whose tokenizers call all marks special, and that say a special token which is none."""
    forms = {
        "qwen": ("<think>", "</think>", ["<tool_call>", '{"name": "f", ', '"arguments": {"a": "x."}', "</tool_call>"]),
        "mistral": ("[THINK]", "[/THINK]", ["[TOOL_CALLS]", "f", "[CALL_ID]", "x9", "[ARGS]", '{"a": "x."}']),
    }
    opening, closing, call = forms[request.param]
    scripts = {"call": [opening, "hm.", closing, "Yes", "<|odd|>", *call], "ask": ["So", "<|im_start|>", " it is."]}
    special = [opening, closing, *call[:1], "</tool_call>", "[CALL_ID]", "[ARGS]", "<|odd|>"]
    path = tmp_path_factory.mktemp("marked")
    template = asked(f"{opening}{call[0]}", "<|im_start|>assistant\n")
    with serve("--model", save_scripted(path / "m", template, scripts, special=special)) as server:
        yield server


def test_marks_that_are_special_tokens_reach_the_reader_and_no_others(marked: Server) -> None:
    assert read(marked.chat("call", tools=TOOLS)["message"]) == ("Yes", "hm.", [("f", {"a": "x."})])
    assert read(marked.chat("call", tools=TOOLS, stop=[".", "}"])["message"]) == ("Yes", "hm.", [("f", {"a": "x."})])
    assert read(marked.chat("ask", tools=TOOLS)["message"]) == ("So it is.", None, [])
    message = marked.chat("call", response_format={"type": "json_object"}, max_tokens=8)["message"]
    assert message["reasoning_content"] == "hm."
    assert message["content"].startswith("{")
    body = {"prompt": "call", "temperature": 0, "max_tokens": 9}
    assert "hm.Yes" in marked.post("/v1/completions", body)["choices"][0]["text"]


# ---------------- the readers alone: every form, whole and in pieces
THINK, HM = "<think>\nhm.\n</think>\n\n", "hm."
F, G = ("f", '{"a": 1}'), ("g", "{}")
F_OBJECT, G_OBJECT = '{"name": "f", "arguments": {"a": 1}}', '{"name": "g", "arguments": {}}'
F_LLAMA, G_LLAMA = F_OBJECT.replace("arguments", "parameters"), G_OBJECT.replace("arguments", "parameters")
ANALYSIS = "<|channel|>analysis<|message|>hm.<|end|><|start|>assistant"
D = [f"<\uff5ctool\u2581{n}\uff5c>" for n in ("calls\u2581begin", "call\u2581begin", "sep", "call\u2581end", "calls\u2581end")]
V3 = '{0}{1}function{2}f\n```json\n{{"a": 1}}\n```{3}\n{1}function{2}g\n```json\n{{}}\n```{3}{4}'.format(*D)
V31 = '{0}{1}f{2}{{"a": 1}}{3}{1}g{2}{{}}{3}{4}'.format(*D)
KIMI = "".join(f"<|tool_call_begin|>functions.{n}:0<|tool_call_argument_begin|>{a}<|tool_call_end|>" for n, a in (F, G))
COMMAND = '[\n  {"tool_call_id": "0", "tool_name": "f", "parameters": {"a": 1}},\n  {"tool_name": "g", "parameters": {}}\n]'

Answer = tuple[str, str, list[tuple[str, str]]]  # content, thought, calls
READ: list[tuple[str, str, str, Answer]] = [  # style of thoughts, of calls, the text, what is read
    ("qwen3", "hermes", f"{THINK}Yes.", ("Yes.", HM, [])),
    ("qwen3", "hermes", f"{THINK}<tool_call>\n{F_OBJECT}\n</tool_call>\n<tool_call>{G_OBJECT}</tool_call>", ("", HM, [F, G])),
    ("qwen3", "", "</think>\n\nYes.", ("Yes.", "", [])),
    ("mistral", "mistral", f"[THINK]hm.[/THINK]Yes.[TOOL_CALLS]f[CALL_ID]x1[ARGS]{F[1]}", ("Yes.", HM, [F])),
    ("", "mistral", f"[TOOL_CALLS]f[ARGS]{F[1]}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{{}}", ("", "", [F, G])),
    ("", "mistral", f"[TOOL_CALLS] [{F_OBJECT}, {G_OBJECT}]", ("", "", [F, G])),
    ("", "llama3", f"{F_LLAMA}, {G_LLAMA}", ("", "", [F, G])),
    ("", "llama3", f"{F_LLAMA}; {G_LLAMA}", ("", "", [F, G])),
    ("", "llama3", f"{F_LLAMA}\n{G_LLAMA}", ("", "", [F, G])),
    ("", "llama3", '{"name": "Bob", "parameters": {}}', ('{"name": "Bob", "parameters": {}}', "", [])),
    ("qwen3", "deepseek", f"{THINK}Yes.{V3}", ("Yes.", HM, [F, G])),
    ("", "deepseek", V31, ("", "", [F, G])),
    ("", "kimi", f"Yes.<|tool_calls_section_begin|>{KIMI}<|tool_calls_section_end|>", ("Yes.", "", [F, G])),
    ("", "granite", f"<|tool_call|>[{F_OBJECT}, {G_OBJECT}]", ("", "", [F, G])),
    ("", "jamba", f"<tool_calls>[{F_OBJECT}, {G_OBJECT}]</tool_calls>", ("", "", [F, G])),
    ("", "nemotron", f"<TOOLCALL>[{F_OBJECT}, {G_OBJECT}]</TOOLCALL>", ("", "", [F, G])),
    ("", "longcat", f"<longcat_tool_call>{F_OBJECT}</longcat_tool_call>", ("", "", [F])),
    ("", "internlm", f"Yes.<|action_start|><|plugin|>\n{F_LLAMA}<|action_end|>\n", ("Yes.", "", [F])),
    (*("command",) * 2, f"<|START_THINKING|>hm.<|END_THINKING|><|START_ACTION|>{COMMAND}<|END_ACTION|>", ("", HM, [F, G])),
    *(
        ("harmony", "harmony", *case)
        for case in (
            (f"{ANALYSIS}<|channel|>final<|message|>Yes.<|return|>", ("Yes.", HM, [])),
            ("<|channel|>final<|message|>Yes.", ("Yes.", "", [])),
            ("Yes.", ("Yes.", "", [])),
            (f"{ANALYSIS}<|channel|>commentary to=functions.f <|constrain|>json<|message|>{F[1]}<|call|>", ("", HM, [F])),
            (f"{ANALYSIS} to=functions.f<|channel|>commentary json<|message|>{F[1]}", ("", HM, [F])),
            (f"{ANALYSIS}<|channel|>commentary to=functions.g<|message|>", ("", HM, [G])),
            (f"{ANALYSIS}<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant{ANALYSIS}", ("Wait.", "hm.\nhm.", [])),
            ("<|channel|>analysis to=python<|message|>1+1<|call|>", ("", "1+1", [])),
            ("<|channel|>analysis<|message|>hm", ("", "hm", [])),
            ("<|channel|>anal", ("", "", [])),
        )
    ),
    # Brackets too few and too many.
    *(
        ("", "hermes", f"<tool_call>{said}", ("", "", [F]))
        for said in (
            '\n{"name": "f", "arguments": {"a": 1}}}\n</tool_call>',
            '\n{"name": "f", "arguments": {"a": 1}\n</tool_call>\n',
            '{"name": "f", "arguments": {"a": 1</tool_call>',
            '{"name": "f", "arguments": {"a": 1}}]}</tool_call>',
            '[{"name": "f", "arguments": {"a": 1}]</tool_call>',
            '{{"name": "f", "arguments": {"a": 1}}}</tool_call>',
            '{"name": "f", "arguments": {"a": 1}}</tool_call></tool_call>',
            '{"name": "f", "arguments": {"a": 1}</tool_call>}',
            '{"name": "f", "arguments": {"a": 1}',
            '{"name": "f", "arguments": {"a": 1',
        )
    ),
    ("", "hermes", f"<tool_call>{F_OBJECT[:-1]}<tool_call>{G_OBJECT[:-1]}</tool_call>", ("", "", [F, G])),
    ("", "hermes", f"<tool_call>{F_OBJECT[:-2]}<tool_call>{G_OBJECT}}}</tool_call> Yes.", (" Yes.", "", [F, G])),
    ("", "hermes", '<tool_call>{"name": "g"</tool_call>', ("", "", [G])),
    ("", "hermes", '<tool_call>{"name": "f", "arguments": {"a": [2}}</tool_call>', ("", "", [("f", '{"a": [2]}')])),
    ("", "granite", '<|tool_call|>[{"name": "f", "arguments": {"a": 1]<|/tool_call|>', ("", "", [F])),
    ("", "llama3", f"{F_LLAMA}}}] Yes.", ("Yes.", "", [F])),
    ("", "mistral", f"[TOOL_CALLS]f[ARGS]{F[1][:-1]}[TOOL_CALLS]g[ARGS]{{}}}}", ("", "", [F, G])),
    ("", "llama3", f"{F_LLAMA}}}; {G_LLAMA[:-1]}", ("", "", [F, G])),
    ("harmony", "harmony", f"<|channel|>commentary to=functions.f<|message|>{F[1][:-1]}<|call|>", ("", "", [F])),
]  # fmt: skip


def scripted(reasoning: str, tools: str, pieces: list[str], finish: Finish = Finish.STOP) -> Answer:
    """(content, thought, calls) of an answer in pieces; a growth at a time they add up to the message."""
    reply = Reply(Form(reasoning, tools, ("f", "g")))
    grown: dict[str, str] = {"text": "", "thought": ""}
    for i, piece in enumerate(pieces):
        for item, text in reply.feed(piece, finish if i == len(pieces) - 1 else Finish.NONE, thinking=False):
            if item.kind != "call":
                grown[item.kind] += text
    message = reply.message()
    assert grown == {"text": message["content"] or "", "thought": message.get("reasoning") or ""}
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]
    return message["content"] or "", message.get("reasoning") or "", calls


def told(reasoning: str, tools: str, pieces: list[str]) -> tuple[str, int]:
    """(the text in which stop strings count, tokens of the thoughts), a piece being a token; nothing may be lost."""
    outline = Outline(reasoning, False, tools)
    parts = [part for piece in pieces for part in outline.feed(piece)] + outline.end("")
    assert "".join(text for _, text in parts) == "".join(pieces)
    return "".join(text for counts, text in parts if counts), outline.thought_tokens


@pytest.mark.parametrize(("reasoning", "tools", "text", "answer"), READ)
def test_every_form_is_read(reasoning: str, tools: str, text: str, answer: Answer) -> None:
    assert scripted(reasoning, tools, [text]) == answer
    assert scripted(reasoning, tools, list(text)) == answer
    if not answer[2]:
        assert told(reasoning, tools, list(text))[0].strip() in (answer[0], "")
    assert (told(reasoning, tools, list(text))[1] > 0) is bool(answer[1])


PIECES = sorted({text[a:b] for *_, text, _ in READ for a, b in ((0, 9), (3, 40), (0, len(text)), (-12, None))})


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(READ), st.lists(st.sampled_from(PIECES), max_size=3), st.lists(st.integers(0, 400), max_size=12))
def test_the_pieces_of_a_stream_say_what_the_whole_says(case: Any, more: list[str], cuts: list[int]) -> None:
    reasoning, tools, text, _ = case
    text += "".join(more)
    at = sorted({min(cut, len(text)) for cut in cuts})
    pieces = [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]
    for finish in (Finish.STOP, Finish.LENGTH):
        assert scripted(reasoning, tools, pieces, finish) == scripted(reasoning, tools, [text], finish)
    assert told(reasoning, tools, pieces)[0] == told(reasoning, tools, [text])[0]


def test_a_call_that_max_tokens_cuts_off_is_not_completed() -> None:
    assert scripted("", "hermes", ['<tool_call>{"name": "f", "arguments": {"a": 1'], Finish.LENGTH) == (
        "",
        "",
        [("f", '{"a": 1')],
    )


@pytest.mark.parametrize("name", ["reasoning", "tools"])
@pytest.mark.parametrize("value", ["nonsense", None, 5, ["qwen3"]])
def test_an_unknown_form_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidParam, match=f"^{name} must be one of .*harmony"):
        SamplingParams(**{name: value})


def test_a_conversation_offline_is_read_by_its_own_prompt(tmp_path: Path) -> None:
    path = save_scripted(tmp_path / "m", template("<think>\n", "", False), {"<think>\n": ["a.", "</think>\n", "b.", "c"]})
    params = SamplingParams(temperature=0, max_tokens=20, stop=("a", "."), reasoning="qwen3")
    with LLM(path, processes=False, kv_tokens=1024) as llm:
        [answer] = llm.chat([ASK["messages"]], params)
        [text] = llm.generate(["<think>\n"], replace(params, thinking=True))
    assert answer.text == text.text == "a.</think>\nb"


def test_the_flags_name_every_form() -> None:
    assert set(CALL_STYLES) == set(FORMATS)
    assert {style for _, style in chat_format._TOOL_CALLS} <= {"", *FORMATS}
    assert {style for _, style in chat_format._THOUGHTS} <= set(STYLES)


@pytest.mark.parametrize(
    ("source", "styles"),
    [
        ("tools <|start|>{{ role }}<|message|>", ("harmony", "harmony")),
        ('tools {"name": function name, "parameters": dictionary of argument name and its value}', ("llama3", "")),
        ('tools {\\"name\\": function name, \\"parameters\\": dictionary}', ("llama3", "")),
        ("tools '{\"name\": \"' + tool_call.name + '\", ' }}{{ '\"parameters\": ' }}", ("llama3", "")),
        (f"tools {D[0]} </think>", ("deepseek", "qwen3")),
        ("tools [TOOL_CALLS] [THINK]", ("mistral", "mistral")),
        ("tools <|START_ACTION|> <|START_THINKING|>", ("command", "command")),
        ("tools <|tool_calls_section_begin|>", ("kimi", "")),
        ("tools <|tool_call|>", ("granite", "")),
        ('tools {"name": <function-name>, "arguments": <args-json-object>}', ("", "")),
        ('{"name": n, "parameters": p}', ("", "")),
    ],
)
def test_a_template_shows_the_form_of_its_model(source: str, styles: tuple[str, str]) -> None:
    assert guess({"default": source}) == styles


@pytest.mark.parametrize(
    ("style", "prompt", "said", "inside"),
    [
        ("qwen3", "hi<|im_end|>assistant\n<think>\n", "hi", True),
        ("qwen3", "hi<|im_end|>assistant\n<think>", "hi", True),
        ("qwen3", "hi<|im_end|>assistant\n<think>\n\n</think>\n\n", "hi", False),
        ("qwen3", "hi<|im_end|>assistant\n", "hi", False),
        ("qwen3", "hi<|im_end|>assistant\n</think>", "hi", False),
        ("qwen3", "what is <think>?<|im_end|>assistant\n", "what is <think>?", False),
        ("qwen3", "<think>x</think>hi<|im_end|>assistant\n<think>\nFirst,", "hi", True),
        ("qwen3", "say <think> hi<|im_end|>assistant\n", "hi", False),
        ("qwen3", "say <think><|im_end|>say <think><|im_end|>assistant\n", "say <think>", False),
        ("qwen3", "hi<|im_end|>A <think>!<|im_end|>hi<|im_end|>assistant\n", "hi", False),
        ("deepseek_r1", "hi<|Assistant|>", "hi", True),
        ("deepseek_r1", "hi<|Assistant|></think>", "hi", False),
        ("deepseek_r1", "hi<|Assistant|><think>\n\n</think>\n\nSo", "hi", False),
        ("mistral", "hi[/INST][THINK]", "hi", True),
        ("harmony", "hi<|end|><|start|>assistant", "hi", False),
        ("harmony", "hi<|end|><|start|>assistant<|channel|>analysis<|message|>", "hi", True),
    ],
)  # fmt: skip
def test_the_prompt_shows_where_its_answer_begins(style: str, prompt: str, said: str, *, inside: bool) -> None:
    assert begins_inside(style, prompt, said) is inside


@pytest.mark.parametrize("style", ["qwen3", "deepseek_r1"])
def test_an_answer_that_is_continued_is_inside_the_thought_that_it_has_begun(style: str) -> None:
    head = "hi<|im_end|>assistant\n"
    for begun, inside in (("Sure,", False), ("<think>\nFirst,", True), ("<think>\nFirst,\n</think>\n\nSure,", False)):
        assert begins_inside(style, head + begun, "hi", continued=True) is inside
