"""JSON schemas of answers and tools: references mean what they mean in the schema, and what cannot be followed is said."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_reply import CALL, SCHEMA, WEATHER, Speaker, admits, ask, chat, play
from test_server import check_error

from minisgl import grammar
from minisgl.api.requests.json_schemas import portable
from minisgl.errors import InvalidParam

STYLES = ("hermes", "llama3", "mistral", "response_format")
TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
USER = [{"role": "user", "content": "hi"}]


def obj(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


def tool(name: str, parameters: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def form(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


def called(style: str, name: str, arguments: Any) -> str:
    text = json.dumps({"name": name, "parameters" if style == "llama3" else "arguments": arguments})
    return {"hermes": f"<tool_call>\n{text}\n</tool_call>", "llama3": text, "mistral": f"[{text}]"}[style]


def bound(style: str, schema: Any, **more: Any) -> tuple[str, Any]:
    """The grammar of an answer of that schema, as the arguments of a call or as its form; how a value is written in it."""
    if style == "response_format":
        request = chat(response_format=form(schema, **more))
        grammar.check(request.params.grammar, "response_format")
        return request.params.grammar, json.dumps
    request = chat(style, tools=[tool("f", schema, **more)], tool_choice="required")
    grammar.check(request.params.grammar, "tools")
    return request.params.grammar, lambda value: called(style, "f", value)


# ---------------- references
TREE = obj({"value": WHOLE, "next": {"$ref": "#"}})
REFERENCES: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {  # the schema, what it admits and what it does not
    "the root": (
        TREE,
        [{"next": {"next": {"value": 1}}}],
        [{"next": {"name": "f", "arguments": {}}}, {"next": {"value": "x"}}],
    ),
    "a property": (obj({"a": WHOLE, "b": {"$ref": "#/properties/a"}}), [{"b": 1}], [{"b": "x"}]),
    "an identified root": (
        obj({"a": WHOLE, "b": {"$ref": "#/properties/a"}}, **{"$id": "https://x.org/a"}),
        [{"b": 1}],
        [{"b": ""}],
    ),
    "the root by its name": (obj({"v": WHOLE, "b": {"$ref": "f"}}, **{"$id": "f"}), [{"b": {"v": 1}}], [{"b": {"v": "x"}}]),
    "an anchor": (obj({"a": {"$ref": "#x"}}, **{"$defs": {"y": {"$anchor": "x", **WHOLE}}}), [{"a": 1}], [{"a": "x"}]),
    "an anchor of draft 6": (obj({"a": {"$ref": "#x"}}, definitions={"y": {"$id": "#x", **WHOLE}}), [{"a": 1}], [{"a": "x"}]),
    "nested definitions": (
        obj({"a": {"$ref": "#/$defs/x/$defs/y"}}, **{"$defs": {"x": {"$defs": {"y": WHOLE}}}}),
        [{"a": 1}],
        [{"a": "x"}],
    ),
    "other places": (
        obj(
            {"a": {"$ref": "#/components/schemas/X"}},
            components={"schemas": {"X": obj({"b": {"$ref": "#/components/schemas/Y"}}), "Y": WHOLE}},
        ),
        [{"a": {"b": 1}}],
        [{"a": {"b": "x"}}],
    ),
    "an item": (obj({"a": {"anyOf": [TEXT, WHOLE]}, "b": {"$ref": "#/properties/a/anyOf/1"}}), [{"b": 1}], [{"b": "x"}]),
    "escapes": (
        obj(
            {
                n: {"$ref": f"#/$defs/{r}"}
                for n, r in (("a", "x~1y"), ("b", "x~0y"), ("c", "x%25y"), ("d", "x%20y"), ("e", "~01"))
            },
            **{"$defs": {"x/y": WHOLE, "x~y": TEXT, "x%y": {"type": "null"}, "x y": {"const": 7}, "~1": {"const": 8}}},
        ),
        [{"a": 1, "b": "x", "c": None, "d": 7, "e": 8}],
        [{"a": "x"}, {"b": 1}, {"c": 1}, {"d": 1}, {"e": 1}],
    ),
    "relative names": (
        obj(
            {"a": {"$ref": "sub/item.json"}, "b": {"$ref": "sub/item.json#/$defs/k"}, "c": {"$ref": "/sub/item.json#named"}},
            **{"$id": "https://x.org/root.json"},
            **{
                "$defs": {
                    "i": {
                        "$id": "sub/item.json",
                        **obj({"k": {"$ref": "#/$defs/k"}, "up": {"$ref": "../root.json"}}),
                        "$defs": {"k": {"const": 1}, "n": {"$anchor": "named", "const": 2}},
                    }
                }
            },
        ),
        [{"a": {"k": 1, "up": {"b": 1}}, "b": 1, "c": 2}],
        [{"a": {"k": 2}}, {"a": {"up": {"b": 2}}}, {"b": 2}, {"c": 1}],
    ),
    "a uniform name": (
        obj({"a": {"$ref": "urn:x:i#/$defs/k"}}, **{"$defs": {"i": {"$id": "urn:x:i", "$defs": {"k": WHOLE}}}}),
        [{"a": 1}],
        [{"a": ""}],
    ),
    "draft 4": (
        obj(
            {"a": {"$ref": "i.json"}},
            **{"$schema": "http://json-schema.org/draft-04/schema#", "id": "http://x.org/r.json"},
            definitions={"i": {"id": "i.json", **WHOLE}},
        ),
        [{"a": 1}],
        [{"a": "x"}],
    ),
    "keywords beside it": (
        obj({"a": {"$ref": "#/$defs/x", "maxLength": 2, "description": "short"}}, **{"$defs": {"x": TEXT}}),
        [{"a": "xy"}],
        [{"a": "xyz"}, {"a": 1}],
    ),
    "recursion with keywords beside it": (
        obj({"v": WHOLE, "kids": {"type": "array", "items": {"$ref": "#", "type": "object"}}}),
        [{"v": 1, "kids": [{"kids": []}]}],
        [{"kids": [1]}, {"kids": [{"v": "x"}]}],
    ),
    "mutual recursion": (
        obj(
            {"a": {"$ref": "#/$defs/a"}},
            **{"$defs": {"a": obj({"b": {"$ref": "#/$defs/b"}}), "b": obj({"a": {"$ref": "#/$defs/a"}, "n": WHOLE})}},
        ),
        [{"a": {"b": {"a": {}, "n": 1}}}],
        [{"a": {"b": {"n": "x"}}}, {"a": {"a": {}}}],
    ),
    "a reference to a reference": (
        obj({"a": {"$ref": "#/$defs/x"}}, **{"$defs": {"x": {"$ref": "#/$defs/y"}, "y": WHOLE}}),
        [{"a": 1}],
        [{"a": ""}],
    ),
    "a dynamic one": (
        obj({"v": WHOLE, "a": {"$dynamicRef": "#node"}}, **{"$dynamicAnchor": "node"}),
        [{"a": {"v": 1}}],
        [{"a": {"v": ""}}],
    ),
    "a recursive one": (
        obj({"v": WHOLE, "a": {"$recursiveRef": "#"}}, **{"$recursiveAnchor": True}),
        [{"a": {"v": 1}}],
        [{"a": {"v": ""}}],
    ),
    "properties called like keywords": (
        obj({"$ref": WHOLE, "$defs": TEXT, "$id": TEXT, "properties": {"$ref": "#/properties/$ref"}}),
        [{"$ref": 1, "$defs": "x", "$id": "x", "properties": 1}],
        [{"$ref": "x"}, {"properties": "x"}],
    ),
    "a root that is one": (
        {"$ref": "#/$defs/x", "$defs": {"x": obj({"n": WHOLE, "x": {"$ref": "#/$defs/x"}})}},
        [{"x": {"n": 1}}],
        [{"x": {"n": ""}}],
    ),
    "depth": (
        obj(
            {"n": {"$ref": "#/$defs/n39"}},
            **{"$defs": {"n0": WHOLE} | {f"n{i + 1}": obj({"n": {"$ref": f"#/$defs/n{i}"}}) for i in range(39)}},
        ),
        [{"n": {"n": {}}}],
        [{"n": {"n": 1}}],
    ),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", REFERENCES)
def test_references_resolve_within_the_schema_in_which_they_stand(name: str, style: str) -> None:
    schema, good, bad = REFERENCES[name]
    text, write = bound(style, schema, strict=True)
    assert [value for value in good if not admits(text, write(value))] == []
    assert [value for value in bad if admits(text, write(value))] == []


@pytest.mark.parametrize("style", STYLES[:3])
def test_definitions_of_several_tools_do_not_meet(style: str) -> None:
    tools = [
        tool(
            name,
            obj({"a": {"$ref": "#/$defs/T"}, "b": {"$ref": "#"}}, **{"$id": "t", "$defs": {"T": {"$anchor": "x", **inner}}}),
        )
        for name, inner in (("one", TEXT), ("two", WHOLE))
    ]
    text = chat(style, tools=tools, tool_choice="required").params.grammar
    either = chat(
        style, tools=tools, response_format=form(obj({"a": {"$ref": "#/$defs/T"}}, **{"$defs": {"T": {"type": "null"}}}))
    )
    for t in (text, either.params.grammar):
        grammar.check(t, "tools")
        for name, good, bad in (("one", "x", 1), ("two", 1, "x")):
            assert admits(t, called(style, name, {"a": good, "b": {"b": {"a": good}}}))
            assert not admits(t, called(style, name, {"a": bad}))
            assert not admits(t, called(style, name, {"b": {"a": bad}}))
    assert admits(either.params.grammar, '{"a": null}')
    assert not admits(either.params.grammar, '{"a": 1}')


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        (obj({"a": {"$ref": "#/$defs/nowhere"}}), "#/properties/a/$ref leads to '#/$defs/nowhere'"),
        (
            obj({"a": {"$ref": "#/$defs/a"}}, **{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
            "leads to itself",
        ),
        ({"type": "object", "allOf": [{"$ref": "#"}]}, "leads to itself"),
        (obj({"a": 5}), "#/properties/a must be an object or a boolean, not a number"[:50]),
        (obj({"a": {"type": "strnig"}}), "#/properties/a/type must be one of null"),
        (obj({"a/b": {"minLength": -1}}), "#/properties/a~1b/minLength must be an integer of 0 or more"),
        (obj({"a": {"anyOf": {}}}), "#/properties/a/anyOf must be an array, not an object"),
        (obj({"a": {"pattern": 1}}), "#/properties/a/pattern must be a string"),
        (obj({"a": {"required": True}}), "#/properties/a/required must be an array"),
        (obj({"a": {"$ref": 5}}), "#/properties/a/$ref must be a string"),
    ],
)
def test_what_is_no_schema_is_refused_by_its_place(schema: Any, word: str) -> None:
    with pytest.raises(InvalidParam) as e:
        chat(tools=[WEATHER, tool("f", schema)], tool_choice="required")
    assert e.value.param == "tools[1].function.parameters"
    assert word in e.value.message
    with pytest.raises(InvalidParam, match="response_format"):
        chat(response_format=form(schema))


def test_schemas_of_any_depth_and_size_end_in_an_answer_or_a_refusal() -> None:
    deep: Any = WHOLE
    for _ in range(90):
        deep = obj({"n": deep})
    text, write = bound("hermes", deep)
    assert admits(text, write({"n": {"n": {}}}))
    for schema in (
        obj({"n": {"items": obj({"n": deep})}} | {f"p{i}": TEXT for i in range(30_000)}),
        {"allOf": [obj({"n": deep})] * 300},
    ):
        with pytest.raises(InvalidParam, match="at most"):
            chat(response_format=form(schema))
    wide = obj({f"p{i}": {"$ref": "#/$defs/x"} for i in range(1000)}, **{"$defs": {"x": obj({"a": {"enum": ["x" * 100]}})}})
    assert len(json.dumps(portable(wide, "x").schema)) < 60_000  # a definition stands once


# ---------------- a form and tools
@pytest.mark.parametrize("reasoning", ["", "qwen3"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_demanded_call_is_bound_by_its_tool_and_not_by_the_form_of_text(choice: Any, reasoning: str) -> None:
    for response_format in ({"type": "json_object"}, form(SCHEMA)):
        request = chat("hermes", reasoning, tools=[WEATHER], tool_choice=choice, response_format=response_format)
        assert request.bound_by == "tools"
        assert admits(request.params.grammar, CALL)
        assert not admits(request.params.grammar, CALL.replace("city", "town"))
        assert not admits(request.params.grammar, '{"n": 5}')


def test_with_tool_choice_auto_text_is_bound_by_the_form_and_a_call_by_its_tool() -> None:
    request = chat(tools=[WEATHER], response_format=form(SCHEMA))
    text = request.params.grammar
    assert (admits(text, CALL), admits(text, '{"n": 5}')) == (True, True)
    assert not any(admits(text, said) for said in (CALL.replace("city", "town"), '{"n": "x"}', "Hello."))
    text = chat(tools=[WEATHER], tool_choice="none", response_format=form(SCHEMA)).params.grammar
    assert (admits(text, CALL), admits(text, '{"n": 5}')) == (False, True)


def test_a_form_and_a_demanded_call_go_together_at_every_endpoint() -> None:
    flat = {"type": "function", **WEATHER["function"]}
    block = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}
    bodies = {
        CHAT: {"messages": USER, "tools": [WEATHER], "tool_choice": "required", "response_format": form(SCHEMA)},
        RESPONSES: {
            "input": "hi",
            "tools": [flat],
            "tool_choice": "required",
            "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
        },
        MESSAGES: {
            "max_tokens": 9,
            "messages": USER,
            "tools": [block],
            "tool_choice": {"type": "any"},
            "output_format": {"type": "json_schema", "schema": SCHEMA},
        },
    }

    async def scene(http: Any) -> None:
        for path, body in bodies.items():
            assert (await ask(http, path, body))[0] == 200, path

    play(engine := Speaker(CALL, tool_call_parser="hermes"), scene)
    for _, params in engine.opened:
        assert admits(params.grammar, CALL)
        assert not admits(params.grammar, '{"n": 5}')


# ---------------- what the library cannot follow
RELAXED: dict[str, Any] = {  # schema, keyword, what it admits, what even so it does not
    "oneOf": (
        {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "string", "minLength": 2}]},
        "oneOf",
        ["x", "long"],
        [1],
    ),
    "oneOf of numbers": ({"oneOf": [{"multipleOf": 2, **WHOLE}, {"multipleOf": 3, **WHOLE}]}, "oneOf", [4, 9], ["x"]),
    "int64 minimum": ({**WHOLE, "minimum": -(2**63)}, "minimum", [-5, -(2**63)], ["x"]),
    "int64 maximum": ({**WHOLE, "minimum": 0, "maximum": 2**63 - 1}, "maximum", [5, 2**62], [-1]),
    "uint64": ({**WHOLE, "exclusiveMaximum": 2**64}, "exclusiveMaximum", [2**63 + 1], ["x"]),
    "large numbers": ({"type": "number", "maximum": 1e300}, "maximum", [5.5], ["x"]),
    "large constants": ({"enum": [2**60 + 1, "x"]}, "enum", [2**60 + 1, "x"], ["y"]),
    "uniqueItems": ({"type": "array", "items": WHOLE, "uniqueItems": True}, "uniqueItems", [[1, 2]], [["x"]]),
    "propertyNames": ({"type": "object", "propertyNames": {"maxLength": 2}}, "propertyNames", [{"ab": 1}], [[1]]),
    "not": ({**TEXT, "not": {"const": "x"}}, "not", ["y"], [1]),
    "if": (
        obj({"a": TEXT, "b": WHOLE}, **{"if": {"required": ["a"]}, "then": {"required": ["b"]}}),
        "if",
        [{"b": 1}],
        [{"b": "x"}],
    ),
    "dependentRequired": (
        obj({"a": TEXT, "b": WHOLE}, dependentRequired={"a": ["b"]}),
        "dependentRequired",
        [{"a": "x", "b": 1}],
        [{"a": 1}],
    ),
    "dependentSchemas": (
        obj({"a": TEXT}, dependentSchemas={"a": {"minProperties": 2}}),
        "dependentSchemas",
        [{}],
        [{"a": 1}],
    ),
    "dependencies": (obj({"a": TEXT}, dependencies={"a": ["a"]}), "dependencies", [{"a": "x"}], [{"a": 1}]),
    "contains": (
        {"type": "array", "items": WHOLE, "contains": {"const": 1}, "minContains": 2},
        "contains",
        [[1, 1]],
        [["x"]],
    ),
    "patterns that overlap": (
        {"type": "object", "patternProperties": {"^a": WHOLE, "b$": WHOLE}, "additionalProperties": False},
        "patternProperties",
        [{"ab": 1}],
        [{"ab": "x"}],
    ),
    "patterns of listed properties": (
        {"type": "object", "properties": {"a1": TEXT}, "patternProperties": {"[0-9]": TEXT}, "additionalProperties": WHOLE},
        "patternProperties",
        [{"a1": "x", "b1": "x", "c": 1}],
        [{"a1": 1}, {"c": None}],
    ),
    "a pattern with look-ahead for names": (
        {"type": "object", "patternProperties": {"^(?=a)": WHOLE}, "additionalProperties": False},
        "patternProperties",
        [{"ab": 1}],
        [{"ab": "x"}],
    ),
    "minProperties": (obj({"a": TEXT, "b": TEXT}, minProperties=1), "minProperties", [{"b": "x"}], [{"b": 1}]),
    "maxProperties": (obj({"a": TEXT, "b": TEXT}, maxProperties=1), "maxProperties", [{"b": "x"}], [{"b": 1}]),
    "multipleOf": ({"type": "number", "multipleOf": 1e20}, "multipleOf", [0], ["x"]),
    "look-ahead": ({**TEXT, "pattern": "^(?=.*[0-9]).{2,}$", "maxLength": 3}, "pattern", ["a1"], [1, "long"]),
    "look-behind": ({**TEXT, "pattern": "(?<!a)b"}, "pattern", ["b"], [1]),
    "groups again": ({**TEXT, "pattern": r"(a)\1"}, "pattern", ["aa"], [1]),
    "word boundaries": ({**TEXT, "pattern": r"\bx\b"}, "pattern", ["x"], [1]),
    "unevaluatedProperties": (
        {"allOf": [{"type": "object", "properties": {"a": TEXT}}], "unevaluatedProperties": False},
        "unevaluatedProperties",
        [{"a": "x"}],
        [{"a": 1}],
    ),
    "unevaluatedItems": (
        {"type": "array", "contains": {"const": 1}, "minContains": 0, "unevaluatedItems": False},
        "unevaluatedItems",
        [[1]],
        [1],
    ),
    "another document": (obj({"a": {"$ref": "https://x.org/other.json"}}), "$ref", [{"a": 5}], [{"b": 5}]),
    "maxItems": ({"type": "array", "items": WHOLE, "maxItems": 10**7}, "maxItems", [[1]], [["x"]]),
    "maxLength": ({**TEXT, "maxLength": 10**19}, "maxLength", ["x"], [1]),
    "recursion into an intersection": (
        obj({"n": {"$ref": "#", "minProperties": 1}, "v": WHOLE}),
        "minProperties",
        [{"n": {"x": {"v": 1}}}],
        [{"n": {"x": {"v": "x"}}}, {"n": 1}],
    ),
} | {
    f"format {name}": ({**TEXT, "format": name}, "format", ["x"], [1])
    for name in (
        "path",
        "password",
        "binary",
        "byte",
        "uri-reference",
        "iri",
        "regex",
        "json-pointer",
        "idn-email",
        "phone",
        "color",
    )
}


@pytest.mark.parametrize("name", RELAXED)
def test_a_keyword_that_cannot_be_followed_is_relaxed_and_named_or_under_strict_refused(name: str) -> None:
    schema, keyword, good, bad = RELAXED[name]
    whole = obj({"x": schema})
    for style in ("hermes", "response_format"):
        text, write = bound(style, whole)
        assert [v for v in good if not admits(text, write({"x": v}))] == []
        assert [v for v in bad if admits(text, write({"x": v}))] == []
        text, write = bound(style, whole, strict=False)
        bodies = {"tools": [tool("f", whole)], "tool_choice": "required"}, {"response_format": form(whole)}
        assert [chat(**body).relaxed for body in bodies] == [(keyword,)] * 2
        with pytest.raises(InvalidParam) as e:
            bound(style, whole, strict=True)
        assert e.value.param == ("tools[0].function.parameters" if style == "hermes" else "response_format")
        assert f"{keyword} at #/properties/x" in e.value.message
        assert "Set strict to false to" in e.value.message


EXACT: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {  # what the library lacks, and what can be said in other words
    "oneOf of types": ({"oneOf": [TEXT, WHOLE, {"type": "null"}]}, ["x", 1, None], [[], 0.5]),
    "oneOf of constants": ({"oneOf": [{"const": "a", "title": "A"}, {"enum": ["b", 1]}]}, ["a", "b", 1], ["c"]),
    "a discriminated union": (
        {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "discriminator": {"propertyName": "kind"}},
        [{"kind": "cat", "n": 1}, {"kind": "dog", "n": "x"}],
        [{"kind": "cat", "n": "x"}, {"n": 1}],
    ),
    "oneOf beside anyOf": ({"anyOf": [TEXT, WHOLE], "oneOf": [WHOLE, {"type": "null"}]}, [1], ["x", None]),
    "uniqueItems of one": ({"type": "array", "items": WHOLE, "uniqueItems": True, "maxItems": 1}, [[1]], [[1, 2]]),
    "uniqueItems that does not hold": ({"type": "array", "items": WHOLE, "uniqueItems": False}, [[1, 1]], [["x"]]),
    "names that are strings": (
        {"type": "object", "propertyNames": TEXT, "additionalProperties": WHOLE},
        [{"a": 1}],
        [{"a": "x"}],
    ),
    "names of a pattern": (
        {"type": "object", "propertyNames": {"pattern": "^a"}, "additionalProperties": WHOLE},
        [{"ab": 1}],
        [{"b": 1}, {"a": ""}],
    ),
    "names of a list": (
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": WHOLE},
        [{"a": 1, "b": 2}],
        [{"c": 1}, {"b": ""}],
    ),
    "unevaluatedProperties alone": (
        {"type": "object", "properties": {"a": TEXT}, "unevaluatedProperties": False},
        [{"a": "x"}],
        [{"b": 1}],
    ),
    "unevaluatedItems alone": ({"type": "array", "prefixItems": [TEXT], "unevaluatedItems": False}, [["x"]], [["x", 1]]),
    "never": ({"anyOf": [TEXT, {"not": {}}]}, ["x"], [1]),
    "formats of numbers": ({**WHOLE, "format": "int64"}, [5], ["x"]),
    "minProperties that are required": (obj({"a": TEXT}, required=["a"], minProperties=1), [{"a": "x"}], [{}]),
    "minProperties of any": ({"type": "object", "minProperties": 1}, [{"a": 1}], [{}]),
    "patternProperties": (
        {"type": "object", "properties": {"a": TEXT}, "patternProperties": {"^x-": WHOLE}, "additionalProperties": False},
        [{"a": "x", "x-b": 1}],
        [{"x-b": "x"}, {"y": 1}],
    ),
    "regular expressions of JavaScript": ({**TEXT, "pattern": r"^[[a]{2}[^]\/\cA?\_{x}$"}, ["[a!/_{x}"], ["[a!/_"]),
    "classes as JavaScript reads them": ({**TEXT, "pattern": "^[&&a-z~~+--]+$"}, ["a&,~"], ["A"]),
    "an unknown dialect": ({"$schema": "https://x.org/schema", **WHOLE}, [1], ["x"]),
    "null for a keyword": ({**TEXT, "pattern": None, "enum": None, "maxLength": 2}, ["x"], ["xyz"]),
    "arrays of older drafts": (
        {"type": "array", "items": [TEXT, WHOLE], "additionalItems": False},
        [["x", 1]],
        [["x", 1, 1], [1]],
    ),
    "then without if": ({**TEXT, "then": {"const": "x"}}, ["y"], [1]),
}
PETS = {
    "cat": obj({"kind": {"const": "cat"}, "n": WHOLE}, required=["kind"]),
    "dog": obj({"kind": {"const": "dog"}, "n": TEXT}, required=["kind"]),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_means_the_same_in_other_words_is_followed_also_under_strict(name: str) -> None:
    schema, good, bad = EXACT[name]
    text, write = bound("hermes", obj({"x": schema}, **{"$defs": PETS}), strict=True)
    assert [v for v in good if not admits(text, write({"x": v}))] == []
    assert [v for v in bad if admits(text, write({"x": v}))] == []


LOOSE = obj({"a": {"type": "array", "items": TEXT, "uniqueItems": True}, "b": {"oneOf": [{}, TEXT]}})
FLAT = {"type": "function", "name": "f", "parameters": LOOSE}
BLOCK = {"name": "f", "input_schema": LOOSE}
SHAPES: dict[str, Any] = {  # endpoint -> bodies that bind an answer by a schema, and where the schema stands in them
    CHAT: [
        ({"messages": USER, "response_format": form(LOOSE)}, "response_format"),
        ({"messages": USER, "guided_json": LOOSE}, ""),
        ({"messages": USER, "tools": [tool("f", LOOSE)], "tool_choice": "required"}, "tools[0].function.parameters"),
    ],
    "/v1/completions": [
        ({"prompt": "x", "response_format": form(LOOSE)}, "response_format"),
        ({"prompt": "x", "json_schema": LOOSE}, ""),
    ],
    RESPONSES: [
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": LOOSE}}}, "text.format"),
        ({"input": "x", "tools": [FLAT], "tool_choice": "required"}, "tools[0].parameters"),
    ],
    MESSAGES: [
        ({"max_tokens": 9, "messages": USER, "output_config": {"format": {"type": "json_schema", "schema": LOOSE}}}, ""),
        ({"max_tokens": 9, "messages": USER, "tools": [BLOCK], "tool_choice": {"type": "any"}}, "tools[0].input_schema"),
    ],
    "/generate": [({"text": "x", "sampling_params": {"json_schema": LOOSE}}, "")],
}


def strictly(body: Any) -> Any:
    """The body with every schema strict."""
    if isinstance(body, list):
        return [strictly(b) for b in body]
    if not isinstance(body, dict):
        return body
    more = {"strict": True} if LOOSE in body.values() else {}
    return {k: v if v is LOOSE else strictly(v) for k, v in body.items()} | more


@pytest.mark.parametrize("path", SHAPES)
def test_every_endpoint_names_what_it_approximates_streamed_or_not(path: str) -> None:
    async def scene(http: Any) -> None:
        for body, param in SHAPES[path]:
            for stream in (False, True):
                status, headers, _ = await ask(http, path, {**body, "stream": stream})
                assert (status, headers.get("X-Approximated-Schema")) == (200, "uniqueItems, oneOf")
                if not param:
                    continue
                status, headers, raw = await ask(http, path, {**strictly(body), "stream": stream})
                error = json.loads(raw)["error"]
                assert status == 400
                assert f"{param} cannot be followed exactly: uniqueItems at #/properties/a/uniqueItems" in error["message"]
                assert "Set strict to false" in error["message"]
                assert path == MESSAGES or check_error(status, headers, raw)["param"] == param

    play(Speaker('{"a": []}', tool_call_parser="hermes"), scene)


def test_an_answer_that_is_bound_exactly_or_not_at_all_has_no_such_header() -> None:
    async def scene(http: Any) -> None:
        for body in (
            {},
            {"response_format": form(SCHEMA)},
            {"tools": [tool("f", LOOSE)]},
            {"tools": [tool("f", LOOSE)], "tool_choice": "none"},
        ):
            _, headers, _ = await ask(http, CHAT, {"messages": USER, **body})
            assert "X-Approximated-Schema" not in headers

    play(Speaker("x", tool_call_parser="hermes"), scene)


# ---------------- white space
def test_arrays_may_break_lines_and_everything_else_is_written_in_one_form() -> None:
    inner = obj({"a": {"type": "array", "items": TEXT}, "b": TEXT})
    array = {"type": "array", "items": inner}
    values: Any = [{"a": ["x", "y"], "b": "z"}, {}]
    for schema in (array, {"$ref": "#/$defs/x", "$defs": {"x": array}}, {**array, "items": {"anyOf": [inner, {"$ref": "#"}]}}):
        text = chat(response_format=form(schema)).params.grammar
        for indent in (None, 1, 2, 4):
            assert admits(text, json.dumps(values, indent=indent))
        assert not any(admits(text, said) for said in (" []", "[] ", "[\t]", '["x"]'))
    for body in (
        {"response_format": form(inner)},
        {"response_format": {"type": "json_object"}},
        {"guided_json": {"anyOf": [inner]}},
    ):
        text = chat(**body).params.grammar
        assert admits(text, json.dumps(values[0]))
        assert not admits(text, json.dumps(values[0], indent=1))
    text, write = bound("hermes", obj({"list": array}))
    assert admits(text, write({"list": values}))
    assert not admits(text, write({"list": values}).replace(", ", ",\n"))
