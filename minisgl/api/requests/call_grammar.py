"""Makes the grammar of an answer that must be calls of tools.  Pure; runs in the api process.

A call is an object with a name and arguments, in the marks of the model's format.  Where the model writes arguments otherwise
(between tags, or in Python's syntax), that is admitted as well, as far as it can say the same: a parameter for a parameter, in
the order of the schema; a text between tags is free, or one of the texts that its schema lists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from minisgl.api.parsers.call_formats import FORMATS, ToolFormat
from minisgl.api.parsers.xml_scan import Tags
from minisgl.api.requests.json_schemas import portable
from minisgl.api.requests.schema_alternatives import type_of
from minisgl.api.requests.structured_output import Constraint
from minisgl.grammar import styled

MAX_CALLS = 16  # in one forced answer
_WORDS = {"title", "description", "default", "examples", "deprecated", "$comment"}  # keywords that bind nothing
_LISTED = {"type", "properties", "required", "additionalProperties", "$defs"}  # of parameters that stand one by one
_FREE = ({"string"}, {"string", "null"}, {"string", "boolean"}, {"string", "boolean", "null"})  # any text is one of them


def bind(functions: Mapping[str, Mapping[str, Any]], style: str, parallel: bool) -> Constraint:
    """The grammar of calls.  The schema of each function's parameters is a grammar of its own, with its own references."""
    written = FORMATS[style]
    rules: list[str] = []
    schemas, relaxed, objects, native = [], dict[str, None](), [], []
    line = "\n" if written.tags else ""  # the line breaks next to the marks: a name may stand beside them
    for i, (at, f) in enumerate(functions.items()):
        parameters, strict = f.get("parameters") or {}, bool(f.get("strict"))
        schema, loose = portable(parameters, f"{at}.function.parameters", strict=strict, kind="object")
        # Cut as the grammar of JSON is: where an answer may also be other JSON, both read the same pieces.
        opening = (line + "{", '"name"', ": ", f'"{f["name"]}"', ", ", f'"{written.arguments}"', ": ")
        rules.append(f"tool{i}: {' '.join(map(_quote, opening))} @arguments{i} {_quote('}' + line)}")
        schemas.append({"name": f"arguments{i}", "json_schema": styled(schema)})
        objects.append(f"tool{i}")
        if own := _native(f["name"], i, schema, written):
            native.append(f"native{i}")
            rules += own[0]
            schemas += own[1]
        relaxed |= dict.fromkeys(loose)
    start = _several("call", written.brackets, written.separator, parallel)
    if written.python and native:
        start += f" | {_several('listed', ('[', ']'), ', ', parallel)}"
        rules.append(f"listed: {' | '.join(native)}")
    marks = (written.opening + ("" if line else "\n"), ("" if line else "\n") + written.closing)
    call = f"{_quote(marks[0])} one {_quote(marks[1])}" if written.closing else "one"
    one = " | ".join(objects + (native if written.tags else []))
    rules = [f"start: {start}", f"call: {call}", f"one: {one}", *rules]
    text = json.dumps({"grammars": [{"lark_grammar": "\n".join(rules)}, *schemas]}, ensure_ascii=False, separators=(",", ":"))
    return Constraint(text, "tools", tuple(relaxed))


def _several(rule: str, brackets: tuple[str, str], separator: str, parallel: bool) -> str:
    more = f"({_quote(separator)} {rule}){{0,{MAX_CALLS - 1}}}" if parallel else ""
    return " ".join(part for part in (_quote(brackets[0]), rule, more, _quote(brackets[1])) if part)


def _quote(text: str) -> str:
    return json.dumps(text) if text else ""


Native = tuple[list[str], list[dict[str, Any]]]  # rules, and the grammars of values that they name


def _native(name: str, i: int, schema: Mapping[str, Any], written: ToolFormat) -> Native | None:
    """The call of tool `i` as the model writes it, from what stands behind the opening; None if only an object can say it."""
    tags, listed, definitions = written.tags, schema.get("properties", {}), schema.get("$defs", {})
    required = set(schema.get("required", ()))
    if not (tags or written.python) or schema.keys() - _WORDS - _LISTED or required - listed.keys():
        return None
    rules: list[str] = []
    schemas: list[dict[str, Any]] = []
    for j, (key, given) in enumerate(listed.items()):
        inner, rule = _resolved(given, definitions), f"p{i}_{j}"
        body = _between_tags(key, inner, rule, tags) if tags else f"{_quote(key + '=')} @{rule}" if key.isidentifier() else ""
        if not body or not isinstance(inner, dict):
            return None
        rules.append(f"{rule}_: {body}")
        if f"@{rule}" in body:
            schemas.append({"name": rule, "json_schema": styled({**inner, "$defs": definitions} if definitions else inner)})
    names = [(f"p{i}_{j}_", key in required) for j, key in enumerate(listed)]
    if not tags:
        rules += _separated(names, f"r{i}_")
        return [f"native{i}: {_quote(name + '(')} {f'r{i}_0' if names else ''} {_quote(')')}", *rules], schemas
    head = ("\n" + tags.head[0] if tags.head[0] else "") + name + tags.head[1] + "\n"
    body = " ".join(rule if must else f"{rule}?" for rule, must in names)
    return [f"native{i}: {_quote(head)} {body} {_quote(tags.tail + chr(10) if tags.tail else '')}", *rules], schemas


def _resolved(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """The definition that a schema refers to, if it does nothing else; the types of alternatives that say nothing else, as a
    list."""
    for _ in range(8):
        if isinstance(schema, dict) and schema.keys() - _WORDS == {"$ref"}:
            schema = definitions.get(schema["$ref"].rpartition("/")[2])
    parts = schema.get("anyOf") if isinstance(schema, dict) and schema.keys() - _WORDS == {"anyOf"} else None
    if parts and all(isinstance(p, dict) and p.keys() - _WORDS == {"type"} and isinstance(p["type"], str) for p in parts):
        return {"type": [p["type"] for p in parts]}
    return schema


def _separated(names: list[tuple[str, bool]], stem: str) -> list[str]:
    """Rules for arguments in their order with commas between those that are there, the last first.

    Rule k is for those from number k on, if there is none before them; rule kb if there is one.
    """
    rules: list[str] = []
    for k in reversed(range(len(names))):
        rule, must = names[k]
        last = k == len(names) - 1
        begun, more = f"{rule}{'' if last else f' {stem}{k + 1}b'}", "" if last else f" | {stem}{k + 1}"
        if must:
            rules += [f"{stem}{k}: {begun}", f'{stem}{k}b: ", " {begun}']
        else:
            mark = "?" if last else ""
            rules += [f"{stem}{k}: ({begun}){mark}{more}", f'{stem}{k}b: (", " {begun}){mark}{more + "b" if more else ""}']
    return rules


def _between_tags(key: str, schema: Any, rule: str, tags: Tags) -> str:
    """The rule of one parameter between tags; "" if what its text may be cannot be said."""
    if not key or key != key.strip() or any(mark in key for mark in '\n<>"') or not isinstance(schema, dict):
        return ""
    line = "\n" if tags.breaks else ""
    head = _quote(f"{tags.key[0]}{key}{tags.key[1]}" + ("\n" if tags.value[0] else "") + tags.value[0] + line)
    end, bound, given = f"{line}{tags.value[1]}\n", schema.keys() - _WORDS, schema.get("type")
    kinds = set(given) if isinstance(given, list) else {given} if given else set()
    constants = [schema["const"]] if "const" in schema else schema.get("enum")
    if constants is not None:
        kinds = set(map(type_of, constants))
        if kinds == {"string"} and bound <= {"type", "enum", "const"} and not any(tags.value[1] in t for t in constants):
            return f"{head} ({' | '.join(_quote(t + end) for t in constants)})"
    elif bound <= {"type"} and (not bound or kinds in _FREE):
        pattern = re.escape(end).replace("\\\n", r"\n").replace("/", r"\/")
        return f"{head} {rule}_text\n{rule}_text[lazy]: /(?s:.*){pattern}/"
    return f"{head} @{rule} {_quote(end)}" if kinds and "string" not in kinds else ""
