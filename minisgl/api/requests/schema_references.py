"""Finds what the references of a JSON schema mean, inside the schema itself.  Pure; runs in the api process.

JSON Schema 2020-12, section 8.2, with the names that older drafts have for the same (`id`, `definitions`, `$recursiveRef`).
Nothing is ever fetched: a reference to another document has no target.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote, urldefrag, urljoin

# Where keywords hold subschemas: one, an array of them, or an object of them by name.
_REST = ("additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties")
ONE = ("contains", "else", "if", "items", "not", "propertyNames", "then", *_REST)
ARRAYS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
MAPS = ("$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties")
MAX_DEPTH = 100  # of subschemas within each other
MAX_SUBSCHEMAS = 20_000


class Target(NamedTuple):
    """A subschema, and the URI against which its references are resolved."""

    schema: Any
    base: str


class TooLarge(Exception):
    """The schema has more than MAX_SUBSCHEMAS subschemas, or more than MAX_DEPTH within each other."""


def subschemas(schema: dict[str, Any]) -> Iterator[Any]:
    """The schemas directly inside a schema."""
    for key in ONE:
        if isinstance(schema.get(key), dict):
            yield schema[key]
    for key in ARRAYS:
        if isinstance(schema.get(key), list):
            yield from schema[key]
    for key in MAPS:
        if isinstance(schema.get(key), dict):
            yield from schema[key].values()


def _join(base: str, reference: str) -> str:
    if reference.startswith("#"):
        return base + reference  # urljoin does not know urn:
    try:
        return urljoin(base, reference)
    except ValueError:  # no URI
        return reference


class References:
    """The places of one document that a reference can name.  Raises TooLarge."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._documents: dict[str, Any] = {"": root}  # by URI
        self._anchors: dict[tuple[str, str], Target] = {}
        self._dynamic: dict[str, int] = {}  # how often each $dynamicAnchor is set
        old = str(root.get("$schema")).rstrip("#").endswith(("draft-03/schema", "draft-04/schema"))
        self._id_names = ("$id", "id") if old else ("$id",)
        self.root = Target(root, self.inside(root, ""))
        pending = [(root, "", 0)]
        n = 0
        while pending:
            schema, base, depth = pending.pop()
            n += 1
            if n > MAX_SUBSCHEMAS or depth > MAX_DEPTH:
                raise TooLarge
            if isinstance(schema, dict):
                base = self._enter(schema, base)
                pending += [(inner, base, depth + 1) for inner in subschemas(schema)]

    def inside(self, schema: Any, around: str) -> str:
        """The base URI inside a schema, given the one around it."""
        for name in self._id_names if isinstance(schema, dict) else ():
            given = schema.get(name)
            if isinstance(given, str) and not given.startswith("#"):  # "#name" is the anchor of older drafts
                return urldefrag(_join(around, given)).url
        return around

    def _enter(self, schema: dict[str, Any], around: str) -> str:
        base = self.inside(schema, around)
        if base != around:
            self._documents.setdefault(base, schema)
        for key in ("$anchor", "$dynamicAnchor", *self._id_names):
            name = schema.get(key)
            if isinstance(name, str) and (key.endswith("nchor") or name.startswith("#")):
                self._anchors.setdefault((base, name.removeprefix("#")), Target(schema, base))
        if isinstance(name := schema.get("$dynamicAnchor"), str):
            self._dynamic[name] = self._dynamic.get(name, 0) + 1
        return base

    def find(self, reference: str, base: str) -> Target | None:
        """What a reference in a schema with this base names, None if nothing of this document."""
        url, fragment = urldefrag(_join(base, reference))
        document = self._documents.get(url)
        if document is None:
            return None
        name = unquote(fragment)
        if name and not name.startswith("/"):
            return self._anchors.get((url, name))
        here, inside = document, url
        for escaped in name.split("/")[1:]:
            step = escaped.replace("~1", "/").replace("~0", "~")
            if isinstance(here, list) and step.isdecimal() and int(step) < len(here):
                here = here[int(step)]
            elif isinstance(here, dict) and step in here:
                here = here[step]
            else:
                return None
            inside = self.inside(here, inside)
        return Target(here, inside)

    def ambiguous(self, reference: str) -> bool:
        """Whether what a $dynamicRef means depends on how it is reached."""
        return self._dynamic.get(reference.partition("#")[2], 0) > 1


def cycles(graph: Mapping[str, Collection[str]]) -> dict[str, int]:
    """The nodes that lead back to themselves -> a number, the same for those that lead to each other (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    found: dict[str, int] = {}
    stack: list[str] = []
    for root in graph:
        path = [(root, iter(graph[root]))] if root not in order else []
        if path:
            order[root] = low[root] = len(order)
            stack.append(root)
        while path:
            node, rest = path[-1]
            for target in rest:
                if target not in order:
                    order[target] = low[target] = len(order)
                    stack.append(target)
                    path.append((target, iter(graph.get(target, ()))))
                    break
                if low[target] >= 0:  # it is on the stack
                    low[node] = min(low[node], order[target])
            else:
                path.pop()
                if path:
                    above = path[-1][0]
                    low[above] = min(low[above], low[node])
                if low[node] == order[node]:
                    alone = stack[-1] == node and node not in graph.get(node, ())
                    member = ""
                    while member != node:
                        member = stack.pop()
                        low[member] = -1
                        if not alone:
                            found[member] = order[node]
    return found
