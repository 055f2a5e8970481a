"""Builds grammars that constrain an answer, from JSON schemas, regular expressions, choices and EBNF, with llguidance.

A grammar is a text of that library, and travels as such (SamplingParams.grammar, plan.GRAMMAR).  What comes over HTTP is tried
out in a process of its own (minisgl.actors.checker) before it is served; `check` is the quick form of that for the LLM class.
minisgl.model.common.grammar applies it in the workers.  The library is imported on first use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minisgl import gbnf
from minisgl.errors import InvalidParam, RequestError
from minisgl.reasoning import HARMONY, STYLES

if TYPE_CHECKING:
    from llguidance import LLParserLimits

MAX_GRAMMAR_CHARS = 1 << 17
# White space of JSON as json.dumps writes it, and that of arrays: models begin a line for every item of an array, and close one
# at once where they cannot (docs/adr/0016).
_ONE_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_LINES = {"whitespace_flexible": True, "whitespace_pattern": "[ \\n]+", "item_separator": ",", "key_separator": ":"}


def limits() -> LLParserLimits:
    """What a grammar may cost in the library, the same wherever one is checked or followed.

    Fuel is what lexers spend on new states, at worst a microsecond and 200 bytes a unit: an email address or a choice among
    4,096 texts takes 50,000 at first, ordinary patterns a few thousand a step.  A highly ambiguous grammar would stall the
    batch for seconds in one step: with these items of the parser, it is stopped after some 20 ms.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=500,
        step_max_items=10_000,
        initial_lexer_fuel=200_000,
        step_lexer_fuel=50_000,
        max_lexer_states=50_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def json_schema(schema: Mapping[str, Any]) -> str:
    """JSON that a schema admits, in the order of its properties.  An array may have line breaks."""
    return _dump({"grammars": [{"json_schema": styled(schema, lines=schema.get("type") == "array")}]})


def json_object() -> str:
    """Any JSON object."""
    return json_schema({"type": "object"})


def styled(schema: Mapping[str, Any], *, lines: bool = False) -> dict[str, Any]:
    """The schema with the white space of answers; `lines`: with spaces and line breaks wherever JSON has room for them."""
    return {**schema, "x-guidance": _LINES if lines else _ONE_FORM}


def regex(pattern: str) -> str:
    """Text that a regular expression (syntax of Rust's crate regex, without look-around) matches from end to end."""
    import llguidance

    return str(llguidance.LLMatcher.grammar_from_regex(pattern))


def choice(options: Sequence[str]) -> str:
    """One of the options, as one regular expression: a grammar with thousands of alternatives would be too complex."""
    return regex("|".join(re.escape(option) for option in options))


def ebnf(text: str) -> str:
    """A context-free grammar: GBNF, as llama.cpp writes it (`root ::= ...`), or Lark (`start: ...`).

    Raises InvalidParam naming "grammar" where it is neither.
    """
    try:
        return gbnf.to_lark(text)
    except ValueError as e:
        raise InvalidParam("grammar", f"the grammar cannot be used: {_sentence(str(e))}") from e


def unread(text: str) -> str:
    """The same before it is converted, which takes about a second for the longest: a grammar for `resolved` alone."""
    return _dump({"grammars": [{"gbnf": text}]})


def resolved(grammar: str) -> str:
    """The grammar with its `unread` parts converted.  Raises InvalidParam as `ebnf` does."""
    if '{"gbnf":' not in grammar:
        return grammar
    parts = json.loads(grammar)["grammars"]
    read = [{"lark_grammar": ebnf(p.pop("gbnf")), **p} if "gbnf" in p else p for p in parts]
    return _dump({"grammars": read})


def lark(text: str) -> str:
    """A grammar in llguidance's form of Lark."""
    return _dump({"grammars": [{"lark_grammar": text}]})


def after_thought(grammar: str, style: str, *, begun: bool) -> str:
    """`grammar`, after a thought of a style (reasoning.STYLES).  `begun`: the prompt has opened it; else it is optional."""
    tags = STYLES[style]
    if style == HARMONY:  # thoughts are messages, as the answer is
        final = r"<\|channel\|>final( ?<\|constrain\|>\w+)?<\|message\|>"
        return _dump(
            {"grammars": [{"lark_grammar": f"start: head @answer\nhead[lazy]: /(?s:.*){final}/"}, *_named(grammar, "answer")]}
        )
    start = "start: thought gap @answer" if begun else f"start: ({json.dumps(tags.open)} thought gap)? @answer"
    end = re.escape(tags.close).replace("/", r"\/")
    text = f"{start}\nthought[lazy]: /(?s:.*){end}/\ngap: /\\n{{0,2}}/"
    return _dump({"grammars": [{"lark_grammar": text}, *_named(grammar, "answer")]})


def either(one: str, other: str) -> str:
    """The texts of both grammars."""
    return _dump({"grammars": [{"lark_grammar": "start: @one | @other"}, *_named(one, "one"), *_named(other, "other")]})


def _named(grammar: str, name: str) -> list[dict[str, Any]]:
    """A grammar as part of another, with the parts that it has itself."""
    parts = json.loads(grammar)["grammars"] if grammar.startswith("{") else [{"lark_grammar": grammar}]
    return [{**parts[0], "name": name}, *parts[1:]]


def check(grammar: str, field: str) -> None:
    """Validate a grammar: milliseconds, without the GIL.  Raises InvalidParam naming `field` and the fault."""
    import llguidance

    check_size(field, len(grammar))
    fault = llguidance.LLMatcher.validate_grammar(grammar, limits=limits())
    if fault and not fault.startswith("WARNING"):
        raise unusable(field, fault)


def check_size(field: str, chars: int) -> None:
    """Raises InvalidParam for more characters than a grammar may have."""
    if chars > MAX_GRAMMAR_CHARS:
        raise InvalidParam(field, f"{field} makes a grammar of {chars} characters; at most {MAX_GRAMMAR_CHARS} are allowed.")


def unusable(field: str, fault: str) -> InvalidParam:
    """The error of a grammar in which the library has found a fault, or that is beyond its `limits`."""
    if _BEYOND.search(fault):
        return too_large(field, "the limits on its states and expressions allow")
    return InvalidParam(field, f"{field} cannot be used: {_sentence(fault)}")


def too_large(field: str, limit: str) -> InvalidParam:
    """The error of a grammar that costs more than `limit`, which is a sentence's end such as "1 s of computation"."""
    text = f"{field} makes a grammar that is too large: it takes more than {limit}. Use smaller repetitions or fewer parts."
    return InvalidParam(field, text, "grammar_too_complex")


def too_complex(tokens: int) -> RequestError:
    """The error of a request whose grammar passed `check`, but became too complex after some tokens."""
    text = f"The grammar of this request became too complex to follow after {tokens} tokens; simplify the schema or pattern."
    return RequestError(text, param="response_format", code="grammar_too_complex")


_BEYOND = re.compile(r"limits\.|fuel|too (big|large|many)|Unable to determine if regex is empty")


def _sentence(fault: str) -> str:
    """A message of the library on one line; of its report on a regular expression, the line with the fault."""
    lines = [line.strip() for line in fault.strip().splitlines()]
    line = next((line for line in lines if line.startswith("error: ")), lines[0])
    return line.removeprefix("error: ")[:300].rstrip(":.") + "."


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
