"""Loads that one client can put on a server, each for as long as this process lives.  Run by scripts/check/neighbours.py.

    python -m scripts.lib.loads URL NAME [ADDRESS]

The client sits at ADDRESS (127.0.0.2).  At SIGTERM it prints one JSON object: how many answers had which status.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

VOCAB = 49_000  # token ids of the embedded model that are plain text
LINE = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "PROMPT"}})
Post = Callable[..., Awaitable[Any]]


def _ids(n: int) -> list[int]:
    return [random.randrange(20, VOCAB) for _ in range(n)]


def _completion(**body: Any) -> Callable[[Post], Awaitable[object]]:
    """Completions one after another, each of another prompt; a value that can be called makes a new one each time."""

    async def once(post: Post) -> object:
        fresh = {name: value() if callable(value) else value for name, value in body.items()}
        return await post("/v1/completions", json={"max_tokens": 64, "ignore_eos": True, **fresh})

    return once


async def _upload(post: Post, content: bytes) -> object:
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", content, filename="in.jsonl")
    return await post("/v1/files", data=form)


async def _batch_line(post: Post) -> object:
    """A batch of one line of 100 MiB."""
    await _upload(post, LINE.replace("PROMPT", "x" * (100 << 20)).encode())
    files = await post("/v1/files?limit=1", method="GET", answer=True)
    batch = {"input_file_id": files["data"][0]["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    return await post("/v1/batches", json=batch)


async def _files(post: Post) -> object:
    """3,000 small files, and the list of them again and again."""
    for _ in range(100):
        await asyncio.gather(*(_upload(post, LINE.encode()) for _ in range(30)))
    while True:
        await post("/v1/files?limit=10000", method="GET")


_EBNF = "root ::= " + " | ".join(f'"{i:07d}"' for i in range(570_000))  # 7 MB
LOADS: dict[str, tuple[int, Callable[[Post], Awaitable[object]]]] = {  # name -> (connections, what each does without end)
    "one prompt of 7,900": (1, _completion(prompt=lambda: _ids(7900), max_tokens=1)),
    "four prompts of 7,900": (4, _completion(prompt=lambda: _ids(7900), max_tokens=1)),
    "32 prompts x n = 60": (1, _completion(prompt=lambda: [_ids(9) for _ in range(32)], n=60)),
    "32 prompts x n = 16": (4, _completion(prompt=lambda: [_ids(9) for _ in range(32)], n=16)),
    "priority 100": (16, _completion(prompt=lambda: _ids(300), priority=100, max_tokens=500)),
    "16 clients": (16, _completion(prompt=lambda: _ids(300), max_tokens=500)),
    "regexes": (16, _completion(prompt="x", guided_regex="(a{1000}){1000}")),
    "a grammar of 7 MB": (1, _completion(prompt="x", guided_grammar=_EBNF)),
    "n = 16 x 4,000, 20 logprobs": (1, _completion(prompt=lambda: _ids(9), n=16, max_tokens=4000, logprobs=20)),
    "bodies of 8 MiB, text": (2, _completion(prompt="word " * ((8 << 20) // 5 - 50))),
    "bodies of 8 MiB, ids": (2, _completion(prompt=[1] * ((8 << 20) // 3 - 50))),
    "detokenize 8 MiB": (2, lambda post: post("/detokenize", json={"tokens": [17] * ((8 << 20) // 4 - 20)})),
    "a batch line of 100 MiB": (1, _batch_line),
    "3,000 files": (1, _files),
}


async def main(url: str, name: str, address: str = "127.0.0.2") -> None:
    statuses: Counter[str] = Counter()
    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0, local_addr=(address, 0))
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:

        async def post(path: str, method: str = "POST", answer: bool = False, **kw: Any) -> Any:
            async with session.request(method, path, **kw) as response:
                statuses[str(response.status)] += 1
                raw = await response.read()
                if response.status >= 400:
                    await asyncio.sleep(0.05)  # a refusal costs its client nothing
                return json.loads(raw) if answer else response.status

        async def without_end() -> None:
            while True:
                try:
                    await LOADS[name][1](post)
                except (aiohttp.ClientError, OSError) as e:
                    statuses[type(e).__name__] += 1
                    await asyncio.sleep(0.05)

        tasks = [asyncio.create_task(without_end()) for _ in range(LOADS[name][0])]
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: [task.cancel() for task in tasks])
        await asyncio.gather(*tasks, return_exceptions=True)
    print(json.dumps(statuses), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
