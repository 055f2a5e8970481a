"""A trace of requests against a server, at the times of the trace: latencies, rates and what the prefix cache found.

    .venv/bin/python scripts/bench/serving.py TRACE [--scale 0.5 1 2] [--limit 1000] [-- --model random:qwen3-14b --tp 2 ...]
    .venv/bin/python scripts/bench/serving.py TRACE --url http://127.0.0.1:8000 [--model NAME]

TRACE is what `minisgl simulate` reads (docs/simulator.md): a Mooncake .jsonl, an Azure .csv, or synthetic:rate=4,...  Without
--url a server is started with the flags behind `--` and stopped again; with it any OpenAI-compatible one is measured (it must
take token ids as a prompt and `ignore_eos`).  Requests are sent when the trace says, whether or not earlier ones have been
answered (open loop); --scale runs the trace so many times as fast, each with an empty cache.  Answers are as long as the
trace says.  One JSON line for each scale:

ttft_ms, tpot_ms, itl_ms, e2e_ms   time to the first token; mean time per later token of a request; pauses between two pieces
                                   of a stream; time to the last: percentiles 50, 90 and 99, and the largest
goodput     share of requests with ttft within --ttft and tpot within --tpot milliseconds
cached      share of the prompt tokens that the server reports as cached; ideal_cached: what an unbounded cache would find
lateness_ms how long after its time a request was sent, largest: above a few ms the client was too slow, and the rest is void
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import urllib.request
from collections.abc import Sequence
from typing import Any

import aiohttp

from minisgl.bench.outcomes import Outcome, summary
from minisgl.bench.provenance import provenance
from minisgl.bench.workload import prompt_ids
from minisgl.errors import UserError
from minisgl.simulation.trace import TraceRequest, ideal_hits, load
from scripts.lib.live_server import live_server

PAGE = 16  # tokens; what `ideal_cached` supposes


async def send(session: aiohttp.ClientSession, url: str, body: dict[str, Any], start: float, due: float) -> Outcome:
    """One request at its time, streamed."""
    out = Outcome()
    await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
    out.sent = time.perf_counter()
    out.late = out.sent - start - due
    try:
        async with session.post(url + "/v1/completions", json=body) as response:
            if response.status != 200:
                out.error = f"HTTP {response.status}"
                return out
            async for line in response.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    out.error = str(event["error"].get("code"))
                    return out
                if event["choices"]:
                    out.pieces.append(time.perf_counter())
                if usage := event.get("usage"):
                    out.prompt, out.tokens = usage["prompt_tokens"], usage["completion_tokens"]
                    out.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    except (aiohttp.ClientError, OSError) as e:
        out.error = type(e).__name__
    return out


async def replay(url: str, model: str, requests: Sequence[TraceRequest], vocab: int) -> tuple[float, list[Outcome]]:
    """(seconds until the last answer has ended, an outcome for each request)."""
    bodies = [
        {"model": model, "prompt": prompt_ids(r, vocab), "max_tokens": r.output, "ignore_eos": True, "temperature": 0}
        | {"stream": True, "stream_options": {"include_usage": True}}
        for r in requests
    ]
    limits = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(None), read_bufsize=1 << 20) as session:
        start = time.perf_counter() + 0.1
        sends = (send(session, url, body, start, r.arrival) for body, r in zip(bodies, requests, strict=True))
        outcomes = list(await asyncio.gather(*sends))
    return time.perf_counter() - start, outcomes


def get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return dict(json.load(answer))


def flush(url: str) -> None:
    """Empty the prefix cache, where the server can (ours, SGLang's)."""
    try:
        urllib.request.urlopen(urllib.request.Request(url + "/flush_cache", method="POST"), timeout=10).close()
    except OSError as e:
        print(f"{url}: the cache could not be emptied ({e}); what an earlier replay left is found again", file=sys.stderr)


def measure(url: str, args: argparse.Namespace, about: dict[str, Any]) -> None:
    model = args.model or get(url + "/v1/models")["data"][0]["id"]
    for scale in args.scale:
        requests = load(args.trace, limit=args.limit, scale=scale, duration=args.duration)
        flush(url)
        asyncio.run(replay(url, model, requests[:2], args.vocab))  # warms up
        flush(url)
        seconds, outcomes = asyncio.run(replay(url, model, requests, args.vocab))
        ideal = int(ideal_hits(requests, PAGE).sum()) / sum(r.input for r in requests)
        line = {**about, "model": model, "scale": scale, **summary(outcomes, seconds, args.ttft, args.tpot)}
        print(json.dumps({**line, "ideal_cached": round(ideal, 4)}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace")
    parser.add_argument("--scale", type=float, nargs="+", default=[1.0], help="times as fast as the trace")
    parser.add_argument("--limit", type=int, default=1000, help="the first so many requests; 0: all")
    parser.add_argument("--duration", type=float, default=0.0, help="those of the first so many seconds; 0: all")
    parser.add_argument("--url", help="of a running server, without /v1")
    parser.add_argument("--model", help="its name there; the first of /v1/models")
    parser.add_argument("--vocab", type=int, default=32_000, help="prompts consist of token ids below this")
    parser.add_argument("--ttft", type=float, default=1000.0, help="ms, for goodput")
    parser.add_argument("--tpot", type=float, default=50.0, help="ms, for goodput")
    mine, flags = sys.argv[1:], []
    if "--" in mine:
        at = mine.index("--")
        mine, flags = mine[:at], mine[at + 1 :]
    args = parser.parse_args(mine)
    if args.url and flags:
        parser.error(f"{flags[0]}: flags of a server, but with --url none is started")
    try:
        load(args.trace, limit=1)
    except UserError as e:
        parser.error(str(e))
    about = {"bench": "serving", "trace": args.trace, "limit": args.limit, "flags": flags, **provenance()}
    try:
        if args.url:
            measure(args.url.rstrip("/").removesuffix("/v1"), args, about)
        else:
            with live_server(*flags) as url:
                measure(url, args, about)
    except (UserError, RuntimeError, OSError) as e:
        print(f"bench_serving: {args.url or ''} {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
