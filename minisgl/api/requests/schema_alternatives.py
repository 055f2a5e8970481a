"""Proves that the alternatives of a `oneOf` exclude each other, so that any of them may be taken.  Pure; api process.

What is proved: different types, different constants, or, as with discriminated unions, a property with different constants.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from minisgl.api.requests.schema_references import References, Target

TYPES = ("null", "boolean", "object", "array", "string", "integer", "number")
_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
_DEPTH = 8  # of references and conjunctions that are looked into

Values = frozenset[str]  # JSON texts


@dataclass(frozen=True, slots=True)
class _Facts:
    """What every value of a schema has: one of `types`, one of `values` if those are known, the properties `required`.

    `tags`: properties that have one of a few values, if a value has them at all.
    """

    types: frozenset[str] = frozenset(TYPES)
    values: Values | None = None
    required: frozenset[str] = frozenset()
    tags: dict[str, Values] = field(default_factory=dict)

    def and_(self, other: _Facts) -> _Facts:
        def both(a: Values | None, b: Values | None) -> Values | None:
            return b if a is None else a if b is None else a & b

        names = self.tags.keys() | other.tags.keys()
        tags = {n: v for n in names if (v := both(self.tags.get(n), other.tags.get(n))) is not None}
        return _Facts(self.types & other.types, both(self.values, other.values), self.required | other.required, tags)


_NOTHING, _NEVER = _Facts(), _Facts(frozenset())


def type_of(value: Any) -> str:
    """The JSON type of a value; a number without a fraction is an integer."""
    if isinstance(value, float) and value.is_integer():
        return "integer"
    return _JSON_TYPES.get(type(value), "null")


def _values(given: Iterable[Any]) -> Values | None:
    texts = set()
    for value in given:
        if isinstance(value, list | dict):
            return None
        texts.add(json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value))
    return frozenset(texts)


class Alternatives:
    """What is known of the subschemas of a document; each is looked at once."""

    def __init__(self, references: References) -> None:
        self._references = references
        self._known: dict[int, _Facts] = {}  # by the identity of the subschema; without what is too deep inside

    def exclusive(self, options: Iterable[Any], base: str) -> bool:
        """Whether it can be seen that no value fits two of the options."""
        facts = [self._facts(self._inside(option, base), _DEPTH) for option in options]
        for kind in TYPES:
            those = [f for f in facts if kind in f.types]
            if len(those) < 2 or _apart([f.values for f in those]):
                continue
            shared = set(those[0].tags).intersection(*(f.tags for f in those)) if kind == "object" else set()
            if not any(sum(n not in f.required for f in those) < 2 and _apart([f.tags[n] for f in those]) for n in shared):
                return False
        return True

    def _inside(self, schema: Any, around: str) -> Target:
        return Target(schema, self._references.inside(schema, around))

    def _facts(self, target: Target, depth: int) -> _Facts:
        if target.schema is False:
            return _NEVER
        if not isinstance(target.schema, dict) or not depth:
            return _NOTHING
        if (known := self._known.get(id(target.schema))) is None:
            self._known[id(target.schema)] = _NOTHING  # as long as it is looked at
            known = self._known[id(target.schema)] = self._look(target.schema, target.base, depth - 1)
        return known

    def _look(self, schema: dict[str, Any], base: str, depth: int) -> _Facts:
        facts = _NOTHING
        types = schema.get("type")
        if isinstance(types, str | list):
            names = {t for t in ([types] if isinstance(types, str) else types) if isinstance(t, str)}
            facts = _Facts(frozenset(names | ({"integer"} if "number" in names else set())))
        for given in ([schema["const"]] if "const" in schema else None, schema.get("enum")):
            if isinstance(given, list):
                facts = facts.and_(_Facts(frozenset(map(type_of, given)), _values(given)))
        if isinstance(schema.get("required"), list):
            facts = facts.and_(_Facts(required=frozenset(n for n in schema["required"] if isinstance(n, str))))
        if isinstance(schema.get("properties"), dict):
            found = {name: self._facts(self._inside(child, base), depth).values for name, child in schema["properties"].items()}
            facts = facts.and_(_Facts(tags={name: v for name, v in found.items() if v is not None}))
        if isinstance(schema.get("$ref"), str) and (found_target := self._references.find(schema["$ref"], base)) is not None:
            facts = facts.and_(self._facts(found_target, depth))
        if isinstance(schema.get("allOf"), list):
            for child in schema["allOf"]:
                facts = facts.and_(self._facts(self._inside(child, base), depth))
        return facts


def _apart(sets: Sequence[Values | None]) -> bool:
    known = [s for s in sets if s is not None]
    return len(known) == len(sets) and len(frozenset[str]().union(*known)) == sum(map(len, known))
