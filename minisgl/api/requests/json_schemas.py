"""Rewrites JSON schemas to what the grammar library can follow, and names the keywords that are relaxed on the way.

The result is a schema of its own: references lead to `$defs` under names of ours, so it can stand anywhere.  A keyword that the
library lacks is said in others where that means the same.  Otherwise it is relaxed: what the result admits includes everything
that the schema admits.  Under `strict` that is an error.  Pure; runs in the api process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, NamedTuple

from minisgl.api.requests.fields import json_type
from minisgl.api.requests.schema_alternatives import TYPES, Alternatives, type_of
from minisgl.api.requests.schema_containers import ARRAY, OBJECT, Place, write_array, write_object
from minisgl.api.requests.schema_limits import FORMATS, bounded, divides, exact
from minisgl.api.requests.schema_patterns import translate
from minisgl.api.requests.schema_references import MAX_DEPTH, MAX_SUBSCHEMAS, References, Target, TooLarge, cycles
from minisgl.errors import InvalidParam

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_CONDITIONS = ("dependencies", "dependentRequired", "dependentSchemas")
_STRING = ("pattern", "format", "minLength", "maxLength")
_PLAIN = {*("type", "const", "enum", "not", "if", "multipleOf"), *_STRING, *_BOUNDS, *_CONDITIONS, *OBJECT, *ARRAY}
_KEYWORDS = _PLAIN | {*_REFERENCES, "allOf", "anyOf", "oneOf"}
_MOST_CHARS = 1_000_000  # of minLength and maxLength
_INLINE = 12  # subschemas within each other; further ones become definitions, as the library reads only 128 levels of JSON


class Portable(NamedTuple):
    """A schema that the library can follow, and the keywords that are relaxed in it."""

    schema: dict[str, Any]
    relaxed: tuple[str, ...]


def portable(schema: Mapping[str, Any], at: str, *, strict: bool = False, kind: str = "") -> Portable:
    """Rewrite the schema in the field `at`.  `kind`: the type that its values must have, "" for any.

    Raises InvalidParam naming the field, and the place in the schema: for what is no schema, and under `strict` for what cannot
    be followed exactly.
    """
    try:
        writer = Writer(dict(schema), at, strict)
        return Portable(writer.document(kind), tuple(writer.relaxed))
    except TooLarge:
        text = f"{at} may have at most {MAX_SUBSCHEMAS} subschemas, and {MAX_DEPTH} within each other."
        raise InvalidParam(at, text) from None


class Writer:
    """Writes one document.  `path`, everywhere: where a part stands, as the client wrote it, for errors."""

    def __init__(self, root: dict[str, Any], at: str, strict: bool) -> None:
        self.relaxed: dict[str, None] = {}
        self.references = References(root)
        self._alternatives = Alternatives(self.references)
        self._at, self._strict = at, strict
        self._names: dict[int, str] = {}  # of the definitions, by the identity of the subschema
        self._sources: dict[str, Any] = {}  # as the client wrote them
        self._paths: dict[str, str] = {}
        self._pending: list[tuple[str, Target, str]] = []
        self._written: dict[str, Any] = {}
        self._uses: dict[str, set[str]] = {}  # definition -> the definitions that it refers to
        self._joined: list[tuple[dict[str, Any], str, str]] = []  # schemas of several parts: (it, its definition, path)
        self._here = ""  # the definition that is being written
        self._depth = self._count = 0

    def document(self, kind: str) -> dict[str, Any]:
        root = self._name(self.references.root, "#")
        while self._pending:
            self._here, target, path = self._pending.pop()
            self._written[self._here] = self.schema(target.schema, target.base, path, inside=True)
        self._untie()
        used = set().union(*self._uses.values()) if self._uses else set()
        out: dict[str, Any] = {"$ref": f"#/$defs/{root}"} if root in used else self._written.pop(root)
        source = self._sources[out["$ref"].rpartition("/")[2]] if "$ref" in out else {}
        if not kind and "type" not in out and isinstance(source, dict) and source.get("type") == "array":
            out = {"type": "array", **out}  # arrays are written with white space of their own
        if kind and out.get("type") != kind:
            given = self.references.root.schema.get("type")
            if given is not None and given != kind and not (isinstance(given, list) and kind in given):
                raise InvalidParam(self._at, f"{self._at} must describe an {kind}: its type is {str(given)[:40]!r}.")
            if given != kind:  # else what is referred to says it
                out = {"type": kind, **{k: v for k, v in out.items() if k != "type"}}
        return {**out, "$defs": self._written} if self._written else out

    # ---------------- faults
    def relax(self, keyword: str, path: str) -> None:
        """A keyword is relaxed: named in the answer, refused under strict."""
        if self._strict:
            text = (
                f"{self._at} cannot be followed exactly: {keyword} at {path[:200]}. "
                "Set strict to false to have this keyword approximated, or leave it out."
            )
            raise InvalidParam(self._at, text, "unsupported_value")
        self.relaxed[keyword] = None

    def wrong(self, path: str, expected: str, value: object) -> InvalidParam:
        shown = f"{value[:40]!r}" if isinstance(value, str) else json_type(value)
        return InvalidParam(self._at, f"{self._at} is no JSON schema: {path[:200]} must be {expected}, not {shown}.")

    def checked(self, value: Any, kind: type | UnionType, expected: str, path: str) -> Any:
        if not isinstance(value, kind):
            raise self.wrong(path, expected, value)
        return value

    def number(self, value: Any, path: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(path, "a number", value)
        return value

    def count(self, value: Any, path: str) -> int:
        """A number of characters, items or properties."""
        n = self.number(value, path)
        if n < 0 or n != int(n):
            raise self.wrong(path, "an integer of 0 or more", value)
        return int(n)

    # ---------------- schemas
    def reference(self, target: Target, path: str) -> dict[str, Any]:
        """A schema that refers to the definition of a subschema."""
        name = self._name(target, path)
        self._uses.setdefault(self._here, set()).add(name)
        return {"$ref": f"#/$defs/{name}"}

    def share(self, written: Any) -> Any:
        """A written schema to be used several times: it becomes a definition, so that its text stands once."""
        if written in (True, False, {}):
            return written
        name = f"s{len(self._written)}"
        self._written[name] = written
        self._uses[name] = self._uses.setdefault(self._here, set())  # at most those
        self._uses[self._here].add(name)
        return {"$ref": f"#/$defs/{name}"}

    def _name(self, target: Target, path: str) -> str:
        key = id(target.schema)
        if key not in self._names:
            self._names[key] = name = f"r{len(self._names)}"
            self._sources[name], self._paths[name] = target.schema, path
            self._pending.append((name, target, path))
        return self._names[key]

    def schema(self, node: Any, around: str, path: str, *, inside: bool = False, part: bool = False) -> Any:
        """Write a subschema.  `around`: the base URI around (or `inside`) it.  `part`: others hold for the same value."""
        if isinstance(node, bool):
            return node
        self.checked(node, dict, "an object or a boolean", path)
        base = around if inside else self.references.inside(node, around)
        if self._depth >= _INLINE:
            return self.reference(Target(node, base), path)
        self._count += 1
        if self._count > MAX_SUBSCHEMAS:
            raise TooLarge
        self._depth += 1
        place = Place(node, base, path, part)
        for key, value in node.items():
            if key in _KEYWORDS and (value is not None or key == "const"):
                self._keyword(place, key, value)
        self._depth -= 1
        out = place.out
        if place.more:
            out["allOf"] = [*out.get("allOf", ()), *place.more]
        if out.keys() == {"type", "$ref"}:
            source = self._sources[out["$ref"].rpartition("/")[2]]
            if isinstance(source, dict) and source.get("type") == out["type"]:
                del out["type"]  # it says what the definition says
        inplace = [out[k] for k in ("$ref", "anyOf") if k in out] + out.get("allOf", [])
        if len(inplace) + bool(out.keys() - {"$ref", "anyOf", "allOf"}) > 1:
            self._joined.append((out, self._here, path))
        return out

    def _keyword(self, place: Place, key: str, value: Any) -> None:
        node, out, path = place.node, place.out, f"{place.path}/{key}"
        for keywords, write in ((OBJECT, write_object), (ARRAY, write_array)):
            if key in keywords:  # those of a kind together, where the first stands
                if next(k for k in node if k in keywords and node[k] is not None) == key:
                    write(self, place)
                return
        if key in _REFERENCES:
            if (found := self._refer(place, key, value)) is not None:
                if key == "$ref":
                    out.update(found)
                else:
                    place.more.append(found)
        elif key in ("allOf", "anyOf", "oneOf"):
            self._combine(place, key, self.checked(value, list, "an array", path))
        elif key == "not":
            if value in ({}, True):
                place.more.append(False)
            elif value is not False:
                self.relax(key, path)
        elif key in _CONDITIONS or key == "if":
            if value and (key != "if" or "then" in node or "else" in node):
                self.relax(key, path)
        else:
            self._leaf(place, key, value)

    def _combine(self, place: Place, key: str, options: list[Any]) -> None:
        """allOf, anyOf or oneOf."""
        path = f"{place.path}/{key}"
        alone = len(place.node.keys() & _KEYWORDS) == 1 and (key != "allOf" or len(options) == 1)
        written = [self.schema(o, place.base, f"{path}/{i}", part=place.part or not alone) for i, o in enumerate(options)]
        if key == "oneOf":
            if not self._alternatives.exclusive(options, place.base):
                self.relax(key, path)
            if "anyOf" in place.node:
                place.more.append({"anyOf": written})
                return
            key = "anyOf"
        place.out[key] = written

    def _leaf(self, place: Place, key: str, value: Any) -> None:
        """A keyword without subschemas."""
        node, path = place.node, f"{place.path}/{key}"
        said: Any = value  # None: it is relaxed
        if key == "type":
            for name in value if isinstance(value, list) else [value]:
                if name not in TYPES:
                    raise self.wrong(path, f"one of {', '.join(TYPES)}", name)
        elif key in ("const", "enum"):
            values = [value] if key == "const" else self.checked(value, list, "an array", path)
            if not all(map(exact, values)):
                kinds = dict.fromkeys(type_of(v) for v in values if not exact(v))
                place.more.append({"anyOf": [{"enum": [v for v in values if exact(v)]}, *({"type": k} for k in kinds)]})
                said = None
            elif value is None:
                place.out[key] = None  # the constant null
        elif key in ("minLength", "maxLength"):
            said = n if (n := self.count(value, path)) <= _MOST_CHARS else None
        elif key == "pattern":
            said = translate(self.checked(value, str, "a string", path))
        elif key == "format":
            kinds_here = node.get("type", "string")
            if self.checked(value, str, "a string", path) not in FORMATS:
                if isinstance(kinds_here, str | list) and "string" not in kinds_here:
                    return  # formats of numbers say nothing about their text
                said = None
        elif isinstance(value, bool) and key.startswith("exclusive"):  # draft 4: of the other keyword
            if not (value and bounded(node.get(key[9:].lower()))):
                return
        elif key == "multipleOf":
            negative = any(isinstance(m := node.get(k), int | float) and m <= 0 for k in ("maximum", "exclusiveMaximum"))
            said = value if divides(self.number(value, path)) and not negative else None  # it writes multiples without a sign
        else:
            said = value if bounded(self.number(value, path)) else None
        if said is not None:
            place.out[key] = said
        elif value is not None:
            self.relax(key, path)

    # ---------------- references
    def _refer(self, place: Place, key: str, reference: Any) -> dict[str, Any] | None:
        """The written form of a reference; None if it is relaxed."""
        path = f"{place.path}/{key}"
        seen: set[int] = set()
        target, names = Target({key: reference}, place.base), {key}
        while len(names) == 1 and names <= {*_REFERENCES}:  # as long as it leads to nothing but a reference
            [name] = names
            link = self.checked(target.schema[name], str, "a string", path)
            if id(target.schema) in seen:
                raise InvalidParam(self._at, f"{self._at} is no JSON schema: {path[:200]} leads to itself.")
            seen.add(id(target.schema))
            found = self.references.find(link, target.base)
            if found is None and link.startswith("#"):
                text = f"{self._at} is no JSON schema: {path[:200]} leads to {link[:100]!r}, which it does not have."
                raise InvalidParam(self._at, text)
            if found is None or (name == "$dynamicRef" and self.references.ambiguous(link)):
                self.relax(name, path)  # another document, which is not fetched
                return None
            target = found
            names = set(found.schema.keys() & _KEYWORDS) if isinstance(found.schema, dict) else set()
        return self.reference(target, reference if reference.startswith("#") else path)

    def _untie(self) -> None:
        """Refuse what holds if it holds.  Where one of several parts of a schema leads back to it, only one part is kept: the
        library cannot intersect what it is still reading."""
        for name in cycles({name: set(_inplace(schema, ("allOf",))) for name, schema in self._written.items()}):
            text = f"{self._at} is no JSON schema: {self._paths.get(name, '')[:200]} leads to itself."
            raise InvalidParam(self._at, text)
        tied = cycles(self._uses)
        for schema, name, path in self._joined:
            if all(tied.get(target, -1) != tied.get(name) for target in _inplace(schema, ("allOf", "anyOf"))):
                continue
            dropped = schema.keys() - {"$ref"} if "$ref" in schema else schema.keys() & {"allOf", "anyOf"}
            for keyword in sorted(dropped):
                self.relax(keyword, f"{path}/{keyword}")
                del schema[keyword]


def _inplace(schema: Any, through: tuple[str, ...]) -> Iterator[str]:
    """The definitions that a schema refers to for its own value."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2]
        for key in through:
            for inner in schema.get(key, ()):
                yield from _inplace(inner, through)
