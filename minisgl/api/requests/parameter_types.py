"""Tells of which JSON types a tool's parameters are, for models that write arguments as text.  Pure; api process.

Only what decides how a text is read: types, constants, and what alternatives and references add.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisgl.api.parsers.xml_scan import Kinds, Parameters
from minisgl.api.requests.schema_alternatives import TYPES, type_of
from minisgl.api.requests.schema_references import References, Target, TooLarge

_DEPTH = 8  # of references and alternatives within each other
_NAMES = {"str": "string", "text": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array"} | {
    **{"dict": "object", "none": "null"},
    **{name: name for name in TYPES},
}
_IMPLIED = {"properties": "object", "items": "array", "pattern": "string", "minLength": "string", "maxLength": "string"}


def parameter_types(schema: Mapping[str, Any]) -> Parameters:
    """The types of the properties of a schema."""
    try:
        references = References(dict(schema))
    except TooLarge:
        return Parameters({})
    found: dict[str, Kinds] = {}
    others = _properties(references.root, references, found, _DEPTH)
    return Parameters(found, others)


def _properties(at: Target, references: References, found: dict[str, Kinds], depth: int) -> Kinds | None:
    """Adds the types of all properties to `found`; returns those of undeclared ones, if the schema says anything of them."""
    schema, base = at
    if not isinstance(schema, dict) or not depth:
        return None
    base = references.inside(schema, base)
    declared, rest = schema.get("properties"), schema.get("additionalProperties")
    for name, inner in declared.items() if isinstance(declared, dict) else ():
        kinds = _kinds(Target(inner, base), references, depth)
        found[name] = tuple(dict.fromkeys((*found[name], *kinds))) if kinds and found.get(name) else kinds
    others = _kinds(Target(rest, base), references, depth) if isinstance(rest, dict) and rest else None
    for inner in _parts(at, references, ("allOf", "anyOf", "oneOf")):
        more = _properties(inner, references, found, depth - 1)
        others = more if others is None else others
    return others


def _kinds(at: Target, references: References, depth: int) -> Kinds:
    """The types that a value may have, () for any."""
    schema, base = at
    if not isinstance(schema, dict) or not depth:
        return ()
    base = references.inside(schema, base)
    given = schema.get("type")
    names = [_NAMES.get(str(name).lower(), "") for name in (given if isinstance(given, list) else [given] if given else [])]
    names += ["null"] if schema.get("nullable") is True and names else []
    constants = [schema["const"]] if "const" in schema else schema.get("enum")
    if not names and isinstance(constants, list):
        names = [type_of(value) for value in constants]
    if not names and (parts := list(_parts(Target(schema, base), references, ("anyOf", "oneOf")))):
        each = [_kinds(part, references, depth - 1) for part in parts]
        names = [name for kinds in each for name in kinds] if all(each) else []
    if not names:
        each = [_kinds(part, references, depth - 1) for part in _parts(Target(schema, base), references, ("allOf",))]
        names = list(next(filter(None, each), ()))
    names = names or [kind for key, kind in _IMPLIED.items() if key in schema]
    return () if "" in names else tuple(dict.fromkeys(names))


def _parts(at: Target, references: References, keys: tuple[str, ...]) -> list[Target]:
    """The schemas that stand in these keywords; what a reference leads to is in every one of them."""
    schema, base = at
    out = []
    link = schema.get("$ref")
    if "allOf" in keys and isinstance(link, str) and (target := references.find(link, base)):
        out.append(target)
    for key in keys:
        inner = schema.get(key)
        out += [Target(part, base) for part in inner] if isinstance(inner, list) else []
    return out
