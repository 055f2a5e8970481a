"""Does exact routing find what `minisgl simulate` predicts?  Three real servers behind vllm-router; one JSON line a policy.

    .venv/bin/python scripts/check/routing.py TRACE.jsonl --router /path/to/vllm-router [--limit 600] [--pool-tokens 24576]

TRACE is Mooncake's: those of its first requests that share more than their first block with another one; lengths, and the
blocks of 512 tokens, are divided by --divide.  Prompts are texts of words that are one token each.  The servers run the fake
engine with pools so small that they evict; each policy begins with empty caches.

hit_rate                 share of the prompt tokens that the servers read from their caches, as they say in `usage`
predicted, one_cache     what `simulate` finds for this policy over the same pools, and for one cache of the total size
step_ms                  of the simulated steps: the median time of a request here over its tokens, so that as many are open
share                    hit_rate / predicted for exact routing (kv_aware alone: at least LEAST)
random_ties              least, mean and most that exact routing finds where chance breaks ties, in DRAWS simulations: how much
                         of a difference is luck
per_replica              requests by server
restart_hits             after the router was stopped and started anew: the newest prompts, one after another, from the moment
                         that it is up; the share that went where it is cached.  `restart_seconds`: how long they took in all
restart_hits_no_replay   the same where the router was not told where to ask for the events that it has missed

kv_aware needs servers with --kv-events; where they do not know that flag, it is left out and the last line says so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import aiohttp
import numpy as np

from minisgl.actors.scheduler.interface import SchedulerLimits
from minisgl.arrays import I32, I64
from minisgl.deploy.program import free_port
from minisgl.model.checkpoint.resolve import fake_model
from minisgl.model.text.tokenizer import load_tokenizer
from minisgl.simulation.fleet import simulate
from minisgl.simulation.gpu import FittedCosts
from minisgl.simulation.plan import one_cache
from minisgl.simulation.router import ROUTERS, Fleet, Policy
from minisgl.simulation.trace import FIRST_PROMPT_TOKEN, TraceRequest, load
from scripts.lib.live_server import live_server
from scripts.lib.reference import provenance

LEAST, PAGE, PROBES, DRAWS = 0.95, 16, 30, 12
POLICIES = {"round_robin": "round-robin", "cache_aware": "cache-aware", "kv_aware": "exact"}


def shortened(path: str, limit: int, scale: float, divide: int) -> list[TraceRequest]:
    """Those of the first requests that share more than the first block with another one, with all lengths divided."""
    requests = [r for r in load(path, limit=limit, scale=scale) if len(r.tokens) > 1]
    seconds = Counter(int(r.tokens[1]) for r in requests)
    return [
        replace(r, output=max(1, r.output // divide), counts=np.maximum(1, r.counts // divide).astype(np.int32))
        for r in requests
        if seconds[int(r.tokens[1])] > 1
    ]


class Words:
    """Texts of words that the tokenizer of the fake engine reads as one token each."""

    def __init__(self) -> None:
        tokenizer = load_tokenizer(fake_model())
        words = [tokenizer.decode([i], False) for i in range(fake_model().vocab_size)]
        self._words = np.array([w for w in words if re.fullmatch(" [a-z]{3,8}", w)])
        sample = self._text(1, 200)
        if len(tokenizer.encode(sample, False)) != 200:
            raise RuntimeError("the tokenizer splits words of this script")

    def _text(self, seed: int, n: int) -> str:
        return "".join(np.random.default_rng(seed).choice(self._words, n))

    def prompt(self, request: TraceRequest) -> str:
        """Each block's words depend on its id alone."""
        return "".join(self._text(int(t), int(n)) for t, n in zip(request.tokens, request.counts, strict=True))


def get(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except (OSError, urllib.error.URLError):
        return 0


@contextlib.contextmanager
def router(path: str, policy: str, servers: Sequence[tuple[str, str, str]], log: str, *, replay: bool = True) -> Iterator[str]:
    """The URL of a router in front of servers (URL, address of the events, of the replay), when it is up."""
    port = free_port()
    flags = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port()), "--policy", policy]
    flags += [
        "--health-check-endpoint",
        "/ready",
        "--health-check-interval-secs",
        "1",
        "--worker-urls",
        *(s[0] for s in servers),
    ]
    if policy == "kv_aware":
        flags += ["--kv-event-block-size", str(PAGE), "--kv-event-model", "fake"]
        for url, events, missed in servers:
            flags += ["--kv-event-source", f"{url}={events}"]
            flags += ["--kv-event-replay-source", f"{url}={missed}"] if replay else []
    with open(log, "ab") as out, subprocess.Popen([path, *flags], stdout=out, stderr=out) as process:
        try:
            url, start = f"http://127.0.0.1:{port}", time.monotonic()
            while get(f"{url}/health") != 200:
                if process.poll() is not None or time.monotonic() - start > 120:
                    raise RuntimeError(f"{path} did not come up; see {log}")
                time.sleep(0.05)
            yield url
        finally:
            process.terminate()
            process.wait(20)


async def ask(session: aiohttp.ClientSession, url: str, text: str, tokens: int) -> tuple[int, int, float]:
    """(prompt tokens, those of them that were cached, seconds)."""
    body = {"model": "fake", "prompt": text, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    start = time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as response:
        answer = await response.json()
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {answer}")
        usage = answer["usage"]
        return (
            usage["prompt_tokens"],
            (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            time.perf_counter() - start,
        )


async def serve(url: str, requests: Sequence[TraceRequest], words: Words, start_at: float) -> list[tuple[int, int, float]]:
    """Send each request at its time."""
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        start = time.perf_counter()

        async def one(request: TraceRequest) -> tuple[int, int, float]:
            await asyncio.sleep(max(0.0, start + request.arrival - start_at - time.perf_counter()))
            return await ask(session, url, words.prompt(request), request.output)

        return list(await asyncio.gather(*(one(r) for r in requests)))


async def probe(url: str, requests: Sequence[TraceRequest], words: Words) -> tuple[float, float]:
    """The share of these prompts that are found where the router sends them, and the seconds that all of them took."""
    right, start = 0, time.perf_counter()
    async with aiohttp.ClientSession() as session:
        for request in requests:
            prompt, cached, _ = await ask(session, url, words.prompt(request), 1)
            right += cached >= 0.9 * ((prompt - 1) // PAGE * PAGE)
    return right / len(requests), time.perf_counter() - start


def newest(requests: Sequence[TraceRequest]) -> list[TraceRequest]:
    """The last prompts of more than two blocks, none the beginning of another."""
    chosen: list[TraceRequest] = []
    for r in reversed(requests):
        n = len(r.tokens)
        if n > 2 and not any(list(c.tokens[: n - 1]) == list(r.tokens[: n - 1]) for c in chosen):
            chosen.append(r)
        if len(chosen) == PROBES:
            break
    return chosen


def measure(args: argparse.Namespace, policy: str, requests: list[TraceRequest], words: Words) -> dict[str, Any]:
    """One policy: fresh servers, the trace, and for kv_aware two restarts of the router."""
    with contextlib.ExitStack() as stack:
        servers = []
        for _ in range(args.replicas):
            ports = [free_port(), free_port()]
            flags = ["--model", "fake", "--kv-tokens", str(args.pool_tokens), "--max-running", "32"]
            events = [f"tcp://127.0.0.1:{port}" for port in ports]
            if policy == "kv_aware":
                flags += ["--kv-events", events[0], "--kv-events-replay", events[1]]
            servers.append((stack.enter_context(live_server(*flags)), events[0], events[1]))
        log = f"{args.log}.{policy}"
        with router(args.router, policy, servers, log) as url:
            answers = asyncio.run(serve(url, requests, words, 0.0))
        row: dict[str, Any] = {"policy": policy, "hit_rate": sum(a[1] for a in answers) / sum(a[0] for a in answers)}
        row["step_ms"] = statistics.median(a[2] / (r.output + 1) for a, r in zip(answers, requests, strict=True)) * 1e3
        row["per_replica"] = [requests_of(url) for url, _, _ in servers]
        if policy == "kv_aware":
            probes = newest(requests)
            with router(args.router, policy, servers, log) as url:
                row["restart_hits"], row["restart_seconds"] = asyncio.run(probe(url, probes[::2], words))
            with router(args.router, policy, servers, log, replay=False) as url:
                row["restart_hits_no_replay"], _ = asyncio.run(probe(url, probes[1::2], words))
        return row


def predict(requests: list[TraceRequest], limits: SchedulerLimits, step: float, replicas: int, name: str) -> tuple[float, Any]:
    """The hit rate behind a router of the simulator, and its requests by replica."""
    costs = FittedCosts(step, 0.0, 0.0, 0.0)
    done = simulate(requests, limits, costs, replicas=replicas, router=name, request_level=True)
    return float(done.log.cached.sum()) / float(done.inputs.sum()), done.routed


def by_chance(seed: int) -> Policy:
    """Exact routing with ties broken at random."""
    rng = np.random.default_rng(seed)

    def policy(fleet: Fleet, ids: I32) -> int:
        ties: I64 = rng.permutation(len(fleet.open))
        return fleet.least(fleet.backlog - fleet.cached(ids), fleet.open, ties)

    return policy


def requests_of(url: str) -> int:
    """How many requests a server has had, by its metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    counted = (line for line in lines if line.startswith("minisgl_http_requests_total") and 'route="/v1/completions"' in line)
    return int(sum(float(line.split()[-1]) for line in counted))


def knows_events() -> bool:
    """Whether the servers have --kv-events."""
    done = subprocess.run([sys.executable, "-m", "minisgl", "serve", "--help"], capture_output=True, text=True, check=False)
    return "--kv-events " in done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace", help="of Mooncake, .jsonl")
    parser.add_argument("--router", default="vllm-router", help="pip install vllm-router==0.1.17, in an environment of its own")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--limit", type=int, default=600, help="a part of the first so many requests")
    parser.add_argument("--scale", type=float, default=4.0, help="times as fast as the trace")
    parser.add_argument("--divide", type=int, default=16, help="lengths are divided by this")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--pool-tokens", type=int, default=24_576, help="KV cache of each server")
    parser.add_argument("--log", default="/tmp/routing", help="the router's own words: this name and the policy")
    args = parser.parse_args()
    requests, words = shortened(args.trace, args.limit, args.scale, args.divide), Words()
    longest = max(r.input + r.output for r in requests)
    limits = SchedulerLimits(32, args.pool_tokens // PAGE, PAGE, longest, 2048, 2, FIRST_PROMPT_TOKEN)
    whole, ok, left_out = one_cache(requests, limits, args.replicas), True, ""
    for policy in args.policies.split(","):
        if policy == "kv_aware" and not knows_events():
            left_out, ok = "kv_aware: these servers do not know --kv-events", False
            continue
        row = measure(args, policy, requests, words)
        step = row["step_ms"] / 1e3
        row["one_cache"] = whole
        row["predicted"], row["predicted_per_replica"] = predict(requests, limits, step, args.replicas, POLICIES[policy])
        if policy == "kv_aware":
            drawn = []
            for seed in range(DRAWS):
                with mock.patch.dict(ROUTERS, exact=by_chance(seed)):  # under a name that knows the caches
                    drawn.append(predict(requests, limits, step, args.replicas, "exact")[0])
            row["random_ties"] = [min(drawn), statistics.mean(drawn), max(drawn)]
            row["share"] = row["hit_rate"] / row["predicted"]
            row["ok"] = row["share"] >= LEAST and row["restart_hits"] >= LEAST
            ok &= row["ok"]
        print(json.dumps(row), flush=True)
    print(json.dumps({"ok": ok, "left_out": left_out, "requests": len(requests), **vars(args), **provenance()}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
