"""Checks `tools`, `tool_choice` and `parallel_tool_calls` of a chat request, and makes the grammar of forced tool calls.

With `auto` the model decides whether it calls a tool.  With `required`, or with a tool's name, a grammar forces it to: the
answer then consists of calls alone, with arguments that satisfy their schemas.  Pure functions; run in the api process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minisgl import grammar
from minisgl.api.parsers.tool_calls import FORMATS
from minisgl.api.requests.fields import Field, array, boolean, function_of, of_type, wrong_type
from minisgl.errors import InvalidParam

MAX_TOOLS = 128
MAX_CALLS = 16  # in one forced answer
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
FIELDS = (
    array("tools", "Functions that the answer may call.", {"type": "object"}, "an array of tools"),
    Field(
        "tool_choice",
        "auto, none, required, or the function that must be called.",
        {},
        of_type(str | dict, "a string or an object"),
    ),
    boolean("parallel_tool_calls", "Whether an answer may call several functions."),
)


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools that an answer may call.

    `given`: OpenAI's objects, for the template.  `style`: how the model writes calls.  `grammar`: admits calls and nothing
    else; the answer is constrained by it if it `must` be a call.
    """

    given: tuple[Mapping[str, Any], ...] = ()
    names: tuple[str, ...] = ()
    style: str = ""
    parallel: bool = True
    grammar: str = ""
    must: bool = False


def read(values: Mapping[str, Any], style: str) -> Tools:
    """The tools of a chat.  `style`: how the model writes calls, "" if it has no tool calls.  Raises InvalidParam."""
    given: list[Any] = values.get("tools", [])
    parallel = values.get("parallel_tool_calls", True)
    if len(given) > MAX_TOOLS:
        raise InvalidParam("tools", f"tools may hold at most {MAX_TOOLS} tools.")
    functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(given)]
    names = [f["name"] for f in functions]
    if len(set(names)) < len(names):
        raise InvalidParam("tools", "tools holds two functions of one name.")
    must, only = _choice(values.get("tool_choice"), names)
    if not given or must is None:
        return Tools()
    if not style:
        text = (
            "tools cannot be used with this model: its chat template shows no form of tool calls that this server can read. "
            "Start the server with --tool-call-parser to name one."
        )
        raise InvalidParam("tools", text, "unsupported_parameter")
    offered = [f for f in functions if not only or f["name"] == only]
    return Tools(tuple(given), tuple(names), style, parallel, _grammar(offered, style, parallel and not only), must)


def _function(tool: Any, at: str) -> Mapping[str, Any]:
    function = function_of(tool, at)
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidParam(f"{at}.function.name", f"{at}.function.name must be 1 to 64 letters, digits, underscores or dashes.")
    if not isinstance(parameters, dict | None):
        raise wrong_type(f"{at}.function.parameters", "an object", parameters)
    return function


def _choice(value: Any, names: Sequence[str]) -> tuple[bool | None, str]:
    """(whether the model must call a tool, None if it may not; the name of the only tool that it may call, or "")."""
    if value is None or value == "auto":
        return False, ""
    if value == "none":
        return None, ""
    if value == "required":
        if not names:
            raise InvalidParam("tool_choice", "tool_choice is required, but there are no tools.")
        return True, ""
    if isinstance(value, str):
        raise InvalidParam("tool_choice", "tool_choice must be none, auto, required or the name of a function in an object.")
    function = value.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if value.get("type") != "function" or not isinstance(name, str):
        raise InvalidParam("tool_choice", 'tool_choice must be {"type": "function", "function": {"name": ...}}.')
    if name not in names:
        raise InvalidParam("tool_choice", f"tool_choice names the function {name[:64]!r}, which is not among the tools.")
    return True, name


# ---------------- forced calls
def _grammar(functions: Sequence[Mapping[str, Any]], style: str, parallel: bool) -> str:
    written = FORMATS[style]
    head, tail = map(_quote, written.brackets)
    more = f"({_quote(written.separator)} call){{0,{MAX_CALLS - 1}}}" if parallel else ""
    start = " ".join(part for part in (head, "call", more, tail) if part)
    call = f"{_quote(written.opening + chr(10))} one {_quote(chr(10) + written.closing)}" if written.closing else "one"
    one = " | ".join(f"@tool{i}" for i in range(len(functions)))
    calls = [{"name": f"tool{i}", "json_schema": _call_schema(f, written.arguments)} for i, f in enumerate(functions)]
    lark = f"start: {start}\ncall: {call}\none: {one}"
    return json.dumps({"grammars": [{"lark_grammar": lark}, *calls]}, ensure_ascii=False, separators=(",", ":"))


def _quote(text: str) -> str:
    return json.dumps(text) if text else ""


def _call_schema(function: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The schema of {"name": ..., key: {...}}.  Definitions move to the top level, where references look for them."""
    parameters = dict(function.get("parameters") or {"type": "object"})
    parameters.setdefault("type", "object")
    moved = {name: parameters.pop(name) for name in ("$defs", "definitions") if name in parameters}
    schema = {
        **moved,
        "type": "object",
        "properties": {"name": {"const": function["name"]}, key: parameters},
        "required": ["name", key],
        "additionalProperties": False,
    }
    return grammar.styled(schema)
