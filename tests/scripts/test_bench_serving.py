"""The load generator of scripts/bench/serving.py: what it sends, when, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from minisgl.bench.workload import FIRST_ID
from minisgl.simulation.trace import FIRST_PROMPT_TOKEN, TraceRequest, load

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    from scripts.bench import serving

    return serving


def request(blocks: list[int], counts: list[int], arrival: float = 0.0, output: int = 3) -> TraceRequest:
    return TraceRequest(arrival, output, np.array(blocks, np.int32) + FIRST_PROMPT_TOKEN, np.array(counts, np.int32))


def test_equal_blocks_give_equal_tokens_and_different_ones_differ_at_once(bench: ModuleType) -> None:
    vocab = FIRST_ID + 10  # far fewer tokens than blocks
    prompts = [bench.prompt_ids(request([block], [16]), vocab) for block in range(90)]
    assert all(a[:2] != b[:2] for a, b in combinations(prompts, 2))
    assert all(FIRST_ID <= t < vocab for p in prompts for t in p)
    long = bench.prompt_ids(request([3, 41, 7], [16, 16, 1]), vocab)
    assert long == prompts[3] + prompts[41] + prompts[7][:1]


def test_prompts_share_what_the_trace_says_they_share(bench: ModuleType) -> None:
    requests = load("synthetic:rate=0,input=5-40,shared=24,groups=2,n=30,output=1-2")
    prompts = [bench.prompt_ids(r, 40_000) for r in requests]
    assert [len(p) for p in prompts] == [r.input for r in requests]
    for (a, p), (b, q) in combinations(zip(requests, prompts, strict=True), 2):
        common = next((i for i, (x, y) in enumerate(zip(p, q, strict=False)) if x != y), min(len(p), len(q)))
        assert common == (24 if a.tokens[0] == b.tokens[0] else 0)


def test_the_figures_are_those_of_the_outcomes(bench: ModuleType) -> None:
    fast = bench.Outcome(late=0.001, sent=1.0, pieces=[1.1, 1.2, 1.3], prompt=60, cached=32, tokens=3)
    slow = bench.Outcome(late=0.004, sent=2.0, pieces=[2.5, 3.5], prompt=40, cached=0, tokens=2)
    refused = bench.Outcome(error="HTTP 429")
    found = bench.summary([fast, slow, refused], 10.0, ttft_ms=600, tpot_ms=200)
    assert found["errors"] == {"HTTP 429": 1}
    assert (found["requests"], found["completed"], found["requests_s"], found["output_tok_s"]) == (3, 2, 0.2, 0.5)
    assert (found["ttft_ms"]["p50"], found["ttft_ms"]["max"]) == (300.0, 500.0)
    assert (found["tpot_ms"]["p50"], found["tpot_ms"]["max"]) == (550.0, 1000.0)
    assert found["itl_ms"]["p50"] == 100.0  # of 100, 100 and 1,000
    assert found["goodput"] == round(1 / 3, 4)  # the second is in time at first and too slow then
    assert (found["cached"], found["lateness_ms"]) == (0.32, 4.0)
    nothing = bench.summary([refused], 1.0, ttft_ms=1, tpot_ms=1)
    assert (nothing["ttft_ms"], nothing["itl_ms"], nothing["cached"], nothing["goodput"]) == (None, None, None, 0.0)


async def served(handler: Callable[[web.Request], Awaitable[web.StreamResponse]], work: Callable[[str], Awaitable[Any]]) -> Any:
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        return await work(f"http://127.0.0.1:{runner.addresses[0][1]}")
    finally:
        await runner.cleanup()


async def stream(request: web.Request, texts: list[str], usage: dict[str, Any]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for text in texts:
        await response.write(b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n")
    await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
    return response


def test_requests_are_sent_at_their_time_whatever_became_of_earlier_ones(bench: ModuleType) -> None:
    bodies: list[dict[str, Any]] = []

    async def run() -> Any:
        later = asyncio.Event()

        async def handler(request: web.Request) -> web.StreamResponse:
            bodies.append(await request.json())
            number = len(bodies)
            if number == 1:
                await later.wait()  # the first is answered only when the last is here: a closed loop would hang
            if number == 3:
                later.set()
                return web.json_response({"error": {"code": "server_overloaded"}}, status=429)
            usage = {"prompt_tokens": 20, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 16}}
            return await stream(request, ["a", "bc"], usage)

        requests = [request([i], [20], arrival=0.01 * i) for i in range(3)]
        return await served(handler, lambda url: bench.replay(url, "m", requests, 32_000))

    _, outcomes = asyncio.run(asyncio.wait_for(run(), 30))
    assert [o.error for o in outcomes] == ["", "", "HTTP 429"]
    assert [(o.tokens, o.cached, len(o.pieces)) for o in outcomes[:2]] == [(3, 16, 2)] * 2
    assert outcomes[0].pieces[0] > outcomes[2].sent
    assert bodies[0]["prompt"] == bench.prompt_ids(request([0], [20]), 32_000)
    assert (bodies[0]["max_tokens"], bodies[0]["ignore_eos"], bodies[0]["stream"]) == (3, True, True)


def test_an_error_within_a_stream_is_counted(bench: ModuleType) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"choices": [{"text": "a"}]}\n\ndata: {"error": {"code": "engine_error"}}\n\n')
        return response

    _, (outcome,) = asyncio.run(served(handler, lambda url: bench.replay(url, "m", [request([1], [4])], 32_000)))
    assert outcome.error == "engine_error"


def test_a_server_that_does_not_start_is_an_error_with_its_message(
    bench: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="ended before it was ready"), bench.live_server("--port", "99999"):
        pass
    assert "--port must be between 0 and 65535" in capfd.readouterr().err
