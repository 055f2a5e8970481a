"""Checks `tools`, `tool_choice` and `parallel_tool_calls` of a chat request, and makes the grammar of tool calls.

With `auto` the model decides whether it calls a tool.  With `required`, or with a tool's name, a grammar forces it to: the
answer then consists of calls alone, with arguments that satisfy their schemas.  Tools that are no functions are left out and
reported as ignored: this server runs none.  Pure functions; run in the api process.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minisgl.api.parsers.call_formats import FORMATS
from minisgl.api.parsers.xml_scan import Parameters
from minisgl.api.requests.call_grammar import bind as bound_by
from minisgl.api.requests.fields import (
    BOOLEAN,
    STRING,
    Field,
    Schema,
    an_object,
    array,
    boolean,
    check_object,
    check_string,
    function_of,
    of_type,
    tagged,
    wrong_type,
)
from minisgl.api.requests.parameter_types import parameter_types
from minisgl.api.requests.structured_output import Constraint
from minisgl.errors import InvalidParam

MAX_TOOLS = 128
NAME_CHARS = 64
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_CHOICES: Schema = {"enum": ["auto", "none", "required"]}
_NAMED = tagged("function", {"function": an_object({"name": STRING})})


def tools_field(function: Schema) -> Field:
    """The declaration of `tools`, where a function looks like this."""
    items = {"anyOf": [function, {**an_object({"type": STRING}), "title": "a tool of another type"}]}
    return array("tools", "Functions that the answer may call; others are ignored.", items, "an array of tools")


def tool_choice_field(named: Schema) -> Field:
    """The declaration of `tool_choice`, where a function is named like this."""
    doc = "auto, none, required, or the function that must be called."
    return Field("tool_choice", doc, {"oneOf": [_CHOICES, named]}, of_type(str | dict, "a string or an object"))


PARAMETERS: Schema = {"type": "object", "title": "JSON schema"}
_FUNCTION = an_object({"name": STRING}, description=STRING, parameters=PARAMETERS, strict=BOOLEAN)
FIELDS = (
    tools_field(tagged("function", {"function": _FUNCTION})),
    tool_choice_field(_NAMED),
    boolean("parallel_tool_calls", "Whether an answer may call several functions."),
)
# Parts of a tool's result that are no text, and what stands for them in the prompt.
_SHOWN = {"image": "image", "image_url": "image", "input_image": "image", "document": "document", "file": "file"} | {
    **{"input_file": "file", "input_audio": "audio", "audio": "audio", "video": "video"}
}


UNBOUND = Constraint()


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools that an answer may call.

    `given`: OpenAI's objects, for the template.  `style`: how the model writes calls.  `bound`: admits calls and nothing else,
    "" if no grammar is needed; the answer is constrained by it if it `must` be a call.  `ignored`: the tools that are left out.
    `parameters`: of each function, where the model writes them without their types.
    `namespaces`: the name of a function that has one -> the namespace, and the function's name in it.
    """

    given: tuple[Mapping[str, Any], ...] = ()
    names: tuple[str, ...] = ()
    style: str = ""
    parallel: bool = True
    bound: Constraint = UNBOUND
    must: bool = False
    ignored: tuple[str, ...] = ()
    namespaces: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    parameters: Mapping[str, Parameters] = field(default_factory=dict)


def read(values: Mapping[str, Any], style: str, *, bind: bool = False, name_chars: int = NAME_CHARS) -> Tools:
    """The tools of a chat.  `style`: how the model writes calls, "" if it has no tool calls.  Raises InvalidParam.

    `bind`: a grammar is needed even if the answer need not be a call.  `name_chars`: how long a function's name may be.
    """
    given: list[Any] = values.get("tools", [])
    parallel = values.get("parallel_tool_calls", True)
    found, ignored = _functions(given, name_chars)
    functions, namespaces = _named(found)
    if len(given) > MAX_TOOLS or len(functions) > MAX_TOOLS:
        raise InvalidParam("tools", f"tools may hold at most {MAX_TOOLS} tools.")
    names = [f["name"] for f in functions.values()]
    must, only = _choice(values.get("tool_choice"), names)
    if not functions or must is None:
        return Tools(ignored=ignored)
    if not style:
        text = (
            "tools cannot be used with this model: its chat template shows no form of tool calls that this server can read. "
            "Start the server with --tool-call-parser to name one."
        )
        raise InvalidParam("tools", text, "unsupported_parameter")
    offered = {at: f for at, f in functions.items() if not only or f["name"] == only}
    bound = bound_by(offered, style, parallel and not only) if must or bind else UNBOUND
    rendered = tuple({"type": "function", "function": f} for f in functions.values())
    untyped = FORMATS[style].tags or FORMATS[style].python
    parameters = {f["name"]: parameter_types(f.get("parameters") or {}) for f in functions.values()} if untyped else {}
    return Tools(rendered, tuple(names), style, parallel, bound, must, ignored, namespaces, parameters)


def offered_names(given: Sequence[Any]) -> dict[tuple[str, str], str]:
    """(namespace, name in it) of a function -> the name under which it is offered.  Raises InvalidParam."""
    return {inside: name for name, inside in _named(_functions(given, NAME_CHARS)[0])[1].items()}


def _functions(given: Sequence[Any], name_chars: int) -> tuple[list[tuple[str, str, Mapping[str, Any]]], tuple[str, ...]]:
    """(place, namespace and object of each function, names for the tools of other kinds)."""
    found: list[tuple[str, str, Mapping[str, Any]]] = []
    ignored: dict[str, None] = {}

    def add(tool: Any, at: str, namespace: str) -> None:
        check_object(at, tool)
        kind = check_string(f"{at}.type", tool.get("type", "function"))
        if kind == "function":
            found.append((at, namespace, _function(tool, at, name_chars)))
        elif kind == "namespace" and not namespace:
            check = of_type(list, "an array of tools")
            for i, inner in enumerate(check(f"{at}.tools", tool.get("tools"))):
                add(inner, f"{at}.tools[{i}]", check_string(f"{at}.name", tool.get("name")))
        else:
            word = re.sub(r"\W", "_", kind, flags=re.ASCII)
            ignored[f"tools.{word[:50]}"] = None

    for i, tool in enumerate(given):
        add(tool, f"tools[{i}]", "")
    return found, tuple(ignored)


def _function(tool: Any, at: str, name_chars: int) -> Mapping[str, Any]:
    function = function_of(tool, at)
    name, parameters, strict = function.get("name"), function.get("parameters"), function.get("strict")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > name_chars:
        text = f"{at}.function.name must be 1 to {name_chars} letters, digits, underscores, dots or dashes."
        raise InvalidParam(f"{at}.function.name", text)
    if not isinstance(parameters, dict | None):
        raise wrong_type(f"{at}.function.parameters", "an object", parameters)
    if not isinstance(strict, bool | None):
        raise wrong_type(f"{at}.function.strict", "a boolean", strict)
    return function


def _named(
    found: Sequence[tuple[str, str, Mapping[str, Any]]],
) -> tuple[dict[str, Mapping[str, Any]], dict[str, tuple[str, str]]]:
    """(the functions by place, each with a name of its own; the namespaces of those that have one)."""
    counts = Counter(function["name"] for _, _, function in found)
    functions: dict[str, Mapping[str, Any]] = {}
    namespaces: dict[str, tuple[str, str]] = {}
    for at, namespace, function in found:
        own = name = function["name"]
        if namespace:
            if counts[own] > 1:  # alone, the name would not say which is meant
                name = re.sub(r"[^A-Za-z0-9_.-]", "_", namespace) + "__" + own
            namespaces[name] = (namespace, own)
        functions[at] = {**function, "name": name}
    if len({f["name"] for f in functions.values()}) < len(functions):
        raise InvalidParam("tools", "tools holds two functions of one name.")
    return functions, namespaces


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


# ---------------- results
def results_in_words(body: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """(a chat whose tools' results are text: `[image]` stands for an image, words for what is left out of the prompt)."""
    messages, left_out = body.get("messages"), dict[str, None]()
    if not isinstance(messages, list):
        return body, ()

    def word(part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in _SHOWN:
            return part
        left_out[f"messages.{_SHOWN[kind]}"] = None
        return {"type": "text", "text": f"[{_SHOWN[kind]}]"}

    rendered = [
        {**m, "content": list(map(word, m["content"]))}
        if isinstance(m, dict) and m.get("role") in ("tool", "function") and isinstance(m.get("content"), list)
        else m
        for m in messages
    ]
    return ({**body, "messages": rendered} if left_out else body), tuple(left_out)
