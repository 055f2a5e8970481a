"""Calls of tools and thoughts in the text of models: whatever way a text is cut, its pieces join to the same."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any

import pytest

from minisgl.api.parsers.tool_calls import FORMATS, Argued, Called, CallReader, Piece, Said

NAMES = ("get_weather", "add")


def read(style: str, pieces: list[str], **kw: Any) -> list[Piece]:
    reader = CallReader(FORMATS[style], NAMES, **kw)
    out = [p for piece in pieces for p in reader.feed(piece)]
    return out + reader.end()


def joined(pieces: Iterable[Piece]) -> tuple[str, list[tuple[str, str]]]:
    """(text, [(name, arguments)]) of all pieces of an answer."""
    said: list[str] = []
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, Said):
            said.append(piece.text)
        elif isinstance(piece, Called):
            calls.append((piece.name, ""))
        else:
            name, text = calls[piece.index]
            calls[piece.index] = (name, text + piece.text)
    return "".join(said), calls


H1 = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "}\\"{"}}\n</tool_call>'
H2 = '<tool_call>{"arguments": {"city": "Ulm"}, "name": "get_weather"}</tool_call>'
L1 = '{"name": "add", "parameters": {"a": [1, {"x": "]"}]}}'
M1 = '[{"name": "add", "arguments": {"a": 1}}, {"name": "get_weather", "arguments": {}}]'
ADD1 = ("add", '{"a": 1, "b": "}\\"{"}')
ULM = ("get_weather", '{"city": "Ulm"}')

CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", "Hello.", "Hello.", []),
    ("hermes", H1, "", [ADD1]),
    ("hermes", f"Let me see.\n{H1}\n{H2}\n", "Let me see.", [ADD1, ULM]),
    ("hermes", f"{H1} and then {H2}", " and then", [ADD1, ULM]),
    ("hermes", "a < b and <tool> <tool_call", "a < b and <tool> <tool_call", []),
    ("hermes", "<tool_call>none</tool_call> x", "<tool_call>none</tool_call> x", []),
    ("hermes", '<tool_call>{"x" 5}', '<tool_call>{"x" 5}', []),
    ("hermes", f"<tool_call><tool_call>{H1[11:]}", "<tool_call>", [ADD1]),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', "", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 2}"}</tool_call>', "", [("add", '{"a": 2}')]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "ad', '<tool_call>{"name": "ad', []),
    ("llama3", "Hi {x}", "Hi {x}", []),
    ("llama3", L1, "", [("add", '{"a": [1, {"x": "]"}]}')]),
    ("llama3", f"<|python_tag|>{L1}; {L1}", "", [("add", '{"a": [1, {"x": "]"}]}')] * 2),
    ("llama3", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    ("llama3", '{"name": "Bob", "parameters": {"a": 1}} ok', '{"name": "Bob", "parameters": {"a": 1}} ok', []),
    ("llama3", '{"city": "Ulm"}', '{"city": "Ulm"}', []),
    ("mistral", f"[TOOL_CALLS] {M1}", "", [("add", '{"a": 1}'), ("get_weather", "{}")]),
    ("mistral", M1, "", [("add", '{"a": 1}'), ("get_weather", "{}")]),
    ("mistral", 'Well[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add[ARGS]{}', "Well", [("add", '{"a": 1}'), ("add", "{}")]),
    ("mistral", "[1, 2] is a list", "[1, 2] is a list", []),
    ("mistral", "[TOOL_CALLS]?", "[TOOL_CALLS]?", []),
]


@pytest.mark.parametrize(("style", "text", "said", "calls"), CASES)
def test_text_and_calls_are_told_apart(style: str, text: str, said: str, calls: list[tuple[str, str]]) -> None:
    assert joined(read(style, [text])) == (said, calls)


@pytest.mark.parametrize("seed", range(60))
def test_pieces_of_any_split_join_to_what_the_whole_gives(seed: int) -> None:
    rng = random.Random(seed)
    style = rng.choice(list(FORMATS))
    mine = [text for s, text, *_ in CASES if s == style]
    parts = [*mine, "\n", " ", "text", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "{", "}", '"', "[", ";", ",", "]", "\\"]
    for _ in range(30):
        text = "".join(rng.choice(parts)[: rng.choice([3, 99, 99])] for _ in range(rng.randrange(1, 6)))
        whole = joined(read(style, [text]))
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(12)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert joined(read(style, pieces)) == whole
        assert joined(read(style, list(text))) == whole
        if not whole[1]:
            assert whole[0] == text, "what is no call is text, all of it"


def test_arguments_are_told_while_they_grow() -> None:
    reader = CallReader(FORMATS["hermes"], NAMES)
    seen = [p for c in H1[:50] for p in reader.feed(c)]
    assert seen[0] == Called(0, "add")
    assert [p.text for p in seen[1:] if isinstance(p, Argued)] == list(ADD1[1][: len(seen) - 1])
    assert len(seen) > 5


def test_without_parallel_calls_the_first_is_given() -> None:
    assert joined(read("hermes", [H1 + H2 + "x"], parallel=False)) == ("x", [ADD1])


def test_neighbours_come_in_one_piece() -> None:
    assert read("hermes", ["one two"]) == [Said("one two")]
    assert json.loads(joined(read("hermes", [H2]))[1][0][1]) == {"city": "Ulm"}
