"""Traces: reads recorded or synthetic requests: arrival times, prompt and answer lengths, shared prefixes.

A prompt is kept as *runs* (token, count): `count` equal tokens.  A block of a trace is one run whose token is a function of the
block's id, so equal ids give equal prefixes, blocks with different ids never share a page, and 144 million prompt tokens take a
few megabytes until they are needed.  Prompt tokens are numbered from FIRST_PROMPT_TOKEN on; sampled tokens lie below, so an
answer is never mistaken for a prompt.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from minisgl.arrays import I32, I64
from minisgl.errors import UserError

FIRST_PROMPT_TOKEN = 1 << 20
BLOCK = 512  # tokens per hash id of a Mooncake trace
_MAX_TOKENS = 1 << 24  # maximum of one request; more is a broken line


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request.  `arrival` in seconds; `tokens`, `counts` i32[runs]: the prompt; `output`: tokens to generate."""

    arrival: float
    output: int
    tokens: I32
    counts: I32

    @property
    def input(self) -> int:
        """Prompt tokens."""
        return int(self.counts.sum())

    def ids(self) -> I32:
        """The prompt, i32[input]."""
        return np.repeat(self.tokens, self.counts)


def load(source: str, limit: int = 0, scale: float = 1.0, duration: float = 0.0) -> list[TraceRequest]:
    """Read `source`: a .jsonl file (Mooncake), a .csv file (Azure), or `synthetic:...`; see docs/simulator.md.

    `limit`: maximum number of requests; `duration`: seconds of the trace that are used; 0 for all.  `scale`: speed-up of the
    arrivals, which then count from 0.  Raises UserError naming the file and the line.
    """
    if source.startswith("synthetic:"):
        requests = list(synthetic(source.removeprefix("synthetic:")))
    else:
        read = {".jsonl": _mooncake, ".csv": _azure}.get(Path(source).suffix)
        if read is None:
            raise UserError(f"{source}: a trace is a .jsonl file (Mooncake), a .csv file (Azure) or synthetic:rate=4,...")
        try:
            with open(source, encoding="utf-8", newline="") as file:
                requests = list(read(source, file))
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{source}: cannot be read as a trace ({e}).") from e
    requests.sort(key=lambda r: r.arrival)
    start = requests[0].arrival if requests else 0.0
    requests = [r for r in requests if not duration or r.arrival - start <= duration][: limit or None]
    if not requests:
        raise UserError(f"{source}: no requests (is the trace empty, or --limit or --duration too small?)")
    return [replace(r, arrival=(r.arrival - start) / scale) for r in requests]


def _bad(source: str, line: int, text: str) -> UserError:
    return UserError(f"{source}, line {line}: {text}")


def _tokens(source: str, line: int, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_TOKENS:
        raise _bad(source, line, f"{name} must be an integer from 1 to {_MAX_TOKENS}, got {value!r}")
    return value


def _mooncake(source: str, lines: Iterator[str]) -> Iterator[TraceRequest]:
    """{"timestamp": ms, "input_length", "output_length", "hash_ids": one per 512 tokens}; the last block may be partial."""
    token_of: dict[object, int] = defaultdict(itertools.count(FIRST_PROMPT_TOKEN).__next__)  # block id of any size -> its token
    for at, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as e:
            raise _bad(source, at, f"not JSON ({e.msg})") from e
        names = ("timestamp", "input_length", "output_length", "hash_ids")
        if not isinstance(row, dict) or (missing := [n for n in names if n not in row]):
            lacks = f"; {missing[0]} is missing" if row else ""
            raise _bad(source, at, f"an object with {', '.join(names)} is expected{lacks}")
        when = row["timestamp"]
        if isinstance(when, bool) or not isinstance(when, (int, float)) or not 0 <= when < 1e15:
            raise _bad(source, at, f"timestamp must be milliseconds, got {when!r}")
        n = _tokens(source, at, "input_length", row["input_length"])
        out = _tokens(source, at, "output_length", row["output_length"])
        ids = row["hash_ids"]
        if not isinstance(ids, list) or not all(isinstance(i, (int, str)) for i in ids) or len(ids) != -(-n // BLOCK):
            raise _bad(source, at, f"hash_ids must hold {-(-n // BLOCK)} ids, one for each {BLOCK} of {n} tokens")
        counts = np.full(len(ids), BLOCK, np.int32)
        counts[-1] = n - BLOCK * (len(ids) - 1)
        yield TraceRequest(when / 1000, out, np.array([token_of[i] for i in ids], np.int32), counts)


def _azure(source: str, lines: Iterator[str]) -> Iterator[TraceRequest]:
    """TIMESTAMP,ContextTokens,GeneratedTokens.  The trace says nothing about the text, so no prefix is shared."""
    rows = csv.reader(lines)
    head = [c.strip() for c in next(rows, [])]
    if head[:3] != ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]:
        raise _bad(source, 1, "the header TIMESTAMP,ContextTokens,GeneratedTokens is expected")
    for row in rows:
        at = rows.line_num
        if not row:
            continue
        try:
            stamp, fraction = (row[0].strip() + ".0").split(".")[:2]
            when = (datetime.fromisoformat(stamp) - datetime(2000, 1, 1)).total_seconds() + float("0." + fraction)
            n, out = int(row[1]), int(row[2])
        except (ValueError, IndexError, TypeError) as e:
            raise _bad(source, at, f"a time and two integers are expected, got {','.join(row)!r}") from e
        n, out = _tokens(source, at, "ContextTokens", n), _tokens(source, at, "GeneratedTokens", out)
        yield TraceRequest(when, out, np.array([FIRST_PROMPT_TOKEN + at], np.int32), np.array([n], np.int32))


def synthetic(spec: str) -> Iterator[TraceRequest]:
    """`rate=4,input=100-1024,output=100-1024,shared=512,groups=1,n=1000,seed=0`: Poisson arrivals, uniform lengths.

    A prompt begins with `shared` tokens, the same for every request of its group (one of `groups`, drawn at random); `input`
    unique tokens follow.  `rate` in requests per second, 0: all at once.  Raises UserError.
    """
    settings = {"rate": "4", "input": "100-1024", "output": "100-1024", "shared": "0", "groups": "1", "n": "1000", "seed": "0"}
    for item in filter(None, spec.split(",")):
        key, _, value = item.partition("=")
        if key not in settings:
            raise UserError(f"synthetic:{spec}: unknown setting {key!r}; there are {', '.join(settings)}")
        settings[key] = value

    def number(key: str, low: float) -> float:
        try:
            value = float(settings[key])
        except ValueError as e:
            raise UserError(f"synthetic:{spec}: {key} must be a number, got {settings[key]!r}") from e
        if not low <= value <= _MAX_TOKENS:
            raise UserError(f"synthetic:{spec}: {key} must be between {low:g} and {_MAX_TOKENS}, got {settings[key]}")
        return value

    def span(key: str) -> tuple[int, int]:
        low, _, high = settings[key].partition("-")
        if (
            not (low + high).isascii()
            or not low.isdigit()
            or not (high or low).isdigit()
            or not 1 <= int(low) <= int(high or low) <= _MAX_TOKENS
        ):
            raise UserError(f"synthetic:{spec}: {key} must look like 100 or 100-1024, got {settings[key]!r}")
        return int(low), int(high or low)

    rng = np.random.default_rng(int(number("seed", 0)))
    n, rate, shared, groups = int(number("n", 1)), number("rate", 0), int(number("shared", 0)), int(number("groups", 1))
    arrivals = np.cumsum(rng.exponential(1 / rate, n)) if rate else np.zeros(n)
    (in_low, in_high), (out_low, out_high) = span("input"), span("output")
    inputs = rng.integers(in_low, in_high, n, endpoint=True)
    outputs = rng.integers(out_low, out_high, n, endpoint=True)
    group = rng.integers(0, groups, n)
    for i in range(n):
        own = FIRST_PROMPT_TOKEN + groups + i
        runs = [(FIRST_PROMPT_TOKEN + int(group[i]), shared)] * (shared > 0) + [(own, int(inputs[i]))]
        tokens, counts = np.array(runs, np.int32).T
        yield TraceRequest(float(arrivals[i]), int(outputs[i]), tokens.copy(), counts.copy())


# ---------------- what a cache could find
def ideal_hits(requests: list[TraceRequest], page_size: int) -> I64:
    """Prompt tokens of every request that an unbounded cache of whole pages finds, if prompts are cached when they arrive.

    As in the engine, the last token of a prompt is always computed.
    """
    hits = np.zeros(len(requests), np.int64)
    nodes: dict[tuple[int, int, int], int] = {}  # a trie of runs: (node, token, count) -> child; the root is 0
    longest: dict[tuple[int, int], int] = defaultdict(int)  # (node, token) -> longest run of the token there
    for i, request in enumerate(requests):
        node, common, diverged = 0, 0, False
        for token, count in zip(request.tokens.tolist(), request.counts.tolist(), strict=True):
            if not diverged:
                diverged = (node, token, count) not in nodes
                common += min(count, longest[node, token]) if diverged else count
            longest[node, token] = max(count, longest[node, token])
            node = nodes.setdefault((node, token, count), len(nodes) + 1)
        hits[i] = min(common, request.input - 1) // page_size * page_size
    return hits
