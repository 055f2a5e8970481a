"""Structured answers, tools and thoughts over the API: what requests become, and how answers are taken apart."""

from __future__ import annotations

import asyncio
import functools
import json
import random
import re
from itertools import accumulate
from typing import Any

import llguidance
import openai
import pytest
from conftest import fake_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from test_server import ScriptedEngine, Server, ask, check_error, client, events

from minisgl import grammar
from minisgl.api.engine import Chunk
from minisgl.api.parsers.outline import Outline
from minisgl.api.parsers.reply import Form, Reply
from minisgl.api.parsers.thoughts import ThoughtReader
from minisgl.api.parsers.tool_calls import FORMATS
from minisgl.api.request_checks import with_thinking
from minisgl.api.requests.openai import parse_chat, parse_completion
from minisgl.config import Config, ServerConfig
from minisgl.errors import RequestError
from minisgl.model.text.chat_format import guess
from minisgl.sampling_params import Finish, SamplingParams

MESSAGES = [{"role": "user", "content": "Hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
OPEN, CLOSE = "<think>", "</think>"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


def chat(tool_style: str = "hermes", reasoning_style: str = "", **body: Any) -> Any:
    server = ServerConfig(tool_call_parser=tool_style, reasoning_parser=reasoning_style)
    return parse_chat(Config(fake_spec(), server=server), {"messages": MESSAGES, **body})


def admits(text: str, said: str) -> bool:
    """Whether a grammar admits exactly this, read byte by byte."""

    class Bytes:
        is_tokenizer_wrapper, bos_token_id, eos_token_id, special_token_ids = True, None, 256, (256,)
        tokens = (*(bytes([i]) for i in range(256)), b"<eos>")

        def __call__(self, s: Any) -> list[int]:
            return list(s if isinstance(s, bytes) else s.encode())

    matcher = llguidance.LLMatcher(llguidance.LLTokenizer(Bytes(), slices=[]), text, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    raw = list(said.encode())
    return matcher.try_consume_tokens(raw) == len(raw) and matcher.is_accepting()


# ---------------- what binds an answer
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}

STRICT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize(
    ("body", "field", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", '{"x": [1, null]}', "[1]"),
        ({"response_format": STRICT}, "response_format", '{"n": 5}', '{"n": "5"}'),
        ({"guided_json": json.dumps(SCHEMA)}, "guided_json", '{"n": 5}', "{}"),
        ({"json_schema": SCHEMA}, "json_schema", '{"n": 5}', "{}"),
        ({"guided_regex": "a+b?"}, "guided_regex", "aab", "b"),
        ({"regex": "^a/b$"}, "regex", "a/b", "a"),
        ({"guided_choice": ["yes", "no\n"]}, "guided_choice", "no\n", "no"),
        ({"choice": ["ü"]}, "choice", "ü", "u"),
        ({"guided_grammar": 'root ::= "x" [0-9]*'}, "guided_grammar", "x1", "1"),
        ({"ebnf": 'start: "x" /[0-9]+/'}, "ebnf", "x1", "x"),
        ({"structured_outputs": {"regex": "[ab]{2}"}}, "structured_outputs.regex", "ab", "a"),
        ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs.json", '{"n": 5}', "{}"),
        ({"structured_outputs": {"choice": ["a"], "grammar": None}}, "structured_outputs.choice", "a", "b"),
        ({"structured_outputs": {"json_object": True}}, "structured_outputs.json_object", "{}", "1"),
    ],
)  # fmt: skip
def test_every_field_that_binds_an_answer_becomes_a_grammar(body: Any, field: str, good: str, bad: str) -> None:
    for request in (chat(**body), parse_completion(Config(fake_spec()), {"prompt": "x", **body})):
        assert request.bound_by == field
        text = grammar.resolved(request.params.grammar)
        grammar.check(text, field)
        assert admits(text, good)
        assert not admits(text, bad)
        assert request.ignored == ()


@pytest.mark.parametrize(
    "body",
    [{}, {"response_format": {"type": "text"}}, {"guided_choice": []}, {"structured_outputs": {}}, {"regex": None}],
)
def test_without_any_no_grammar_is_made(body: Any) -> None:
    assert chat(**body).params == SamplingParams()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format.json_schema.schema"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_choice": ["a", 1]}, "guided_choice"),
        ({"ebnf": "root ::= nothing"}, "ebnf"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"regex": "a", "choice": ["b"]}, "choice"),
        ({"tools": 5}, "tools"),
        ({"tools": [{"type": 5}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"name": "x"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "required", "regex": "a"}, "regex"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(body: Any, param: str) -> None:
    with pytest.raises(RequestError) as e:
        grammar.resolved(chat(**body).params.grammar)  # `resolved` runs in the checker process
    assert (e.value.status, e.value.param) == (400, param if param != "ebnf" else "grammar")


def test_tools_are_refused_where_the_model_has_no_form_of_calls() -> None:
    with pytest.raises(RequestError, match="--tool-call-parser") as e:
        chat("", tools=[WEATHER])
    assert (e.value.param, e.value.code) == ("tools", "unsupported_parameter")
    assert not chat("", tools=[WEATHER], tool_choice="none").form


# ---------------- tools
def test_tools_reach_the_template_unless_they_may_not_be_called() -> None:
    request = chat(tools=[WEATHER], chat_template_kwargs={"x": 1})
    assert json.loads(request.prompts[0].payload)["kwargs"] == {"x": 1, "tools": [WEATHER]}
    assert request.form == Form("", "hermes", ("get_weather",))
    assert request.params.grammar == ""
    assert "tools" not in json.loads(chat(tools=[WEATHER], tool_choice="none").prompts[0].payload)["kwargs"]


@pytest.mark.parametrize("style", ["hermes", "llama3", "mistral"])
def test_an_answer_that_must_call_is_bound_and_read_back(style: str) -> None:
    def says(*calls: tuple[str, dict[str, Any]]) -> str:
        key = "parameters" if style == "llama3" else "arguments"
        texts = [json.dumps({"name": name, key: arguments}) for name, arguments in calls]
        return {
            "hermes": "\n".join(f"<tool_call>\n{t}\n</tool_call>" for t in texts),
            "llama3": "; ".join(texts),
            "mistral": f"[{', '.join(texts)}]",
        }[style]

    named = {"type": "function", "function": {"name": "get_weather"}}
    ulm, add = ("get_weather", {"city": "Ulm"}), ("add", {"a": 1})
    required = chat(style, tools=[WEATHER, ADD], tool_choice="required")
    single = chat(style, tools=[WEATHER, ADD], tool_choice="required", parallel_tool_calls=False)
    only = chat(style, tools=[WEATHER, ADD], tool_choice=named)
    for request, calls, good in (
        (required, (ulm, add), True),
        (required, (), False),
        (required, (("get_weather", {"town": 1}),), False),
        (single, (add,), True),
        (single, (add, ulm), False),
        (only, (ulm,), True),
        (only, (add,), False),
    ):
        grammar.check(request.params.grammar, "tools")
        text = says(*calls)
        assert admits(request.params.grammar, text) is good
        if good:
            reply = Reply(request.form)
            reply.feed(text, Finish.STOP)
            message = reply.message()
            assert message["content"] is None
            got = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message["tool_calls"]]
            assert got == list(calls)
            assert reply.reason(Finish.STOP) == "tool_calls"
            assert reply.reason(Finish.LENGTH) == "length"
            assert all(
                re.fullmatch(r"[a-z0-9]{9}" if style == "mistral" else r"call_\w{24}", c["id"]) for c in message["tool_calls"]
            )
    assert required.params.skip_special_tokens
    assert required.params.tools == style


@pytest.mark.parametrize("style", FORMATS)
def test_a_demanded_call_is_read_in_every_form(style: str) -> None:
    written, reasoning = FORMATS[style], "harmony" if style == "harmony" else ""
    request = chat(style, reasoning, tools=[WEATHER, ADD], tool_choice="required")
    calls = [("get_weather", '{"city": "Ulm"}'), ("add", "{}")]
    objects = [f'{{"name": "{name}", "{written.arguments}": {arguments}}}' for name, arguments in calls]
    if written.closing:
        objects = [f"{written.opening}\n{call}\n{written.closing}" for call in objects]
    text = written.separator.join(objects).join(written.brackets)
    bound = request.params.grammar
    if reasoning:
        text = f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>{text}"
        bound = with_thinking(request.params, False).grammar
    grammar.check(bound, "tools")
    assert admits(bound, text)
    reply = Reply(request.form)
    reply.feed(text, Finish.STOP, thinking=False)
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in reply.message()["tool_calls"]] == calls
    assert reply.message()["content"] is None


@pytest.mark.parametrize("style", ["", "qwen3"])
def test_an_answer_with_a_form_may_be_a_call_instead(style: str) -> None:
    for form in ({"guided_json": SCHEMA}, {"choice": ["x"]}):
        params = chat("hermes", style, tools=[WEATHER, ADD], **form).params
        text = with_thinking(params, False).grammar if style else params.grammar
        grammar.check(text, "response_format")
        assert admits(text, CALL)
        assert admits(text, '{"n": 5}' if "guided_json" in form else "x")
        assert not admits(text, CALL.replace("city", "town"))
        assert admits(text, f"<think>hm</think>\n\n{CALL}") is bool(style)


def test_definitions_in_parameters_are_found() -> None:
    parameters = {
        "$defs": {"P": {"type": "integer"}},
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/P"}},
        "required": ["p"],
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    text = chat(tools=[tool], tool_choice="required").params.grammar
    grammar.check(text, "tools")
    assert admits(text, '<tool_call>\n{"name": "f", "arguments": {"p": 3}}\n</tool_call>')
    assert not admits(text, '<tool_call>\n{"name": "f", "arguments": {"p": "x"}}\n</tool_call>')


# ---------------- thoughts
@pytest.mark.parametrize(
    ("style", "text", "thought", "answer"),
    [
        ("qwen3", "<think>\nhm\n\nso\n</think>\n\nYes.\n", "hm\n\nso", "Yes.\n"),
        ("qwen3", "No thought.", "", "No thought."),
        ("qwen3", "\n<thin air", "", "\n<thin air"),
        ("qwen3", "<think>\n\n</think>\n\nYes", "", "Yes"),
        ("qwen3", "<think>cut </thi", "cut </thi", ""),
        ("deepseek_r1", "hm </b> so\n</think>\nYes", "hm </b> so", "Yes"),
        ("deepseek_r1", "<think>\nhm</think>Yes </think>", "hm", "Yes </think>"),
        ("deepseek_r1", "</think>Yes", "", "Yes"),
        ("deepseek_r1", "", "", ""),
        ("deepseek_r1", "\n<thi", "<thi", ""),
        ("deepseek_r1", "<think>", "", ""),
    ],
)
def test_thoughts_are_told_from_answers_whatever_the_split(style: str, text: str, thought: str, answer: str) -> None:
    rng = random.Random(0)
    splits = [[text], list(text)]
    for _ in range(30):
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(6)))
        splits.append([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)])
    for pieces in splits:
        reader = ThoughtReader(style)
        told = [span for p in pieces for span in reader.feed(p)] + reader.end()
        assert tuple("".join(s.text for s in told if s.kind == k) for k in ("thought", "text")) == (thought, answer), pieces


def inside(style: str, pieces: list[str]) -> tuple[int, str]:
    """Slow and plain: how many of the pieces begin between the tags, and the text there."""
    text = "".join(pieces)
    begin, lead = 0, len(text) - len(text.lstrip())
    if text.startswith(OPEN, lead):
        begin = lead + len(OPEN)
    elif style == "qwen3":
        return 0, ""
    end = text.find(CLOSE, begin)
    starts = accumulate(map(len, pieces), initial=0)
    n = sum(begin <= at and (at < end or end < 0) for at, _ in zip(starts, pieces, strict=False))
    return n, text[begin:end] if end >= 0 else text[begin:]


TAGGED = st.lists(st.sampled_from([OPEN, CLOSE, "<", "<thi", "</th", "nk>", "a b", "\n", " ", "é"]), max_size=8).map("".join)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(("qwen3", "deepseek_r1")), TAGGED, st.lists(st.integers(0, 60), max_size=30))
def test_the_tokens_of_a_thought_are_those_that_begin_between_its_tags(style: str, text: str, cuts: list[int]) -> None:
    cuts = sorted(min(cut, len(text)) for cut in cuts)  # tokens without a text of their own are among them
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    outline, reader = Outline(style, style == "deepseek_r1"), ThoughtReader(style)
    parts = [part for piece in pieces for part in outline.feed(piece)]
    assert outline._lexer is not None
    if outline._lexer._stage == "inside":
        assert len(set(outline._starts)) <= len(CLOSE) > len(outline._lexer.held), "no more is kept than may become a tag"
    parts += outline.end("")
    tokens, thought = inside(style, pieces)
    assert outline.thought_tokens == tokens
    assert "".join(part for _, part in parts) == text, "nothing is lost"
    told = [span for piece in pieces for span in reader.feed(piece)] + reader.end()
    assert "".join(s.text for s in told if s.kind == "thought").strip() == thought.strip(), "the reader means the same thought"
    answer = "".join(part for counts, part in parts if counts)
    assert "".join(s.text for s in told if s.kind == "text").strip() == answer.strip()


def test_a_model_that_thinks_may_think_before_it_is_bound() -> None:
    opened = with_thinking(chat("", "qwen3", regex="[0-9]+").params, True).grammar
    free = with_thinking(chat("", "deepseek_r1", regex="[0-9]+").params, False).grammar
    assert admits(opened, "hm <b> 1\n</think>\n\n42")
    assert not admits(opened, "42")
    assert admits(free, "<think>hm</think>\n42")
    assert admits(free, "42")
    assert not admits(free, "hm</think>42")


def test_templates_show_how_a_model_writes() -> None:
    head = "{% if tools %}<tool_call>{% endif %}"
    assert guess({"default": "{{ messages }}"}) == ("", "")
    assert guess({"default": head}) == ("hermes", "")
    assert guess({"default": "{% if tools %}[TOOL_CALLS]{% endif %}"}) == ("mistral", "")
    assert guess({"default": "x", "tool_use": "tools <|python_tag|>"}) == ("llama3", "")
    assert guess({"default": head + "<function=name>"}) == ("", "")
    off = "{% if off %}<think>\n\n</think>\n\n{% endif %}"
    qwen3 = f"{{% set t = c.split('</think>') %}}{{% if add_generation_prompt %}}a{off}{{% endif %}}"
    assert guess({"default": qwen3}) == ("", "qwen3")
    assert guess({"default": "</think>{% if add_generation_prompt %}<think>\n{% endif %}"}) == ("", "qwen3")


# ---------------- over HTTP
class Speaker(ScriptedEngine):
    """Says a given text in pieces of a given size, `thoughts` of them a thought."""

    def __init__(self, text: str, size: int = 3, thoughts: int = 0, **server: Any) -> None:
        super().__init__(**server)
        self.thoughts = thoughts
        self.said = [text[i : i + size] for i in range(0, len(text), size)]

    def _piece(self, uid: int, at: int) -> None:
        if uid not in self.live:
            return
        last = at == len(self.said) - 1
        counted = self.thoughts if last or CLOSE in "".join(self.said[: at + 1]) else 0  # as soon as it has ended
        self.live[uid](Chunk(self.said[at], (at,), self.finish if last else Finish.NONE, 3, 0, thought_tokens=counted))
        if last:
            del self.live[uid]
        else:
            asyncio.get_running_loop().call_soon(self._piece, uid, at + 1)


def play(engine: ScriptedEngine, scene: Any) -> None:
    async def main() -> None:
        http = Server(engine)
        await http.start()
        try:
            await scene(http)
        finally:
            await http.close()
        assert sorted(engine.closed) == list(range(len(engine.opened)))

    asyncio.run(main())


TALK = f"<think>\nWhich city?\n</think>\n\nLet me see.\n{CALL}\n{CALL.replace('Ulm', 'Jena')}"
STYLES = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_a_stream_says_what_the_answer_in_one_piece_says(size: int) -> None:
    async def scene(http: Server) -> None:
        body = {"messages": MESSAGES, "tools": [WEATHER], "n": 2}
        _, _, raw = await ask(http, "/v1/chat/completions", body)
        whole = json.loads(raw)["choices"]
        _, _, raw = await ask(http, "/v1/chat/completions", {**body, "stream": True})
        got: list[dict[str, Any]] = [{"content": "", "reasoning": "", "calls": {}, "ids": {}, "reason": None} for _ in range(2)]
        for event in events(raw):
            for choice in event["choices"]:
                mine, delta = got[choice["index"]], choice["delta"]
                mine["content"] += delta.get("content") or ""
                mine["reasoning"] += delta.get("reasoning") or ""
                assert delta.get("reasoning") == delta.get("reasoning_content")
                for call in delta.get("tool_calls", ()):
                    if "id" in call:
                        assert call["type"] == "function"
                        mine["calls"][call["index"]] = call["function"]["name"] + ":"
                    mine["calls"][call["index"]] += call["function"]["arguments"]
                mine["reason"] = choice["finish_reason"] or mine["reason"]
        for i, choice in enumerate(whole):
            message = choice["message"]
            assert message["content"] == got[i]["content"] == "Let me see."
            assert message["reasoning"] == message["reasoning_content"] == got[i]["reasoning"] == "Which city?"
            calls = [f"{c['function']['name']}:{c['function']['arguments']}" for c in message["tool_calls"]]
            assert calls == list(got[i]["calls"].values()) == ['get_weather:{"city": "Ulm"}', 'get_weather:{"city": "Jena"}']
            assert choice["finish_reason"] == got[i]["reason"] == "tool_calls"

    play(Speaker(TALK, size, **STYLES), scene)


@pytest.mark.parametrize("n", [1, 3])
def test_a_chat_tells_the_tokens_of_all_its_thoughts_streamed_or_not(n: int) -> None:
    async def scene(http: Server) -> None:
        async with client(http) as sdk:
            create = functools.partial(sdk.chat.completions.create, model="tiny", messages=MESSAGES, n=n)
            whole = (await create()).usage
            told = [e.usage async for e in await create(stream=True, stream_options={"include_usage": True}) if e.usage]
            assert len(told) == 1
            for usage in (whole, told[0]):
                assert usage.completion_tokens_details.reasoning_tokens == 5 * n
                assert usage.completion_tokens == len(engine.said) * n
            plain = await sdk.completions.create(model="tiny", prompt="a")
            assert plain.usage.completion_tokens_details is None  # a text is not taken apart

    engine = Speaker(TALK, 4, thoughts=5, **STYLES)
    play(engine, scene)


def test_the_sdk_streams_and_parses_tools() -> None:
    async def scene(http: Server) -> None:
        class GetWeather(BaseModel):
            city: str

        sdk = client(http)
        tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
        answer = await sdk.chat.completions.parse(model="m", messages=MESSAGES, tools=[tool])
        assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == GetWeather(city="Ulm")
        async with sdk.chat.completions.stream(model="m", messages=MESSAGES, tools=[tool]) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_completion()
        assert "tool_calls.function.arguments.delta" in kinds
        assert [c.function.arguments for c in final.choices[0].message.tool_calls] == ['{"city": "Ulm"}', '{"city": "Jena"}']
        again = [
            *MESSAGES,
            answer.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": answer.choices[0].message.tool_calls[0].id, "content": "rain"},
        ]
        await sdk.chat.completions.create(model="m", messages=again, tools=[tool])
        await sdk.close()

    play(engine := Speaker(TALK, 5, served_names=("m",), **STYLES), scene)
    told = json.loads(engine.opened[-1][0].payload)["messages"]
    assert told[1]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Ulm"}'}
    assert told[2]["content"] == "rain"


def test_a_bad_schema_is_a_400_that_names_its_field_streamed_or_not() -> None:
    async def scene(http: Server) -> None:
        schema = {"type": "object", "properties": {"a": {"type": "strnig"}}}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        for stream in (False, True):
            status, headers, raw = await ask(
                http, "/v1/chat/completions", {"messages": MESSAGES, "response_format": form, "stream": stream}
            )
            error = check_error(status, headers, raw)
            assert (status, error["param"]) == (400, "response_format")
            assert "strnig" in error["message"]

    play(Speaker("x"), scene)
