"""Grammars, vectors, penalties and log probabilities on a GPU, each against the same server on the CPU.

    .venv/bin/python scripts/check/gpu_features.py [--model M] [--dtype float32] [--device cuda] [--requests 64]

Two servers of the same model, one on --device and one on the CPU in float32, answer the same requests, many at once:

schema      answers to a JSON schema, drawn: each is valid JSON of that schema, on the device
regex       answers to a regular expression, drawn: each matches
vectors     embeddings, pooled by "last" and by "mean", also of one word 300 times: the cosine with the CPU's; at least COSINE
logprobs    of every token of a text (`echo`): the largest difference
penalties   greedy answers with penalties and a bias: how much of their text is the CPU's, before the first difference
mixed       a row with a grammar next to rows without: the free rows say what they say alone

One JSON line each; exit code 1 where one is bad.  In float32 the greedy answers must be equal; in bfloat16 near ties are not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import numpy as np

from scripts.lib.live_server import live_server
from scripts.lib.reference import provenance

COSINE = {"float32": 0.99999, "bfloat16": 0.999}
LOGPROB = {"float32": 2e-3, "bfloat16": 0.25}
WORDS = ["river", "stone", "dragon", "seven", "light", "over", "under", "garden", "winter", "letter", "bread", "engine"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
PATTERN = r"[A-Z][a-z]{2,8}, \d{1,3} years"
TEXTS = [*(" ".join(WORDS[: n + 1]) for n in range(len(WORDS))), " ".join(["river"] * 300), "Once upon a time"]


def fits(text: str) -> bool:
    """Whether it is an object of SCHEMA."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(value, dict)
        and set(value) == {"name", "size", "tags"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 12
        and isinstance(value["size"], int)
        and len(value["tags"]) <= 3
        and set(value["tags"]) <= {"a", "b", "c"}
    )


class Client:
    """Asks one server."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self.session.post(path, json=body) as response:
            answer: dict[str, Any] = await response.json()
            if response.status != 200:
                raise RuntimeError(f"{path}: {response.status} {answer}")
            return answer

    async def chats(self, n: int, **more: Any) -> list[str]:
        async def one(i: int) -> str:
            text = f"Tell me about a {WORDS[i % len(WORDS)]} ({i})."
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 200, "seed": i, "temperature": 0.8, **more}
            return str((await self.post("/v1/chat/completions", body))["choices"][0]["message"]["content"])

        return list(await asyncio.gather(*map(one, range(n))))

    async def vectors(self, pooling: str) -> np.ndarray[Any, Any]:
        answer = await self.post("/v1/embeddings", {"input": TEXTS, "pooling": pooling})
        return np.array([row["embedding"] for row in answer["data"]])

    async def logprobs(self, text: str) -> np.ndarray[Any, Any]:
        body = {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 0}
        return np.array((await self.post("/v1/completions", body))["choices"][0]["logprobs"]["token_logprobs"][1:])

    async def penalised(self, i: int) -> str:
        body = {"prompt": TEXTS[i], "max_tokens": 48, "temperature": 0, "frequency_penalty": 0.7, "presence_penalty": 0.4}
        more = {"repetition_penalty": 1.15, "logit_bias": {"260": 3.0}, "ignore_eos": True}
        return str((await self.post("/v1/completions", {**body, **more}))["choices"][0]["text"])

    async def plain(self, i: int) -> str:
        body = {"prompt": TEXTS[i % len(TEXTS)], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        return str((await self.post("/v1/completions", body))["choices"][0]["text"])


def before_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


async def check(device: Client, cpu: Client, dtype: str, n: int) -> AsyncIterator[dict[str, Any]]:
    """One after another; `ok` says whether one is good."""
    exact = dtype == "float32"
    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}}
    valid = sum(map(fits, await device.chats(n, **form)))
    yield {"check": "schema", "valid": valid, "of": n, "ok": valid == n}
    matching = sum(re.fullmatch(PATTERN, text) is not None for text in await device.chats(n, guided_regex=PATTERN))
    yield {"check": "regex", "matching": matching, "of": n, "ok": matching == n}
    for pooling in ("last", "mean"):
        a, b = await device.vectors(pooling), await cpu.vectors(pooling)
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        worst = int(cosines.argmin())
        ok = bool(cosines.min() >= COSINE[dtype])
        figures = {"cosine": float(cosines.min()), "worst": TEXTS[worst][:20], "one_word": float(cosines[-2])}
        yield {"check": f"vectors, {pooling}", **figures, "ok": ok}
    differences = [float(np.abs(await device.logprobs(t) - await cpu.logprobs(t)).max()) for t in TEXTS[3:]]
    yield {"check": "logprobs", "largest_difference": max(differences), "ok": max(differences) <= LOGPROB[dtype]}
    pairs = [(await device.penalised(i), await cpu.penalised(i)) for i in range(len(TEXTS))]
    same = [before_difference(a, b) for a, b in pairs]
    ok = not exact or all(k == len(a) for k, (a, _) in zip(same, pairs, strict=True))
    yield {"check": "penalties", "equal_characters": sum(same), "of": sum(len(a) for a, _ in pairs), "ok": ok}
    alone = [await device.plain(i) for i in range(8)]
    beside, *texts = await asyncio.gather(device.chats(24, **form), *(device.plain(i) for i in range(8)))
    equal = sum(a == b for a, b in zip(alone, texts, strict=True))
    ok = all(map(fits, beside)) and (equal == 8 or not exact)
    yield {"check": "mixed", "free_rows_as_alone": equal, "of": 8, "ok": ok}


async def run(device: str, cpu: str, dtype: str, n: int, made: dict[str, Any]) -> bool:
    timeout, good = aiohttp.ClientTimeout(total=300), True
    async with aiohttp.ClientSession(device, timeout=timeout) as one, aiohttp.ClientSession(cpu, timeout=timeout) as two:
        async for line in check(Client(one), Client(two), dtype, n):
            print(json.dumps({**line, **made}), flush=True)
            good &= bool(line["ok"])
    return good


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float32", choices=tuple(COSINE))
    parser.add_argument("--requests", type=int, default=64)
    args = parser.parse_args()
    flags = ["--max-context", "2048", *(["--model", args.model] if args.model else [])]
    made = {"device": args.device, "dtype": args.dtype, **provenance()}
    with (
        live_server("--device", args.device, "--dtype", args.dtype, "--kv-tokens", "60000", *flags) as device,
        live_server("--device", "cpu", "--dtype", "float32", *flags) as cpu,
    ):
        return 0 if asyncio.run(run(device, cpu, args.dtype, args.requests, made)) else 1


if __name__ == "__main__":
    sys.exit(main())
