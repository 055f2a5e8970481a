"""Grammars that bind an answer: JSON schemas, regular expressions, choices and EBNF, as text of the llguidance library.

The text is what travels (SamplingParams.grammar, plan.GRAMMAR); `check` runs where a request enters, in the api process or the
caller's, and minisgl.model.common.grammar gives it effect in the workers.  The library is imported when it is first needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from minisgl.errors import InvalidParam, RequestError

MAX_GRAMMAR_CHARS = 1 << 17
# As json.dumps writes.  Free white space would let a model write nothing else until max_tokens.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_schema(schema: Mapping[str, Any]) -> str:
    """JSON that a schema admits, in the order of its properties."""
    return _dump({"grammars": [{"json_schema": styled(schema)}]})


def json_object() -> str:
    """Any JSON object."""
    return json_schema({"type": "object"})


def styled(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with the white space that answers have."""
    return {**schema, "x-guidance": _STYLE}


def regex(pattern: str) -> str:
    """Text that a regular expression (syntax of Rust's crate regex, without look-around) matches from end to end."""
    import llguidance

    return str(llguidance.LLMatcher.grammar_from_regex(pattern))


def choice(options: Sequence[str]) -> str:
    """One of the options.  As one regular expression: thousands of alternatives would be too complex a grammar."""
    return regex("|".join(re.escape(option) for option in options))


def ebnf(text: str) -> str:
    """A context-free grammar: GBNF, as llama.cpp writes it (`root ::= ...`), or Lark (`start: ...`).

    Raises InvalidParam naming "grammar" where it is neither.
    """
    import llguidance

    try:
        return str(llguidance.grammar_from("grammar", text))
    except ValueError as e:
        raise InvalidParam("grammar", f"the grammar cannot be used: {_sentence(str(e))}") from e


def lark(text: str) -> str:
    """A grammar in llguidance's form of Lark."""
    return _dump({"grammars": [{"lark_grammar": text}]})


def after_thought(grammar: str, *, begun: bool) -> str:
    """The grammar behind a thought that ends with </think>; `begun`: the prompt has opened it, otherwise it may be missing."""
    start = "start: thought gap @answer" if begun else 'start: ("<think>" thought gap)? @answer'
    text = start + "\nthought[lazy]: /(?s:.*)<\\/think>/\ngap: /\\n{0,2}/"
    return _dump({"grammars": [{"lark_grammar": text}, *_named(grammar, "answer")]})


def either(one: str, other: str) -> str:
    """What one of two grammars admits."""
    return _dump({"grammars": [{"lark_grammar": "start: @one | @other"}, *_named(one, "one"), *_named(other, "other")]})


def _named(grammar: str, name: str) -> list[dict[str, Any]]:
    """A grammar as part of another, with the parts that it has itself."""
    parts = json.loads(grammar)["grammars"] if grammar.startswith("{") else [{"lark_grammar": grammar}]
    return [{**parts[0], "name": name}, *parts[1:]]


def check(grammar: str, field: str) -> None:
    """Milliseconds for what people write, without the GIL.  Raises InvalidParam naming `field` and what is wrong."""
    import llguidance

    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise InvalidParam(
            field, f"{field} makes a grammar of {len(grammar)} characters; at most {MAX_GRAMMAR_CHARS} are allowed."
        )
    fault = llguidance.LLMatcher.validate_grammar(grammar)
    if fault and not fault.startswith("WARNING"):
        raise InvalidParam(field, f"{field} cannot be used: {_sentence(fault)}")


def too_complex(tokens: int) -> RequestError:
    """For a grammar that was in order and yet cannot be followed to its end."""
    text = f"The grammar of this request became too complex to follow after {tokens} tokens; simplify the schema or pattern."
    return RequestError(text, param="response_format", code="grammar_too_complex")


def _sentence(fault: str) -> str:
    """What the library says, on one line: of a regular expression that cannot be read what is wrong with it."""
    lines = [line.strip() for line in fault.strip().splitlines()]
    line = next((line for line in lines if line.startswith("error: ")), lines[0])
    return line.removeprefix("error: ")[:300].rstrip(":.") + "."


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
