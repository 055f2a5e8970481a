"""The simulator: traces, costs and the ideal against brute force; whole runs of the real scheduler under virtual time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minisgl.actors.scheduler.interface import SchedulerLimits
from minisgl.cache.no_cache import NoCache
from minisgl.cache.radix import RadixCache
from minisgl.commands.simulate import run
from minisgl.errors import UserError
from minisgl.sampling_params import Finish
from minisgl.simulation import plots
from minisgl.simulation.fleet import Run, simulate
from minisgl.simulation.gpu import PRESETS, FittedCosts, Work, fit, read_costs
from minisgl.simulation.policies import POLICIES
from minisgl.simulation.report import gaps, summarise, ttft
from minisgl.simulation.router import Fleet, prefix
from minisgl.simulation.trace import BLOCK, FIRST_PROMPT_TOKEN, TraceRequest, ideal_hits, load

SIMPLE = FittedCosts(1e-3, 1e-5, 1e-5, 1e-8)


def limits(**changes: object) -> SchedulerLimits:
    settings = {
        "slots": 16,
        "num_pages": 512,
        "page_size": 16,
        "max_context": 4096,
        "step_tokens": 256,
        "max_steps_in_flight": 2,
    }
    return SchedulerLimits(**{**settings, "vocab_size": FIRST_PROMPT_TOKEN, **changes})


def mooncake(path: Path, rows: list[tuple[int, int, int, list[int]]]) -> str:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows) + "\n")
    return str(path)


def conversations(path: Path, n: int, seed: int = 0) -> str:
    """Like Mooncake's: one system block for all, conversations that come back with more blocks, a partial last block."""
    rng = np.random.default_rng(seed)
    talks: list[list[int]] = []
    rows = []
    fresh = 1
    for i in range(n):
        if not talks or rng.random() < 0.4:
            talks.append([0])
        talk = talks[int(rng.integers(len(talks)))]
        more = int(rng.integers(1, 4))
        talk.extend(range(fresh, fresh + more))
        fresh += more + 1
        blocks = [*talk, fresh - 1]
        rows.append((i * 400, BLOCK * len(talk) + int(rng.integers(1, BLOCK)), int(rng.integers(1, 40)), blocks))
    return mooncake(path, rows)


# ---------------- traces
def test_equal_hash_ids_give_equal_prefixes_and_different_ones_share_nothing(tmp_path: Path) -> None:
    path = mooncake(tmp_path / "t.jsonl", [(0, 1100, 5, [7, 10**12, 9]), (500, 1300, 6, [7, 10**12, 8]), (900, 600, 1, [1, 9])])
    a, b, c = (r.ids() for r in load(path))
    assert [len(a), len(b), len(c)] == [1100, 1300, 600]
    assert (a[:1024] == b[:1024]).all()
    assert not set(a[1024:].tolist()) & set(b[1024:].tolist())
    assert (a[1024:] == c[512:588]).all()
    assert a.dtype == np.int32
    assert a.min() >= FIRST_PROMPT_TOKEN


def test_arrivals_start_at_zero_and_limit_duration_and_scale_apply(tmp_path: Path) -> None:
    path = mooncake(tmp_path / "t.jsonl", [(1000 * t, 10, 1, [t]) for t in (5, 6, 8, 20)])
    assert [r.arrival for r in load(path)] == [0, 1, 3, 15]
    assert [r.arrival for r in load(path, scale=2)] == [0, 0.5, 1.5, 7.5]
    assert [r.arrival for r in load(path, duration=3, scale=2)] == [0, 0.5, 1.5]
    assert [r.arrival for r in load(path, limit=1)] == [0]


def test_an_azure_file_is_read_to_its_seventh_decimal_and_shares_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(
        b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:59:59.5000000,374,44\r\n2023-11-16 19:00:01,374,109\r\n"
    )
    a, b = load(str(path))
    assert b.arrival == pytest.approx(1.5)
    assert (a.input, a.output, b.output) == (374, 44, 109)
    assert ideal_hits([a, b], 16).sum() == 0


GOOD = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", GOOD + "{", "line 2: not JSON"),
        ("t.jsonl", GOOD + "[]", "line 2: an object with"),
        ("t.jsonl", GOOD + '{"timestamp": 0, "input_length": 600}', "line 2.*output_length is missing"),
        ("t.jsonl", GOOD.replace("600", "513.5"), "line 1: input_length"),
        ("t.jsonl", GOOD.replace("600", "true"), "line 1: input_length"),
        ("t.jsonl", GOOD.replace("5,", "0,"), "line 1: output_length"),
        ("t.jsonl", GOOD + GOOD.replace("[1, 2]", "[1]"), "line 2: hash_ids must hold 2"),
        ("t.jsonl", GOOD.replace(": 0", ': "now"'), "line 1: timestamp"),
        ("t.jsonl", "\n", "no requests"),
        ("t.csv", "when,what\n", "line 1: the header"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,5\n", "line 2: a time and two"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,5,5\n", "line 2: a time and two"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,5,0\n", "line 2: GeneratedTokens"),
        ("t.txt", GOOD, "a trace is a .jsonl"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / name))


@pytest.mark.parametrize("spec", ["rate=fast", "input=9-3", "input=0", "n=0", "colour=red", "seed=-1"])
def test_a_bad_synthetic_trace_names_the_setting(spec: str) -> None:
    with pytest.raises(UserError, match=spec.partition("=")[0]):
        load(f"synthetic:{spec}")


def test_a_missing_file_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl: cannot be read"):
        load("nowhere.jsonl")


def test_synthetic_arrivals_have_the_rate_and_the_lengths() -> None:
    requests = load("synthetic:rate=5,input=10-20,output=3-4,shared=32,groups=2,n=2000,seed=3")
    assert 2000 / requests[-1].arrival == pytest.approx(5, rel=0.1)
    assert {r.input - 32 for r in requests} == set(range(10, 21))
    assert {r.output for r in requests} == {3, 4}
    assert len({int(r.ids()[31]) for r in requests}) == 2
    assert len({int(r.ids()[32]) for r in requests}) == 2000


# ---------------- the ideal
def brute_force_hits(requests: list[TraceRequest], size: int) -> list[int]:
    seen: set[tuple[int, ...]] = set()
    hits = []
    for request in requests:
        ids = request.ids().tolist()
        prefixes = [tuple(ids[:at]) for at in range(size, len(ids) + 1, size)]
        n = 0
        while n < len(prefixes) and prefixes[n] in seen and len(prefixes[n]) < len(ids):
            n += 1
        hits.append(n * size)
        seen.update(prefixes)
    return hits


@pytest.mark.parametrize("page_size", [1, 3, 16, 48])
def test_the_ideal_is_that_of_a_brute_force_cache(tmp_path: Path, page_size: int) -> None:
    rng = np.random.default_rng(page_size)
    requests = []
    for _ in range(150):
        n = int(rng.integers(1, 5))
        tokens, counts = rng.integers(0, 2, n), rng.integers(1, 12, n)
        tokens = (np.arange(n) * 2 + tokens).astype(np.int32)  # neighbours differ, as blocks do
        requests.append(TraceRequest(0.0, 1, tokens, counts.astype(np.int32)))
    expected = brute_force_hits(requests, page_size)
    assert ideal_hits(requests, page_size).tolist() == expected
    assert page_size > 16 or sum(expected) > 0
    few = load(conversations(tmp_path / "t.jsonl", 12))
    assert page_size < 16 or ideal_hits(few, page_size).tolist() == brute_force_hits(few, page_size)


# ---------------- runs
def finished(result: Run, requests: list[TraceRequest]) -> None:
    assert result.log.tokens.tolist() == [r.output for r in requests]
    assert set(result.log.finish.tolist()) == {Finish.LENGTH}
    for replica in result.replicas:
        replica.machine.check()
        assert replica.machine.idle


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_steps_in_flight": 1},
        {"cache": NoCache},
        {"order": "arrival", "wait_for_shared_prefix": False},
        {"num_pages": 64, "max_context": 1024},
        {"itl_target": 2e-3},
    ],
)
def test_every_request_ends_with_its_length_and_no_page_is_lost(changes: dict[str, object]) -> None:
    requests = load("synthetic:rate=40,input=10-600,output=1-80,shared=64,groups=3,n=150,seed=1")
    result = simulate(requests, limits(**changes), SIMPLE)
    finished(result, requests)
    s = summarise(result)
    assert s["output_tokens"] == sum(r.output for r in requests)
    assert len(gaps(result)) == s["output_tokens"] - len(requests)
    assert gaps(result).min() > 0
    assert ttft(result).min() > SIMPLE.c0
    assert s["starved_steps"] == 0
    assert 0 < s["gpu_busy"] <= 1
    assert s["kv_active_max"] <= s["kv_used_max"] <= 1
    if changes.get("num_pages") == 64:
        assert s["retractions"] + s["queue_max"] > 0
    if changes.get("cache") is NoCache:
        assert s["hit_rate"] == 0


def test_one_request_alone_takes_the_time_of_its_steps() -> None:
    """256 + 44 prompt tokens in two steps, then one step a token; with lag 1 the scheduler stands between all of them."""
    request = load("synthetic:input=300,output=4,n=1")
    costs = FittedCosts(1e-3, 1e-5, 0, 0)
    for lag, waits in ((1, 2), (2, 1)):
        result = simulate(request, limits(max_steps_in_flight=lag), costs, latency=1e-4)
        assert ttft(result)[0] == pytest.approx(2e-3 + 300e-5 + waits * 1e-4)
        assert gaps(result) == pytest.approx([1e-3 + (1e-4 if lag == 1 else 0)] * 3)


def test_the_same_trace_gives_the_same_numbers() -> None:
    one, two = (
        summarise(simulate(load("synthetic:rate=20,output=5-50,n=60,shared=100,seed=5"), limits(), SIMPLE, replicas=2))
        for _ in range(2)
    )
    assert one == two
    other = summarise(simulate(load("synthetic:rate=20,output=5-50,n=60,shared=100,seed=6"), limits(), SIMPLE, replicas=2))
    assert other != one


def test_a_roomy_cache_comes_within_three_points_of_the_ideal(tmp_path: Path) -> None:
    requests = load(conversations(tmp_path / "t.jsonl", 120))
    longest = max(r.input + r.output for r in requests)
    result = simulate(requests, limits(num_pages=40_000, max_context=longest, step_tokens=2048), SIMPLE)
    finished(result, requests)
    s = summarise(result)
    assert s["ideal_hit_rate"] > 0.3
    assert s["ideal_hit_rate"] - 0.03 <= s["hit_rate"] <= s["ideal_hit_rate"] + 0.001


def test_a_request_that_never_fits_is_refused_and_the_others_go_on() -> None:
    requests = load("synthetic:input=100-900,output=5,n=40")
    result = simulate(requests, limits(num_pages=32, max_context=4096), SIMPLE)
    too_long = [i for i, r in enumerate(requests) if r.input + r.output > 32 * 16]
    assert result.refused.tolist() == too_long
    assert len(too_long) > 0
    assert summarise(result)["requests"] == 40 - len(too_long)


def test_a_cache_hit_shortens_the_wait_for_the_first_token() -> None:
    requests = load("synthetic:rate=2,input=50,output=5,shared=2000,n=40")
    times = [summarise(simulate(requests, limits(cache=c), SIMPLE))["ttft_ms_p50"] for c in (RadixCache, NoCache)]
    assert times[0] < 0.3 * times[1]


# ---------------- fleets
def test_the_prefix_router_finds_more_than_round_robin() -> None:
    requests = load("synthetic:rate=20,input=50-200,output=5-30,shared=1024,groups=12,n=240")
    rates = {}
    for router in ("prefix", "round-robin"):
        result = simulate(requests, limits(num_pages=400), SIMPLE, replicas=4, router=router)
        finished(result, requests)
        assert min(r.requests for r in result.replicas) > 20  # prefixes do not pile everything on one
        rates[router] = summarise(result)["hit_rate"]
    assert rates["prefix"] > rates["round-robin"] + 0.1


def test_a_busy_replica_loses_to_an_idle_one_in_spite_of_its_prefix() -> None:
    router = Fleet(prefix, 2, 1 << 20)
    prompt = np.arange(1000, dtype=np.int32)
    assert router.route(0, prompt) == 0
    router.started(0)
    assert router.route(1, prompt) == 0  # 232 tokens are missing there, and one request is open; 1000 are missing elsewhere
    routes = [router.route(uid, prompt) for uid in range(2, 8)]
    assert routes[:2] == [0, 0]
    assert 1 in routes
    router.finished(7)
    for uid in range(7):
        router.started(uid)
        router.finished(uid)
    assert router.route(8, prompt) == 0
    assert router.route(9, np.arange(5000, 6000, dtype=np.int32)) == 1


# ---------------- costs
def test_the_fit_recovers_planted_coefficients() -> None:
    rng = np.random.default_rng(0)
    planted = FittedCosts(2e-3, 3e-5, 4e-5, 2e-8, 1e-9)
    works = [
        Work(int(p), int(p * (p + 1) // 2 + p * c), int(p + c), int(d), int(d * x), int(d))
        for p, c, d, x in rng.integers((0, 0, 0, 10), (2048, 3000, 64, 2000), (200, 4))
    ]
    found = fit(works, [planted.seconds(w) * (1 + 0.002 * float(rng.standard_normal())) for w in works])
    for name in ("c0", "c1", "c2", "c3", "c4"):
        assert getattr(found, name) == pytest.approx(getattr(planted, name), rel=0.1), name


def test_a_fit_has_no_negative_coefficients() -> None:
    works = [Work(prefill_tokens=n, decode_rows=d) for n in (0, 10, 20) for d in (1, 2, 3)]
    found = fit(works, [1e-3 + 1e-5 * w.prefill_tokens - 1e-5 * w.decode_rows for w in works])
    assert found.c2 == 0
    assert found.c1 == pytest.approx(1e-5)


def test_fitted_costs_survive_their_file_and_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(SIMPLE.to_json())
    assert read_costs(str(path)) == SIMPLE
    for text in ("{", "[]", '{"c0": 1}', '{"c0": 1, "c1": -1, "c2": 0, "c3": 0}', '{"c0": 0, "c1": 0, "c2": 0, "c3": 0}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"--cost-json .*costs\.json"):
            read_costs(str(path))


def test_a_roofline_is_bandwidth_for_one_row_and_arithmetic_for_many() -> None:
    model = PRESETS["llama-3.1-8b"]
    assert model.layer_params + 2 * model.spec.hidden_size * model.spec.vocab_size == pytest.approx(8.03e9, rel=0.01)
    one = model.seconds(Work(decode_rows=1, decode_context=100, samples=1))
    eight = model.seconds(Work(decode_rows=8, decode_context=800, samples=8))
    assert one == pytest.approx(eight, rel=0.02)
    assert model.seconds(Work(prefill_tokens=8192)) == pytest.approx(2 * model.seconds(Work(prefill_tokens=4096)), rel=0.02)


# ---------------- the command
def test_compare_prints_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["synthetic:rate=50,n=30,shared=64,input=50-300,output=5-20", "--step-tokens", "1024", "--compare"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if not line.startswith("|-")] == ["policy", *POLICIES]


def test_every_policy_changes_at_most_one_thing_and_something_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    base = limits(itl_target=0.01)
    for name, policy in POLICIES.items():
        changed = [f for f in SchedulerLimits.__slots__ if getattr(policy(base), f) != getattr(base, f)]
        assert len(changed) <= 1, name
    assert run(["synthetic:n=5", "--compare", "cache=none,lag=1", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["policy"] for r in rows] == ["cache=none", "lag=1"]


def test_kv_tokens_that_are_no_whole_pages_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["synthetic:n=5", "--kv-tokens", "9999", "--page-size", "16"]) == 0
    assert capsys.readouterr().err == "minisgl simulate: --kv-tokens 9999: 9984 is served, in whole pages of 16 tokens\n"
    assert run(["synthetic:n=5", "--kv-tokens", "9984", "--page-size", "16"]) == 0
    assert capsys.readouterr().err == ""


def test_json_is_one_line_with_every_metric(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["synthetic:n=20,shared=100", "--json", "--gpu", "qwen3-0.6b", "--replicas", "2"]) == 0
    row = json.loads(capsys.readouterr().out)
    for name in ("ttft_ms_p99", "itl_ms_p50", "queue_max", "kv_used_mean", "hit_rate", "ideal_hit_rate", "output_tok_s"):
        assert row[name] >= 0, name
    assert row["requests"] == 20


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--scale", "0"], "--scale"),
        (["--gpu", "abacus"], "--gpu"),
        (["--compare", "magic"], "magic"),
        (["--step-tokens", "256"], "--step-tokens"),
        (["--kv-tokens", "3"], "--kv-tokens"),
        (["--compare", "--plot", "x.png"], "--plot"),
    ],
)
def test_a_bad_flag_is_named(flags: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(["synthetic:n=5", *flags])


def test_without_matplotlib_plot_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        run(["synthetic:n=5", "--plot", "x.png"])


def test_a_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = simulate(load("synthetic:n=20,shared=100"), limits(), SIMPLE, replicas=2)
    plots.plot(result, str(tmp_path / "run.png"), "a run")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_help_and_errors_need_neither_torch_nor_matplotlib() -> None:
    code = "import sys; from minisgl.__main__ import main; rc = main(['simulate', 'nowhere.csv'])\n"
    code += "assert not {'torch', 'matplotlib', 'transformers'} & set(sys.modules); sys.exit(rc)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("minisgl: nowhere.csv")
