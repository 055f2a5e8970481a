"""Random schemas: what is bound exactly is valid, and whatever is valid is admitted, also where keywords are relaxed."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import llguidance
import numpy as np
import pytest

from minisgl import grammar
from minisgl.api.requests.json_schemas import portable
from minisgl.errors import InvalidParam

NAMES = ("a", "ab", "b", "x-c")
EOS = 256


class Bytes:
    is_tokenizer_wrapper, bos_token_id, eos_token_id, special_token_ids = True, None, EOS, (EOS,)
    tokens = (*(bytes([i]) for i in range(256)), b"<eos>")

    def __call__(self, s: Any) -> list[int]:
        return list(s if isinstance(s, bytes) else s.encode())


TOKENS = llguidance.LLTokenizer(Bytes(), slices=[])


# ---------------- schemas and values
def schema(rng: random.Random, depth: int) -> Any:
    kinds = ["string", "integer", "number", "enum", "const", "type"] + ["object", "array", "combine", "ref"] * 2 * bool(depth)
    kind = rng.choice(kinds)

    def inner() -> Any:
        return schema(rng, depth - 1)

    def some(**keywords: Any) -> dict[str, Any]:
        return {k: v for k, v in keywords.items() if rng.random() < 0.3}

    out: dict[str, Any]
    if kind == "object":
        out = {"type": "object", "properties": {n: inner() for n in sorted(rng.sample(NAMES, rng.randrange(3)))}}
        out |= some(
            required=sorted(rng.sample(NAMES, rng.randrange(3))), additionalProperties=rng.choice([False, {"type": "integer"}])
        )
        patterns = rng.sample(["^x-", "^a", "b$", "^y"], rng.randrange(1, 3))
        names = rng.choice([{"type": "string"}, {"pattern": "^a"}, {"enum": ["a", "b"]}, {"maxLength": 1}])
        if rng.random() < 0.5:
            out |= some(patternProperties={p: inner() for p in patterns}, propertyNames=names, dependentRequired={"a": ["b"]})
            out |= some(minProperties=rng.randrange(4), maxProperties=rng.randrange(4))
    elif kind == "array":
        out = {"type": "array", **some(prefixItems=[inner()], minItems=rng.randrange(3), maxItems=rng.randrange(4))}
        out |= some(items=rng.choice([inner(), False]), uniqueItems=rng.random() < 0.8, contains={"type": "integer"})
    elif kind == "string":
        pattern = rng.choice(["^a", "b$", "^[a-c]{1,3}$", "a|b", "^(?=a)", r"^\w+$", "[[a]"])
        out = {"type": "string", **some(minLength=rng.randrange(4), maxLength=rng.randrange(6), pattern=pattern)}
    elif kind in ("integer", "number"):
        out = {
            "type": kind,
            **some(minimum=rng.choice([0, -5, 1.5, 2**60, -(2**63)]), maximum=rng.choice([10, 7.5, 2**63 - 1])),
        }
        out |= some(exclusiveMinimum=rng.choice([0, -1, 0.5]), multipleOf=rng.choice([2, 3, 0.5]))
    elif kind == "enum":
        out = {"enum": rng.sample([1, 2.5, "a", "b", None, True, {"a": 1}, [1], 2**60 + 1, 'a"b'], 3)}
    elif kind == "const":
        out = {"const": rng.choice([1, "a", None, False, {"a": 1, "b": "x"}, [1, "a"]])}
    elif kind == "type":
        out = {"type": rng.sample(["string", "integer", "null", "boolean", "object"], 2), "minimum": 2, "maxLength": 3}
    elif kind == "ref":
        return {"$ref": f"#/$defs/{rng.choice('mn')}"}
    else:
        out = {rng.choice(["anyOf", "oneOf", "allOf"]): [inner() for _ in range(rng.randrange(1, 4))]}
    return out | (some(**{"not": rng.choice([{}, {"type": "string"}])}) if rng.random() < 0.1 else {})


def value(rng: random.Random, depth: int = 2) -> Any:
    kind = rng.choice("iiffsssbnoa" if depth else "ifsbn")
    if kind == "o":
        return {n: value(rng, depth - 1) for n in sorted(rng.sample([*NAMES, "zz"], rng.randrange(4)))}
    if kind == "a":
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    plain = {
        "i": [0, 1, 2, 3, 4, 6, 10, 2**60 + 1],
        "f": [0.5, 1.5, 7.5],
        "s": ["", "a", "b", "ab", "abc", "x", "bb"],
        "b": [True],
    }
    return rng.choice(plain.get(kind, [None]))


def likely(rng: random.Random, node: Any, root: Any, depth: int = 5) -> Any:
    """A value that has a chance to be valid, its properties in the order of the schema."""
    if not isinstance(node, dict) or not depth or not node:
        return value(rng, 1)
    if "$ref" in node:
        return likely(rng, root["$defs"][node["$ref"][-1]], root, depth - 1)
    for key in ("anyOf", "oneOf", "allOf", "enum"):
        if key in node:
            picked = rng.choice(node[key])
            return picked if key == "enum" else likely(rng, picked, root, depth - 1)
    if "const" in node:
        return node["const"]
    if node["type"] == "object":
        names = [n for n in node["properties"] if n in node.get("required", ()) or rng.random() < 0.6]
        out = {n: likely(rng, node["properties"][n], root, depth - 1) for n in names}
        return out | {
            n: value(rng, 0) for n in [*node.get("required", ()), *rng.sample(["x-c", "zz"], rng.randrange(2))] if n not in out
        }
    if node["type"] == "array":
        first = [likely(rng, s, root, depth - 1) for s in node.get("prefixItems", ())]
        return first + [likely(rng, node.get("items"), root, depth - 1) for _ in range(rng.randrange(4))]
    return value(rng, 0)


# ---------------- what a schema says
TYPES: dict[str, Any] = {"null": type(None), "boolean": bool, "object": dict, "array": list, "string": str, "integer": int}


def is_type(v: Any, name: str) -> bool:
    if name in ("integer", "number"):
        return not isinstance(v, bool) and (
            isinstance(v, int) or (isinstance(v, float) and (name == "number" or v.is_integer()))
        )
    return isinstance(v, TYPES[name])


def same(a: Any, b: Any) -> bool:
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def valid(v: Any, s: Any, root: Any) -> bool:
    """JSON Schema, as far as `schema` goes; raises RecursionError for what holds if it holds."""
    if isinstance(s, bool):
        return s

    def inside(*parts: tuple[Any, Any]) -> bool:
        return all(valid(value, schema, root) for value, schema in parts)

    types = s.get("type", [*TYPES, "number"])
    rules = [any(is_type(v, t) for t in ([types] if isinstance(types, str) else types))]
    rules += [same(v, s["const"])] if "const" in s else []
    rules += [any(same(v, e) for e in s["enum"])] if "enum" in s else []
    rules += [valid(v, root["$defs"][s["$ref"][-1]], root)] if "$ref" in s else []
    rules += [valid(v, x, root) for x in s.get("allOf", ())]
    rules += [any(valid(v, x, root) for x in s["anyOf"])] if "anyOf" in s else []
    rules += [sum(valid(v, x, root) for x in s["oneOf"]) == 1] if "oneOf" in s else []
    rules += [not valid(v, s["not"], root)] if "not" in s else []
    if isinstance(v, dict):
        listed, patterns = s.get("properties", {}), s.get("patternProperties", {})
        rules += [n in v for n in s.get("required", ())]
        rules += [n in v for k, names in s.get("dependentRequired", {}).items() if k in v for n in names]
        rules += [s.get("minProperties", 0) <= len(v) <= s.get("maxProperties", 99)]
        for name, item in v.items():
            schemas = [listed[n] for n in [name] if n in listed] + [x for p, x in patterns.items() if re.search(p, name)]
            rules += [
                inside(
                    (name, s.get("propertyNames", True)), *((item, x) for x in schemas or [s.get("additionalProperties", True)])
                )
            ]
    if isinstance(v, list):
        head = s.get("prefixItems", [])
        rules += [inside(*zip(v, head, strict=False), *((item, s.get("items", True)) for item in v[len(head) :]))]
        rules += [s.get("minItems", 0) <= len(v) <= s.get("maxItems", 99)]
        rules += [any(valid(item, s["contains"], root) for item in v)] if "contains" in s else []
        rules += [not any(same(a, b) for i, a in enumerate(v) for b in v[:i])] if s.get("uniqueItems") else []
    if isinstance(v, str):
        rules += [
            s.get("minLength", 0) <= len(v) <= s.get("maxLength", 99),
            bool(re.search(s.get("pattern", "").replace("[[", r"[\["), v)),
        ]
    if is_type(v, "number"):
        rules += [
            s.get("minimum", v) <= v <= s.get("maximum", v),
            v > s.get("exclusiveMinimum", v - 1),
            v % s.get("multipleOf", v or 1) == 0,
        ]
    return all(rules)


def fits(v: Any, root: Any) -> bool | None:
    """Whether a value is valid; None if that depends on itself."""
    try:
        return valid(v, root, root)
    except RecursionError:
        return None


# ---------------- what a grammar says
def drawn(rng: random.Random, text: str) -> str | None:
    """An answer that the grammar lets through, drawn at random; None if it does not end."""
    matcher, out = llguidance.LLMatcher(TOKENS, text, log_level=0), b""
    for _ in range(120):
        follow = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")).tolist()
        if EOS in follow:
            return out.decode("utf-8", "replace")
        usual = [t for t in follow if chr(t) in '}]",:0123456789ab'] if rng.random() < 0.9 else []
        token = rng.choice(usual or follow)
        matcher.consume_token(token)
        out += bytes([token])
    return None


def admitted(text: str, said: str) -> bool:
    matcher, raw = llguidance.LLMatcher(TOKENS, text, log_level=0), list(said.encode())
    return bool(matcher.try_consume_tokens(raw) == len(raw) and matcher.is_accepting())


EMPTY = ("Unsatisfiable", "leads to itself", "integer range", "Regex is empty", "stack level")


def bound(root: Any) -> tuple[str, tuple[str, ...]] | None:
    """(the grammar of a schema, what is relaxed in it); None if nothing fits the schema, or it holds if it holds."""
    try:
        rewritten, relaxed = portable(root, "x")
        text = grammar.json_schema(rewritten)
        grammar.check(text, "x")
        return text, relaxed
    except InvalidParam as e:
        if any(word in e.message for word in EMPTY):
            return None
        raise


@pytest.mark.parametrize("seed", range(40))
def test_what_is_bound_exactly_is_valid_and_what_is_valid_is_admitted(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(8):
        root = schema(rng, 3) | {"$defs": {n: schema(rng, 2) for n in "mn"}}
        if (found := bound(root)) is None:
            continue
        text, relaxed = found
        if not relaxed:
            assert not portable(root, "x", strict=True).relaxed
            for said in filter(None, (drawn(rng, text) for _ in range(3))):
                assert fits(json.loads(said), root) is not False, (root, said)
        for v in [likely(rng, root, root) for _ in range(15)]:
            assert not fits(v, root) or admitted(text, json.dumps(v)), (root, relaxed, v)
