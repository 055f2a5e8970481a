"""Capacity planning: routers, the index of all caches, replicas at the level of requests, and the search for an SLO."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_simulation import SIMPLE, conversations, limits

from minisgl.arrays import I32
from minisgl.cache.no_cache import NoCache
from minisgl.cache.radix import RadixCache
from minisgl.commands.simulate import run
from minisgl.errors import UserError
from minisgl.simulation.fleet import Run, simulate
from minisgl.simulation.gpu import PRESETS, FittedCosts, Work
from minisgl.simulation.plan import Point, Slo, best_case, one_cache, parse_slo, point, search, within
from minisgl.simulation.prefix_index import PrefixIndex, announcing
from minisgl.simulation.router import ROUTERS, Fleet
from minisgl.simulation.trace import TraceRequest, load

PAGE = 16


def prompts(*rows: tuple[float, list[int]], output: int = 2) -> list[TraceRequest]:
    """Requests of whole blocks of 64 tokens: (arrival, block ids)."""
    token = 1 << 20
    return [TraceRequest(at, output, np.array(ids, np.int32) + token, np.full(len(ids), 64, np.int32)) for at, ids in rows]


def hits(done: Run) -> float:
    return float(done.log.cached.sum()) / float(done.inputs.sum())


# ---------------- the index of all caches
def test_the_index_agrees_with_the_caches_through_inserts_and_evictions() -> None:
    rng = np.random.default_rng(0)
    index = PrefixIndex(4, 3)
    caches = [announcing(RadixCache, index, i)(4) for i in range(3)]
    named = 0
    for _ in range(1500):
        ids: I32 = rng.integers(0, 3, int(rng.integers(1, 40))).astype(np.int32)
        assert index.found(ids).tolist() == [cache.match(ids).num_pages * 4 for cache in caches]
        cache = caches[int(rng.integers(3))]
        match = cache.match(ids)
        handle, _ = cache.acquire(match)
        whole = len(ids) // 4
        pages = np.arange(named, named + whole - match.num_pages, dtype=np.int32)
        named += len(pages)
        handle, _, _ = cache.extend(handle, ids[match.num_pages * 4 : whole * 4], pages)
        cache.release(handle)
        if rng.random() < 0.5:
            cache.evict(int(rng.integers(1, 12)))
    for cache in caches:
        cache.check()
        cache.flush()
    assert not index._root.children


def test_the_index_of_a_thousand_replicas_names_each_depth() -> None:
    index = PrefixIndex(4, 1000)
    ids = np.arange(41, dtype=np.int32)
    for replica in range(1000):
        index.store(ids[: 4 * (replica % 11)].tobytes(), replica)
    assert index.found(ids).tolist() == [4 * (replica % 11) for replica in range(1000)]


# ---------------- routers
def test_round_robin_of_one_prompt_misses_once_on_each_replica() -> None:
    same = prompts(*((float(i), [1, 2, 3, 4]) for i in range(12)))
    for replicas in (1, 3, 4):
        done = simulate(same, limits(), SIMPLE, replicas=replicas, router="round-robin", request_level=True)
        assert done.log.cached.tolist() == [0] * replicas + [256 - PAGE] * (12 - replicas)  # the last page has the last token


@pytest.mark.parametrize("router", ["exact", "longest", "cache-aware"])
def test_who_knows_the_prefixes_misses_once_in_the_fleet(router: str) -> None:
    same = prompts(*((float(i), [1, 2, 3, 4]) for i in range(12)))
    done = simulate(same, limits(), SIMPLE, replicas=4, router=router, request_level=True)
    assert done.log.cached.tolist() == [0] + [256 - PAGE] * 11


def test_only_exact_routers_notice_that_a_prefix_was_evicted() -> None:
    """Two prompts alternate on pools that hold one: exact gives each its own pool."""
    rows = prompts(*((float(i), [1 + 10 * (i % 2), 2 + 10 * (i % 2), 3 + 10 * (i % 2)]) for i in range(10)))
    small = limits(num_pages=14, max_context=224)
    done = simulate(rows, small, SIMPLE, replicas=2, router="exact", request_level=True)
    assert done.log.cached.tolist() == [0, 0] + [176] * 8
    assert done.routed == (5, 5)
    alone = simulate(rows, small, SIMPLE, router="exact", request_level=True)
    assert alone.log.cached.tolist() == [0, 0] + [PAGE] * 8  # what 14 pages have beside the other prompt and its answer


def test_a_policy_is_ten_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def shortest_prompt_queue(fleet: Fleet, ids: I32) -> int:
        return fleet.least(fleet.backlog)

    monkeypatch.setitem(ROUTERS, "mine", shortest_prompt_queue)
    done = simulate(prompts((0, [1]), (0, [2]), (0, [3])), limits(), SIMPLE, replicas=3, router="mine", request_level=True)
    assert done.routed == (1, 1, 1)


def test_affinity_yields_where_the_loads_are_far_apart() -> None:
    fleet = Fleet(ROUTERS["cache-aware"], 2, 1 << 20)
    ids = np.arange(640, dtype=np.int32)
    chosen = [fleet.route(uid, ids) for uid in range(70)]
    assert chosen == [0] * 65 + [1] * 5  # 65 more than on the other one are too many; then both have the prefix


@pytest.mark.parametrize("pages", [120, 240, 480])
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_routing_finds_more_than_turns_and_no_more_than_one_cache_of_the_total_size(
    tmp_path: Path, pages: int, seed: int
) -> None:
    trace = load(conversations(tmp_path / "t.jsonl", 80, seed))
    short = [replace(r, counts=(r.counts // 8 + 1).astype(np.int32)) for r in trace]
    small = limits(num_pages=max(pages, max(r.input + r.output for r in short) // PAGE + 1), max_context=1 << 16)
    rate = {r: hits(simulate(short, small, SIMPLE, replicas=3, router=r, request_level=True)) for r in ROUTERS}
    assert rate["round-robin"] < rate["exact"] <= one_cache(short, small, 3)


# ---------------- replicas at the level of requests
@pytest.mark.parametrize(
    "trace",
    [
        "synthetic:rate=40,input=10-600,output=1-80,shared=64,groups=3,n=60,seed=1",
        "synthetic:rate=5,input=700,output=30,n=10",
        "synthetic:rate=200,input=20-60,output=20-60,n=60,seed=4",
    ],
)
def test_the_model_of_a_replica_agrees_with_the_step_machine(trace: str) -> None:
    requests = load(trace)
    real, model = (simulate(requests, limits(), SIMPLE, request_level=level) for level in (False, True))
    assert model.log.tokens.tolist() == [r.output for r in requests]
    assert hits(model) == pytest.approx(hits(real), abs=0.02)
    assert model.busy == pytest.approx(real.busy, rel=0.03)
    for ours, theirs in ((model.log.first, real.log.first), (model.log.last, real.log.last)):
        assert (ours - model.log.arrival).mean() == pytest.approx((theirs - real.log.arrival).mean(), rel=0.05)
    slo = Slo(ttft=0.012, itl=0.0013)
    assert within(model, slo).mean() == pytest.approx(within(real, slo).mean(), abs=0.05)


@pytest.mark.parametrize("changes", [{"num_pages": 64, "max_context": 1024}, {"max_steps_in_flight": 1}, {"cache": NoCache}])
def test_every_request_ends_with_its_length_at_the_level_of_requests_too(changes: dict[str, object]) -> None:
    requests = load("synthetic:rate=60,input=10-600,output=1-200,shared=64,groups=3,n=120,seed=1")
    done = simulate(requests, limits(**changes), SIMPLE, request_level=True)
    assert done.log.tokens.tolist() == [r.output for r in requests]
    assert (done.log.first > done.log.arrival).all()
    assert (done.log.last >= done.log.first).all()
    if "cache" in changes:
        assert hits(done) == 0


def test_a_plan_on_one_replica_is_the_simulation_of_one_replica(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["synthetic:rate=2,n=30,shared=100,input=50-300,output=5-20", "--replicas", "1", "--json"]
    assert run(args) == 0
    plain = json.loads(capsys.readouterr().out)
    assert run([*args, "--slo", "ttft=1s", "--step-level", "--routers", "exact"]) == 0
    planned = json.loads(capsys.readouterr().out)["routers"][0]
    assert (planned["hit_rate"], planned["seconds"]) == (plain["hit_rate"], plain["seconds"])
    assert planned["gpu_busy"] == pytest.approx(plain["gpu_busy"])


# ---------------- the objective
def test_the_goodput_is_the_share_of_requests_whose_times_are_all_within() -> None:
    """Two steps of 1 ms and 64 tokens: the first token after 1.64 ms + 0.1 ms of the scheduler, then one every 1 ms."""
    costs = FittedCosts(1e-3, 1e-5, 0, 0)
    trace = prompts((0, [1]), (1, [2]), (2, [3, 4, 5, 6, 7]), output=3)
    done = simulate(trace, limits(), costs, request_level=True)
    assert (done.log.first - done.log.arrival).tolist() == pytest.approx([1.74e-3, 1.74e-3, 5.3e-3])
    share = {ttft: float(within(done, Slo(ttft=ttft)).mean()) for ttft in (1.7e-3, 1.75e-3, 6e-3)}
    assert share == {1.7e-3: 0, 1.75e-3: pytest.approx(2 / 3), 6e-3: 1}
    assert within(done, Slo(itl=0.99e-3)).sum() == 0
    assert within(done, Slo(itl=1.01e-3, gap=1.01e-3)).all()


def test_a_refused_request_misses_the_objective() -> None:
    done = simulate(prompts((0, [1]), (0, [1] * 100)), limits(num_pages=64), SIMPLE, request_level=True)
    assert within(done, Slo(ttft=100)).tolist() == [True, False]


def test_the_price_is_that_of_all_replicas_until_the_last_token() -> None:
    done = simulate(prompts((0, [1]), (3600, [2])), limits(), SIMPLE, replicas=2, router="round-robin", request_level=True)
    found = point(done, "round-robin", Slo(ttft=1), price_per_hour=3)
    assert found.cost_per_million == pytest.approx(6 * 1e6 / 132, rel=1e-3)
    assert found.cost_per_million_output == pytest.approx(6 * 1e6 / 4, rel=1e-3)
    assert point(done, "round-robin", Slo(ttft=1)).cost_per_million is None


def at(n: int, goodput: float) -> Point:
    return Point("r", n, goodput, 0, 0, 0, 0, 0, 1, 1, 1, 1)


@pytest.mark.parametrize("needed", [1, 2, 3, 7, 8, 9, 63, 64, 65, 999, 1000])
def test_the_search_finds_the_border(needed: int) -> None:
    asked: list[int] = []

    def goodput(n: int) -> Point:
        asked.append(n)
        return at(n, 0.9 if n == needed else n / (n + needed) + 0.4)

    found = search("r", goodput, 0.9, 1000)
    assert found.needed == needed
    assert needed == 1 or needed - 1 in asked
    assert len(asked) == len(set(asked)) <= 21
    assert search("r", lambda n: at(n, 0.9 * (n >= needed)), 0.9, needed).needed == needed
    assert needed == 1 or search("r", lambda n: at(n, 0.9 * (n >= needed)), 0.9, needed - 1).needed is None


def test_more_replicas_are_needed_for_more_traffic_and_tighter_times() -> None:
    trace = "synthetic:rate=60,input=200-600,output=10-40,shared=64,groups=3,n=150,seed=1"

    def needed(scale: float, ttft: float) -> int:
        def one(n: int) -> Point:
            done = simulate(requests, limits(), SIMPLE, replicas=n, router="least-loaded", request_level=True)
            return point(done, "least-loaded", slo)

        requests, slo = load(trace, scale=scale), Slo(ttft=ttft, share=0.9)
        return search("least-loaded", one, slo.share, 200).needed or 1000

    counts = [needed(scale, 0.03) for scale in (0.5, 1, 2, 4)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] < 100
    assert needed(1, 0.015) >= needed(1, 0.03) >= needed(1, 0.3)


def test_no_fleet_beats_the_best_case() -> None:
    requests = load("synthetic:rate=20,input=10-900,output=1-40,shared=64,groups=3,n=100,seed=1")
    for ttft in (0.004, 0.006, 0.01):
        slo = Slo(ttft=ttft, itl=0.0012)
        best = best_case(requests, limits(), SIMPLE, slo)
        for n in (1, 4, 64):
            done = simulate(requests, limits(), SIMPLE, replicas=n, router="exact", request_level=True)
            assert within(done, slo).mean() <= best


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("ttft=500ms", (0.5, 0.9)), ("ttft=0.5s,share=0.99", (0.5, 0.99)), ("share=1, ttft=20us", (2e-5, 1.0))],
)
def test_an_slo_is_read_with_its_units(text: str, seconds: tuple[float, float]) -> None:
    assert (parse_slo(text).ttft, parse_slo(text).share) == pytest.approx(seconds)


SLO = ["--slo", "ttft=1s"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        *((["--slo", text], "--slo") for text in ("ttft", "ttft=fast", "ttft=5", "ttft=-1s", "speed=1s", "share=0.9", "")),
        *((["--slo", text], "--slo") for text in ("ttft=1s,share=90", "ttft=1s,share=0", "ttft=nans", "ttft=1s,share=0.9ms")),
        ([*SLO, "--routers", "magic"], "--routers"),
        ([*SLO, "--routers", ""], "--routers"),
        ([*SLO, "--max-replicas", "0"], "--max-replicas"),
        ([*SLO, "--max-replicas", "1001"], "--max-replicas"),
        ([*SLO, "--price-per-hour", "-1"], "--price-per-hour"),
        ([*SLO, "--replicas", "0"], "--replicas"),
        ([*SLO, "--pool-tokens", "3"], "--kv-tokens"),
        ([*SLO, "--rate-scale", "0"], "--scale"),
        ([*SLO, "--compare"], "--compare"),
        ([*SLO, "--itl-target-ms", "5"], "--itl-target-ms"),
        ([*SLO, "--plot", "x.png"], "--plot"),
        ([*SLO, "--plot", "/nowhere/x.svg"], "--plot"),
        (["--price-per-hour", "2"], "--price-per-hour"),
        (["--routers", "exact"], "--routers belongs to a capacity plan"),
        ([*SLO, "--router", "exact"], "with --slo write --routers exact"),
        (["--slo", "ttft=1s,ttft=2s"], "ttft is there twice"),
        (["--step-level"], "--step-level"),
        (["--hardware", "abacus"], "--hardware"),
        (["--slo", "ttft=1us"], "--slo"),
    ],
)
def test_a_bad_flag_of_a_plan_is_named(flags: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(["synthetic:n=3,output=2", *flags])


# ---------------- the command
def test_a_plan_is_a_sentence_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, picture = "synthetic:rate=30,n=60,shared=512,groups=6,input=50-300,output=5-20", tmp_path / "plan.svg"
    flags = ["--slo", "ttft=60ms,itl=8ms", "--price-per-hour", "3", "--max-replicas", "30", "--plot", str(picture)]
    texts = []
    for _ in range(2):
        assert run([trace, *flags]) == 0
        texts.append((capsys.readouterr().out, picture.read_text()))
    assert texts[0] == texts[1]
    out, svg = texts[0]
    assert re.match(r"\d+ replica\(s\) behind [a-z-]+ meet the SLO\n", out)
    names = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]
    assert names == ["router", "round-robin", "least-loaded", "cache-aware", "prefix", "exact"]
    assert "per M output" in out
    assert 'data-name="one cache of the total size"' in svg
    assert run([trace, *flags[:2], "--routers", "exact", "--json", "--max-replicas", "30"]) == 0
    row = json.loads(capsys.readouterr().out)["routers"][0]
    assert next(p["replicas"] for p in row["points"] if p["goodput"] >= 0.9) == row["needed"]
    shown = re.findall(r'data-router="exact" data-replicas="(\d+)" data-value="([\d.]+)"', svg)[: len(row["points"])]
    assert shown == [(str(p["replicas"]), f"{p['goodput']:.4f}") for p in row["points"]]


def test_an_slo_that_no_number_meets_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["synthetic:rate=0,n=60,output=9", "--slo", "ttft=60ms", "--max-replicas", "2", "--routers", "exact"]) == 0
    assert capsys.readouterr().out.startswith("no router meets the SLO with 2 replica(s) or fewer\n")


def test_other_hardware_is_slower_as_its_data_sheet_says(capsys: pytest.CaptureFixture[str]) -> None:
    times = {}
    for name in ("h200", "a100"):
        assert (
            run(
                [
                    "synthetic:n=5,output=5,rate=0.001",
                    *SLO,
                    "--replicas",
                    "1",
                    "--hardware",
                    name,
                    "--routers",
                    "exact",
                    "--json",
                ]
            )
            == 0
        )
        times[name] = json.loads(capsys.readouterr().out)["routers"][0]["itl_ms"]
    step = PRESETS["llama-3.1-8b"].seconds(Work(decode_rows=1, decode_context=500, samples=1)) * 1e3
    assert times["h200"] == pytest.approx(step, rel=0.1)
    assert 1.8 < times["a100"] / times["h200"] < 4.8 / 2.039
