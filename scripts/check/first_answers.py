"""What a newcomer sees first: how many answers of the embedded model name the capital of a country.

    .venv/bin/python scripts/check/first_answers.py [--url URL] [--body JSON] [-- flags of the server]

Starts the server as it comes (embedded model, CPU), or asks the one at --url, 60 times for the capital of Germany and 10 times
each for those of France, Italy and Japan, over POST /v1/chat/completions and many at a time.  Requests set no sampling
parameters, and the server draws a seed for each; --body '{"temperature": 1}' shows what others would do.  One JSON line a
country:

asked, named       answers, and those with the name of the capital
must, ok           how many have to, and whether they do
wrong              the beginnings of the first answers without it

The last line says whether all were.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import sys
from typing import Any

import aiohttp

from scripts.lib.live_server import live_server
from scripts.lib.reference import provenance

CAPITALS = {  # country -> its capital, how often to ask, how many answers must name it
    "Germany": ("Berlin", 60, 55),
    "France": ("Paris", 10, 9),
    "Italy": ("Rome", 10, 9),
    "Japan": ("Tokyo", 10, 9),
}
MAX_TOKENS = 100  # an answer that has not named the city by then does not
AT_ONCE = 30


async def answer(session: aiohttp.ClientSession, free: asyncio.Semaphore, country: str, more: dict[str, Any]) -> str:
    """What the server says when it is asked for the capital of a country."""
    question = {"role": "user", "content": f"What is the capital of {country}?"}
    body = {"messages": [question], "max_tokens": MAX_TOKENS, **more}
    async with free, session.post("/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        return str((await response.json())["choices"][0]["message"]["content"])


async def measure(url: str, more: dict[str, Any]) -> bool:
    """Print a line for each country; returns whether enough answers are right everywhere."""
    failed = []
    free = asyncio.Semaphore(AT_ONCE)
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=None)) as session:
        async with session.get("/server_info") as response:
            info = await response.json()
        server = {"model": info["model"], "sampling_defaults": info["sampling_defaults"], "body": more}
        for country, (capital, asked, must) in CAPITALS.items():
            texts = await asyncio.gather(*(answer(session, free, country, more) for _ in range(asked)))
            wrong = [text for text in texts if not re.search(rf"\b{capital}\b", text, re.IGNORECASE)]
            named = asked - len(wrong)
            failed += [] if named >= must else [country]
            line = {"check": "first answers", "country": country, "asked": asked, "named": named, "must": must}
            shown = {"ok": named >= must, "different": len(set(texts)), "wrong": [text[:80] for text in wrong[:3]]}
            print(json.dumps(line | shown | server | provenance()), flush=True)
    print(json.dumps({"check": "first answers", "ok": not failed, "failed": failed}), flush=True)
    return not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--url", help="a server that runs already, http://host:port")
    parser.add_argument("--body", type=json.loads, default={}, metavar="JSON", help="further fields of the requests")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:at])
    with contextlib.ExitStack() as stack:
        url = args.url or stack.enter_context(live_server("--device", "cpu", *sys.argv[at + 1 :]))
        return 0 if asyncio.run(measure(url, args.body)) else 1


if __name__ == "__main__":
    sys.exit(main())
