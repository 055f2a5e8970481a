"""Rewrites the keywords of objects and arrays for the grammar library (see json_schemas.py).  Pure; api process."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Protocol

from minisgl.api.requests.schema_patterns import prefix, translate
from minisgl.api.requests.schema_references import References

_SIZES = ("minProperties", "maxProperties")
OBJECT = (
    "properties",
    "patternProperties",
    "additionalProperties",
    "propertyNames",
    "unevaluatedProperties",
    "required",
    *_SIZES,
)
ARRAY = ("items", "prefixItems", "additionalItems", "unevaluatedItems", "contains", "uniqueItems", "minItems", "maxItems")
_APPLIED = {"$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "not"}
_OF_NAMES = _APPLIED | {*("type", "const", "enum", "pattern", "format", "minLength", "maxLength", "dependencies")}
_MOST_ITEMS = 10_000  # of minItems and maxItems: the library writes each of them out

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """A schema that is being written: `node` becomes `out`, together with `more`, which hold as well.

    `base`: the URI against which its references are resolved.  `part`: other schemas hold for the same value.
    """

    node: Schema
    base: str
    path: str
    part: bool = False
    out: Schema = field(default_factory=dict)
    more: list[Any] = field(default_factory=list)


class Writer(Protocol):
    """What this module needs of json_schemas.Writer."""

    references: References

    def relax(self, keyword: str, path: str) -> None: ...
    def checked(self, value: Any, kind: type | UnionType, expected: str, path: str) -> Any: ...
    def count(self, value: Any, path: str) -> int: ...
    def schema(self, node: Any, around: str, path: str) -> Any: ...
    def share(self, written: Any) -> Any: ...


# ---------------- objects
def write_object(writer: Writer, place: Place) -> None:
    """Write the keywords of objects that a schema has."""
    node, out, base, path = place.node, place.out, place.base, place.path
    applied = bool(_APPLIED & node.keys())
    given = writer.checked(_get(node, "properties", {}), dict, "an object", f"{path}/properties")
    properties = {name: writer.schema(child, base, f"{path}/properties/{_step(name)}") for name, child in given.items()}
    required = writer.checked(_get(node, "required", []), list, "an array", f"{path}/required")
    for name in required:
        writer.checked(name, str, "an array of strings", f"{path}/required")
    additional: Any = True
    rest = "additionalProperties"
    if _get(node, rest, None) is None and (other := _get(node, "unevaluatedProperties", True)) not in (True, {}):
        rest = "unevaluatedProperties"
        if applied:  # then it depends on which of the other schemas apply
            writer.relax(rest, f"{path}/{rest}")
        else:
            additional = writer.schema(other, base, f"{path}/{rest}")
    else:
        additional = writer.schema(_get(node, rest, True), base, f"{path}/{rest}")
    patterns = _patterns(writer, place, list(properties))
    if patterns is None:  # what they admit is admitted under any name
        inner = node["patternProperties"]
        loose = [writer.schema(s, base, f"{path}/patternProperties/{_step(p)}") for p, s in inner.items()]
        additional = True if additional is True else {"anyOf": loose if additional is False else [*loose, additional]}
        patterns = {}
    found = {"properties": properties, "patternProperties": patterns, "required": required, "additionalProperties": additional}
    if _get(node, "propertyNames", True) not in (True, {}):
        _restrict_names(writer, place, found)
    out.update({k: v for k, v in found.items() if v not in ({}, [], True)})
    _sizes(writer, place, counted=not (applied or place.part))


def _patterns(writer: Writer, place: Place, listed: list[str]) -> Schema | None:
    """`patternProperties`, None if it is relaxed: the library lets one pattern alone decide what a property may be."""
    node, base, path = place.node, place.base, place.path
    given = writer.checked(_get(node, "patternProperties", {}), dict, "an object", f"{path}/patternProperties")
    heads = [prefix(p) for p in given]
    alone = len(given) == 1 and not listed
    apart = all(
        a is not None and not any(n.startswith(a) for n in listed)
        and not any(b is not None and i != j and b.startswith(a) for j, b in enumerate(heads))
        for i, a in enumerate(heads)
    )  # fmt: skip
    written = {}
    for pattern, schema in given.items():
        text = translate(pattern)
        if text is None or not (alone or apart):
            writer.relax("patternProperties", f"{path}/patternProperties")
            return None
        written[text] = writer.schema(schema, base, f"{path}/patternProperties/{_step(pattern)}")
    return written


def _restrict_names(writer: Writer, place: Place, found: dict[str, Any]) -> None:
    """Say `propertyNames` in the other keywords of objects, which are `found` already, or relax it."""
    names, base = place.node["propertyNames"], place.base
    for _ in range(8):  # a schema that only refers to another
        if isinstance(names, dict) and isinstance(names.get("$ref"), str):
            names, base = writer.references.find(names["$ref"], writer.references.inside(names, base)) or (False, base)
    properties, additional = found["properties"], found["additionalProperties"]
    said = {k for k in names if k in _OF_NAMES} if isinstance(names, dict) else {"not"}
    if found["patternProperties"] or (said and names.get("type", "string") != "string"):
        pass
    elif not said or said == {"type"}:
        return
    elif said <= {"type", "pattern"} and not properties and (text := translate(str(names["pattern"]))) is not None:
        found["patternProperties"], found["additionalProperties"] = {text: additional}, False
        return
    elif said <= {"type", "enum"} or said <= {"type", "const"}:
        listed = [n for n in names.get("enum", [names.get("const")]) if isinstance(n, str)]
        shared = writer.share(additional)
        found["properties"] = {n: s if n in listed else False for n, s in properties.items()}
        found["properties"] |= {n: shared for n in listed if n not in properties}
        found["additionalProperties"] = False
        return
    writer.relax("propertyNames", f"{place.path}/propertyNames")


def _sizes(writer: Writer, place: Place, *, counted: bool) -> None:
    """`minProperties` and `maxProperties`, which the library only counts where every listed property is required.

    A name can be written twice, so beyond the required properties a single one is sure.
    """
    node, out, path = place.node, place.out, place.path
    required, listed = set(out.get("required", ())), out.get("properties", {})
    counted = counted and listed.keys() <= required
    closed = out.get("additionalProperties") is False and "patternProperties" not in out
    for key in _SIZES:
        if _get(node, key, None) is not None:
            n = writer.count(node[key], f"{path}/{key}")
            if n <= len(required) if key == "minProperties" else closed and n >= len(listed):
                continue  # the others imply it
            most = len(required) + 1 if key == "minProperties" else n
            if not counted or n > most:
                writer.relax(key, f"{path}/{key}")
            if counted:
                out[key] = min(n, most)


# ---------------- arrays
def write_array(writer: Writer, place: Place) -> None:
    """Write the keywords of arrays that a schema has, in the form of draft 2020-12."""
    node, out, base, path = place.node, place.out, place.base, place.path
    head, rest = "prefixItems", "items"
    if isinstance(node.get("items"), list):  # older drafts
        head, rest = "items", "additionalItems"
    first = writer.checked(_get(node, head, []), list, "an array", f"{path}/{head}")
    if _get(node, rest, None) is None and (other := _get(node, "unevaluatedItems", True)) not in (True, {}):
        rest = "unevaluatedItems"
        if _APPLIED & node.keys() or "contains" in node:
            writer.relax(rest, f"{path}/{rest}")
            other = True
    else:
        other = _get(node, rest, True)
    items = writer.schema(other, base, f"{path}/{rest}")
    if first:
        out["prefixItems"] = [writer.schema(s, base, f"{path}/{head}/{i}") for i, s in enumerate(first)]
    if items is not True:
        out["items"] = items
    sizes = {}
    for key in ("minItems", "maxItems"):
        if _get(node, key, None) is not None:
            sizes[key] = writer.count(node[key], f"{path}/{key}")
            if sizes[key] > _MOST_ITEMS:
                writer.relax(key, f"{path}/{key}")
            else:
                out[key] = sizes[key]
    if node.get("uniqueItems") is True and sizes.get("maxItems", 2) > 1:
        writer.relax("uniqueItems", f"{path}/uniqueItems")
    if _get(node, "contains", None) is not None and (node.get("minContains") != 0 or "maxContains" in node):
        writer.relax("contains", f"{path}/contains")


def _get(node: Schema, key: str, default: Any) -> Any:
    """The value of a keyword; null is the same as leaving it out."""
    value = node.get(key)
    return default if value is None else value


def _step(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
