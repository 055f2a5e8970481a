"""Calls that are no JSON: texts between tags (Qwen3-Coder, GLM 4.5, ...) and Python's syntax (Llama 3.2 and 4, LFM2)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_reply import Speaker, admits, ask, chat, play

from minisgl import grammar
from minisgl.api.parsers.call_formats import FORMATS
from minisgl.api.parsers.outline import Outline
from minisgl.api.parsers.reply import Form, Reply
from minisgl.api.reader import SMALL
from minisgl.api.requests.parameter_types import parameter_types
from minisgl.model.text.chat_format import guess
from minisgl.sampling_params import Finish

TYPES: dict[str, Any] = {
    "text": {"type": "string"},
    "whole": {"type": "integer"},
    "number": {"type": "number"},
    "flag": {"type": "boolean"},
    "list": {"type": "array"},
    "object": {"type": "object"},
    "nothing": {"type": "null"},
    "maybe": {"type": ["string", "null"]},
    "either": {"anyOf": [{"type": "integer"}, {"type": "array"}, {"type": "string"}]},
    "any": {},
    "kind": {"enum": ["a b", "c"]},
    "size": {"enum": [1, 2, None]},
    "linked": {"$ref": "#/$defs/linked"},
}
PARAMETERS = {
    "type": "object",
    "properties": TYPES,
    "$defs": {"linked": {"anyOf": [{"$ref": "#/$defs/i"}]}, "i": {"type": "integer"}},
}
F = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}
G = {"type": "function", "function": {"name": "g-2", "parameters": {"type": "object"}}}
TAGGED = ("qwen3_coder", "seed", "minimax", "glm")
PYTHONIC = ("pythonic", "lfm2")
Calls = list[tuple[str, dict[str, Any]]]


def between_tags(style: str, calls: Calls) -> str:
    """As the chat templates of the models write calls."""

    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    out = []
    for name, arguments in calls:
        if style == "glm":
            lines = [f"<arg_key>{k}</arg_key>\n<arg_value>{text(v)}</arg_value>\n" for k, v in arguments.items()]
            out.append(f"<tool_call>{name}\n{''.join(lines)}</tool_call>")
        elif style == "minimax":
            lines = [f'<parameter name="{k}">{text(v)}</parameter>\n' for k, v in arguments.items()]
            out.append(f'<minimax:tool_call>\n<invoke name="{name}">\n{"".join(lines)}</invoke>\n</minimax:tool_call>')
        else:
            tag, nl = ("tool_call", "\n") if style == "qwen3_coder" else ("seed:tool_call", "")
            lines = [f"<parameter={k}>{nl}{text(v)}{nl}</parameter>\n" for k, v in arguments.items()]
            out.append(f"<{tag}>\n<function={name}>\n{''.join(lines)}</function>\n</{tag}>")
    return "\n".join(out)


def in_python(style: str, calls: Calls) -> str:
    shown = [name + "(" + ", ".join(f"{k}={v!r}" for k, v in arguments.items()) + ")" for name, arguments in calls]
    return "[" + ", ".join(shown) + "]"


def written(style: str, calls: Calls) -> str:
    return between_tags(style, calls) if style in TAGGED else in_python(style, calls)


def form(style: str, *tools: Any) -> Form:
    result: Form = chat(style, tools=list(tools or (F, G))).form
    return result


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    at = sorted({min(cut, len(text)) for cut in cuts})
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]


def read(form: Form, pieces: list[str], finish: Finish = Finish.STOP) -> tuple[str, list[tuple[str, str]]]:
    """(content, [(name, arguments)]), which the growth of a stream adds up to."""
    reply, grown = Reply(form), list[Any]()
    for i, piece in enumerate(pieces):
        for item, text in reply.feed(piece, finish if i == len(pieces) - 1 else Finish.NONE):
            if item.kind == "call" and item.number == len([g for g in grown if g]):
                assert text == "", "the name comes first"
                grown.append([item.name, ""])
            elif item.kind == "call":
                grown[item.number][1] += text
    message = reply.message()
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]
    assert [tuple(g) for g in grown] == calls
    return message["content"] or "", calls


def parsed(form: Form, text: str) -> tuple[str, Calls]:
    content, calls = read(form, [text])
    assert read(form, list(text)) == (content, calls)
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


# ---------------- what a text becomes
@pytest.mark.parametrize("style", TAGGED)
@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "5", "5"),
        ("text", "true", "true"),
        ("text", "null", "null"),
        ("text", '"q"', '"q"'),
        ("text", '{"a": 1}', '{"a": 1}'),
        ("text", "", ""),
        ("text", " a\n\n  b\t", " a\n\n  b\t"),
        ("text", 'ü \U0001f600 \\n " \x01', 'ü \U0001f600 \\n " \x01'),
        (
            "text",
            "a < b <c> </parameter </parameters> </arg_value </function",
            "a < b <c> </parameter </parameters> </arg_value </function",
        ),
        ("text", "x </parameter> y </arg_value> z </function> w", "x </parameter> y </arg_value> z </function> w"),
        ("text", "</tool_call>", "</tool_call>"),
        ("text", "<tool_call>", "<tool_call>"),
        ("whole", "42", 42),
        ("whole", " -42\n", -42),
        ("whole", "+5", 5),
        ("whole", "007", 7),
        ("whole", "3.0", 3),
        ("whole", "9" * 5000, "big"),
        ("whole", "many", "many"),
        ("number", "1.5e3", 1500.0),
        ("number", ".5", 0.5),
        ("number", "2", 2),
        ("number", "NaN", "NaN"),
        ("flag", "true", True),
        ("flag", "False", False),
        ("flag", "yes", "yes"),
        ("list", '[1, {"a": "</parameter>"}]', [1, {"a": "</parameter>"}]),
        ("list", "['a', (1, None)]", ["a", [1, None]]),
        ("list", "[" * 3000, "[" * 3000),
        ("object", '{\n  "a": [true]\n}', {"a": [True]}),
        ("object", "{'a': True, 'b': {'c': 'd'}}", {"a": True, "b": {"c": "d"}}),
        ("object", "{'a': x}", "{'a': x}"),
        ("object", "[1]", "[1]"),
        ("nothing", "null", None),
        ("nothing", "None", None),
        ("maybe", "null", None),
        ("maybe", "5", "5"),
        ("maybe", "x", "x"),
        ("either", "5", 5),
        ("either", "[5]", [5]),
        ("either", "five", "five"),
        ("either", '{"a": 5}', '{"a": 5}'),
        ("any", "5", 5),
        ("any", "x y", "x y"),
        ("kind", "a b", "a b"),
        ("size", "2", 2),
        ("size", "null", None),
        ("linked", "5", 5),
    ],
)
def test_a_text_becomes_the_type_of_its_schema(style: str, key: str, text: str, value: Any) -> None:
    if value == "big":
        _, [(_, arguments)] = read(form(style), [between_tags(style, [("f", {key: text})])])
        assert arguments == f'{{"{key}": {text}}}'
        return
    assert parsed(form(style), between_tags(style, [("f", {key: text})])) == ("", [("f", {key: value})])


@pytest.mark.parametrize("style", TAGGED)
def test_an_undeclared_parameter_is_read_as_the_models_own_parsers_do(style: str) -> None:
    told = 5 if style == "glm" else "5"
    assert parsed(form(style), between_tags(style, [("f", {"more": "5"}), ("h", {"x": "5", "y": "z"})])) == (
        "",
        [("f", {"more": told}), ("h", {"x": told, "y": "z"})],
    )


def test_types_are_found_through_references_and_alternatives() -> None:
    schema = {
        "$ref": "#/$defs/root",
        "$defs": {
            "root": {
                "properties": {
                    "a": {"oneOf": [{"$ref": "#/$defs/n"}, {"const": "x"}]},
                    "b": {"allOf": [{"type": "boolean"}]},
                    "c": {"$ref": "#/$defs/loop"},
                    "d": {"type": "int", "nullable": True},
                    "e": {"anyOf": [{"type": "string"}, {}]},
                    "f": {"items": {}},
                },
                "additionalProperties": {"type": "integer"},
            },
            "n": {"type": ["number", "null"]},
            "loop": {"$ref": "#/$defs/loop"},
        },
    }
    found = parameter_types(schema)
    assert {k: set(v) for k, v in found.declared.items()} == {
        "a": {"number", "null", "string"},
        "b": {"boolean"},
        "c": set(),
        "d": {"integer", "null"},
        "e": set(),
        "f": {"array"},
    }
    assert found.others == ("integer",)


# ---------------- Python's syntax
@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('city="Paris", days=3', {"city": "Paris", "days": 3}),
        ("x=[1,{'a':None}]", {"x": [1, {"a": None}]}),
        ("", {}),
        (" a = 'x' , ", {"a": "x"}),
        ("a=True, b=false, c=None, d=null", {"a": True, "b": False, "c": None, "d": None}),
        (
            "a=-1, b=1.5e3, c=.5, d=0x1F, e=1_000, f=+2, g=1.",
            {"a": -1, "b": 1500.0, "c": 0.5, "d": 31, "e": 1000, "f": 2, "g": 1.0},
        ),
        (r"a='it\'s \n \x41\u00e9\U0001F600\101 \d'", {"a": "it's \n Aé\U0001f600A \\d"}),
        (r"""a=r'\d', b=u"x", c=''""", {"a": "\\d", "b": "x", "c": ""}),
        ('a="""x "y"\nz""", b=\'\'\'\'\'\'', {"a": 'x "y"\nz', "b": ""}),
        ("a=(1, 2), b=(), c={}, d=[], e=(1,)", {"a": [1, 2], "b": [], "c": {}, "d": [], "e": [1]}),
        ("a={1: 'x', None: 2, 'k': {True: []}}", {"a": {"1": "x", "null": 2, "k": {"true": []}}}),
        ("a=')]}', b=\"'\"", {"a": ")]}", "b": "'"}),
        ("a=three", {"a": "three"}),
        ("'x', 5, flag=True", {"text": "x", "whole": 5, "flag": True}),
        ("a='ü \U0001f600'", {"a": "ü \U0001f600"}),
    ],
)
@pytest.mark.parametrize("style", PYTHONIC)
def test_pythons_literals_become_json(style: str, text: str, arguments: dict[str, Any]) -> None:
    opening, closing = FORMATS[style].opening, FORMATS[style].closing
    for said in (f"[f({text})]", f"{opening}[f({text})]{closing}", f"[ f({text}),]"):
        assert parsed(form(style), said) == ("", [("f", arguments)]), said
    assert parsed(form(style), f"[f({text}), g-2({text}), f()]")[1][::2] == [("f", arguments), ("f", {})]


# ---------------- answers
CALL = "<tool_call>\n<function=f>\n"
READ: list[tuple[str, str, str, Calls]] = [
    ("qwen3_coder", "<tool_call>\n<function=g-2>\n</function>\n</tool_call>", "", [("g-2", {})]),
    (
        "qwen3_coder",
        "Sure.\n<function=f>\n<parameter=whole>\n1\n</parameter>\n</function>\n</tool_call>",
        "Sure.",
        [("f", {"whole": 1})],
    ),
    ("qwen3_coder", "Use <function=x> in C.", "Use <function=x> in C.", []),
    ("qwen3_coder", '<tool_call>\n{"name": "f", "arguments": {"whole": 1}}\n</tool_call>', "", [("f", {"whole": 1})]),
    ("qwen3_coder", f"{CALL}<parameter=text>\nx\n</function>\n</tool_call>", "", [("f", {"text": "x"})]),
    (
        "qwen3_coder",
        "<tool_call><function=f><parameter=text>x</parameter></function></tool_call> So.",
        " So.",
        [("f", {"text": "x"})],
    ),
    ("qwen3_coder", f"{CALL}<parameter=text>\n\n\nx\n\n</parameter>\n</tool_call>", "", [("f", {"text": "\n\nx\n"})]),
    ("qwen3_coder", f"{CALL}<parameter=text> x </parameter></function></tool_call>", "", [("f", {"text": " x "})]),
    ("qwen3_coder", f"{CALL}<parameter=text>\nx", "", [("f", {"text": "x"})]),
    ("qwen3_coder", f"{CALL}<parameter=text>\nx\n</parameter>", "", [("f", {"text": "x"})]),
    ("qwen3_coder", f"{CALL}<parameter=whole>\n12", "", [("f", {"whole": 12})]),
    ("qwen3_coder", f"{CALL}<param", "", [("f", {})]),
    ("qwen3_coder", "<tool_call>\n<function=f>", "", [("f", {})]),
    ("qwen3_coder", "<tool_call>\n<func", "<tool_call>\n<func", []),
    ("qwen3_coder", "\n" * 3000 + "<tool_call>?", "\n" * 3000 + "<tool_call>?", []),
    (
        "glm",
        "Hm.\n<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>\nx\n</arg_value>\n</tool_call>\nSo.",
        "Hm.\nSo.",
        [("f", {"text": "\nx\n"})],
    ),
    ("glm", "<tool_call>f<arg_key>whole</arg_key><arg_value>1</arg_value></tool_call>", "", [("f", {"whole": 1})]),
    ("glm", "<tool_call>g-2</tool_call><tool_call>\ng-2\n</tool_call>", "", [("g-2", {}), ("g-2", {})]),
    ("glm", "<tool_call>f\n<arg_key>whole</arg_key>\n</tool_call>", "", [("f", {"whole": None})]),
    ("glm", "<tool_call>no name here</tool_call>", "<tool_call>no name here</tool_call>", []),
    ("pythonic", "Let me see. [f(whole=1)] Done.", "Let me see.Done.", [("f", {"whole": 1})]),
    ("pythonic", "[1, 2] and [x(1)] and [h(a=1)] [f", "[1, 2] and [x(1)] and [h(a=1)] [f", []),
    ("pythonic", "[f(whole=1), h(a=2)]", "", [("f", {"whole": 1}), ("h", {"a": 2})]),
    ("pythonic", "[f(whole=1)]\nh(a=2)", "h(a=2)", [("f", {"whole": 1})]),
    ("pythonic", "[f(whole=1)] Word", "Word", [("f", {"whole": 1})]),
    ("pythonic", "<|python_start|>[h(a=1)]<|python_end|>", "", [("h", {"a": 1})]),
    ("pythonic", "[f(list=[1, 2)]", "", [("f", {"list": [1, 2]})]),
    ("pythonic", "[f(list=[1, 2", "", [("f", {"list": [1, 2]})]),
    ("pythonic", "[f(text='a", "", [("f", {"text": "a"})]),
    ("pythonic", "[f(text=", "", [("f", {"text": None})]),
    ("pythonic", "[f(whole=1]", "", [("f", {"whole": 1})]),
    ("pythonic", '[{"name": "f", "arguments": {"whole": 1}}]', "", [("f", {"whole": 1})]),
    ("pythonic", "[[[[" * 50, "[[[[" * 50, []),
    (
        "lfm2",
        '<|tool_call_start|>[f(text="<|tool_call_end|>")]<|tool_call_end|>Ok.',
        "Ok.",
        [("f", {"text": "<|tool_call_end|>"})],
    ),
]


@pytest.mark.parametrize(("style", "text", "content", "calls"), READ)
def test_text_and_calls_are_told_apart(style: str, text: str, content: str, calls: Calls) -> None:
    assert parsed(form(style), text) == (content, calls)


def test_a_call_that_max_tokens_cuts_off_is_not_completed() -> None:
    said = "<tool_call>\n<function=f>\n<parameter=text>\nx y"
    assert read(form("qwen3_coder"), [said], Finish.LENGTH) == ("", [("f", '{"text": "x y')])
    assert read(form("pythonic"), ["[f(text='x', list=[1"], Finish.LENGTH) == ("", [("f", '{"text": "x", "list": [')])


def test_strings_are_streamed_while_they_grow() -> None:
    for style in ("qwen3_coder", "pythonic"):
        reply = Reply(form(style))
        said = written(style, [("f", {"text": "one two three"})])
        so_far = said[: said.find(" three") + 1]
        grown = [text for c in so_far for _, text in reply.feed(c)]
        assert "".join(grown) == '{"text": "one two '
        assert len(grown) > 8


def test_parallel_calls_can_be_off() -> None:
    for style in (*TAGGED, *PYTHONIC):
        single = chat(style, tools=[F], parallel_tool_calls=False).form
        assert parsed(single, written(style, [("f", {"whole": 1}), ("f", {"whole": 2})])) == ("", [("f", {"whole": 1})])


def test_every_dialect_gives_them_with_their_types_also_where_a_large_body_is_read_elsewhere() -> None:
    said = between_tags("qwen3_coder", [("f", {"text": "1\n2", "whole": 3, "list": ["x"]})])
    wanted = {"text": "1\n2", "whole": 3, "list": ["x"]}
    user = [{"role": "user", "content": "hi"}]
    flat, block = {"type": "function", **F["function"]}, {"name": "f", "input_schema": PARAMETERS}

    async def scene(http: Any) -> None:
        for more in ({}, {"metadata": {"x": "y"}, "unheard": "e" * SMALL}):
            _, _, raw = await ask(http, "/v1/chat/completions", {"messages": user, "tools": [F], **more})
            [call] = json.loads(raw)["choices"][0]["message"]["tool_calls"]
            assert json.loads(call["function"]["arguments"]) == wanted
            _, _, raw = await ask(http, "/v1/responses", {"input": "hi", "tools": [flat], **more})
            [item] = json.loads(raw)["output"]
            assert json.loads(item["arguments"]) == wanted
        _, _, raw = await ask(http, "/v1/messages", {"messages": user, "tools": [block], "max_tokens": 99})
        assert json.loads(raw)["content"][0]["input"] == wanted

    play(Speaker(said, 5, tool_call_parser="qwen3_coder", max_body_bytes=1 << 20), scene)


# ---------------- whatever is said
LOOKALIKES = [
    "</parameter>",
    "</parameter",
    "<parameter=text>",
    "</function>",
    "</arg_value>",
    "<arg_key>",
    "</tool_call>",
    "\n",
    "<",
    "'",
    '"',
    "\\",
    "é",
]
TEXT = st.lists(st.sampled_from(LOOKALIKES) | st.text(max_size=5), max_size=5).map("".join)
INSIDE = ("<parameter=", "</function>", "<arg_key>", "</tool_call>", "\r")
ENDS = ("</parameter>", "</arg_value>")
SAFE = TEXT.filter(lambda t: not t.rstrip().endswith(ENDS) and not any(mark in t for mark in INSIDE))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda s: st.lists(s, max_size=3) | st.dictionaries(TEXT, s, max_size=3),
    max_leaves=6,
)
HARMLESS = JSON.filter(lambda v: not any(m in json.dumps(v) for m in ("</parameter>", "</function>", "</arg_value>")))
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "text": SAFE,
        "whole": st.integers(),
        "number": st.floats(allow_nan=False, allow_infinity=False),
        "flag": st.booleans(),
        "list": st.lists(HARMLESS, max_size=3),
        "object": st.dictionaries(st.text(max_size=3), HARMLESS, max_size=3),
        "nothing": st.none(),
        "either": st.integers() | st.lists(st.integers(), max_size=3),
    },
)
CUTS = st.lists(st.integers(0, 600), max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from((*TAGGED, *PYTHONIC)), st.lists(ARGUMENTS, min_size=1, max_size=3), CUTS)
def test_arguments_survive_being_written_and_read_whatever_the_pieces(
    style: str, given: list[dict[str, Any]], cuts: list[int]
) -> None:
    calls = [("f", arguments) for arguments in given]
    text = "Hm." + written(style, calls)
    content, told = read(form(style), pieces_of(text, cuts))
    assert (content, [(name, json.loads(arguments)) for name, arguments in told]) == ("Hm.", calls)


PARTS = sorted(
    {part for style, text, *_ in READ for part in (text[:9], text[3:40], text[:300], text[-12:])}
    | {*LOOKALIKES, "f(", "=", ")", "]", "g-2"}
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from((*TAGGED, *PYTHONIC)), st.lists(st.sampled_from(PARTS) | TEXT, max_size=6).map("".join), CUTS)
@example("pythonic", "[f(" + "'" * 7, [1, 2])
@example("pythonic", " [h(a=1)] [f", [1])
def test_the_pieces_of_a_stream_say_what_the_whole_says(style: str, text: str, cuts: list[int]) -> None:
    pieces = pieces_of(text, cuts)
    for finish in (Finish.STOP, Finish.LENGTH):
        whole = read(form(style), [text], finish)
        assert read(form(style), pieces, finish) == whole
        if not whole[1]:
            assert whole[0] == text, "what is no call is text, all of it"
        if finish is Finish.STOP:
            for _, arguments in whole[1]:
                if not text.lstrip().startswith("{") and '"name"' not in text:
                    assert isinstance(json.loads(arguments, strict=False), dict)
    outlines = []
    for split in ([text], pieces):
        outline = Outline("", False, style)
        parts = [part for piece in split for part in outline.feed(piece)] + outline.end("")
        assert "".join(said for _, said in parts) == text
        outlines.append("".join(said for counts, said in parts if counts))
    assert outlines[0] == outlines[1]


@pytest.mark.parametrize(("style", "text"), [(s, written(s, [("f", {"text": "stop here"})])) for s in (*TAGGED, *PYTHONIC)])
def test_stop_strings_do_not_count_in_calls(style: str, text: str) -> None:
    outline = Outline("", False, style)
    parts = [part for c in text for part in outline.feed(c)] + outline.end("")
    assert "stop" not in "".join(said for counts, said in parts if counts)


# ---------------- what is demanded
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
        "required": ["city"], "additionalProperties": False}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
MANY = {
    "properties": {
        "a": {"$ref": "#/$defs/n"},
        "b": {"type": ["string", "null"]},
        "c": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    },
    "required": ["c"],
    "$defs": {"n": {"type": "array", "items": {"type": "number"}}},
}
TIMES = {"type": "function", "function": {"name": "times", "parameters": MANY}}
GOOD: list[Calls] = [
    [("get_weather", {"city": "Ulm"})],
    [("get_weather", {"city": "Ulm </b>\n\nü", "days": -3, "unit": "C"})],
    [("get_weather", {"city": "", "unit": "F"})],
    [("times", {"a": [1.5, 2], "c": None}), ("get_weather", {"city": "x", "days": 3})],
    [("times", {"b": "it's", "c": 5})],
]
BAD: list[Calls] = [
    [("get_weather", {"days": 3})],
    [("get_weather", {"city": "Ulm", "days": "x"})],
    [("get_weather", {"city": "Ulm", "unit": "K"})],
    [("get_weather", {"city": "Ulm", "more": 1})],
    [("times", {"a": ["x"], "c": 1})],
    [("add", {})],
]


@pytest.mark.parametrize("style", [*TAGGED, *PYTHONIC])
def test_a_demanded_call_is_bound_in_the_form_of_the_model(style: str) -> None:
    request = chat(style, tools=[WEATHER, TIMES], tool_choice="required")
    bound = request.params.grammar
    grammar.check(bound, "tools")

    def said(calls: Calls) -> str:
        if style in TAGGED:
            return between_tags(style, calls)
        shown = [f"{name}({', '.join(f'{k}={json.dumps(v, ensure_ascii=False)}' for k, v in a.items())})" for name, a in calls]
        return f"[{', '.join(shown)}]"

    for calls in GOOD:
        assert admits(bound, said(calls)), calls
        assert parsed(request.form, said(calls)) == ("", calls)
    for calls in BAD:
        assert not admits(bound, said(calls)), calls
    assert not admits(bound, "Hello")
    only = chat(style, tools=[WEATHER, TIMES], tool_choice={"type": "function", "function": {"name": "times"}}).params.grammar
    assert admits(only, said(GOOD[4]))
    assert not admits(only, said(GOOD[0]))


@pytest.mark.parametrize("style", [*TAGGED, *PYTHONIC])
@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "x+"}}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"type": "string"}}, "anyOf": [{"required": ["a"]}]},
        {"type": "object", "properties": {"a": {"$ref": "#"}}},
        {"type": "object", "additionalProperties": {"type": "string"}},
        {"type": "object", "properties": {'a<"\n': {"type": "string"}}},
    ],
)
def test_what_cannot_be_said_between_tags_is_bound_as_an_object(style: str, parameters: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    request = chat(style, tools=[tool], tool_choice="required")
    grammar.check(request.params.grammar, "tools")
    inner = {"a": "xx"} if "required" in parameters or "anyOf" in parameters else {}
    written_as = FORMATS[style]
    text = json.dumps({"name": "f", "arguments": inner})
    text = f"{written_as.opening}\n{text}\n{written_as.closing}"
    assert admits(request.params.grammar, text)
    assert parsed(request.form, text) == ("", [("f", inner)])


# ---------------- templates
@pytest.mark.parametrize(
    ("source", "style"),
    [
        ("tools <tool_call>\n<function=example>\n<parameter=x>\n", "qwen3_coder"),
        ("tools <tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>", "glm"),
        ("tools <seed:tool_call>\n<function=x>\n<parameter=y>", "seed"),
        ('tools <minimax:tool_call>\n<invoke name="', "minimax"),
        ("tools <function=x>{json}</function>", ""),
        ("tools [func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]", "pythonic"),
        ("tools <|python_tag|> Use exact format: [func_name1(param1=value1, param2=value2), func_name2(...)]", "pythonic"),
        ("{% if tools %}<|tool_call_start|>[{% endif %}", "lfm2"),
        ("put it as [func_name1(a=b), func_name2(c)]", ""),
        ("tools {{ x[f(indent=4)] }} <|python_tag|>", "llama3"),
    ],
)  # fmt: skip
def test_a_template_shows_the_form_of_its_calls(source: str, style: str) -> None:
    assert guess({"default": source})[0] == style
