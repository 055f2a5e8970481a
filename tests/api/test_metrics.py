"""GET /metrics: our names, those of other engines, both formats, the processes, the page of the documentation."""

from __future__ import annotations

import asyncio
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import World, fake_config, prompt, talker
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_text
from test_server import ScriptedEngine, Server, ask

from minisgl.actors.messages import Started
from minisgl.api.engine import Chunk, TokenPrompt
from minisgl.api.http.exposition import ENDS, Exposition
from minisgl.api.http.metric_names import COUNTERS, GAUGES, HISTOGRAMS
from minisgl.api.http.metrics import E2E, Histogram, Metered, kv_shares, token_bounds
from minisgl.api.http.process_facts import Process, ProcessFacts, usage_of
from minisgl.api.in_process import InProcessSystem
from minisgl.config import Config, EngineConfig, ServerConfig
from minisgl.model.checkpoint.resolve import resolve
from minisgl.sampling_params import Finish, SamplingParams
from scripts.check import lines

ROOT = Path(__file__).parents[2]
OPEN = "application/openmetrics-text"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


# ---------------- a scrape of a working engine
async def _scrape() -> dict[str, tuple[int, Any, bytes]]:
    config = Config(resolve("fake"), EngineConfig(kv_tokens=256, max_running=2, step_tokens=64), ServerConfig())
    system = InProcessSystem(config)
    system.wait_ready()
    engine = Metered(system.gateway)
    engine.metrics.processes.processes = lambda: {"api": Process(os.getpid()), "worker0": Process(os.getpid(), 0.5)}
    http = Server(engine)  # type: ignore[arg-type]

    async def drive() -> None:
        while True:
            system.pump(0)
            await asyncio.sleep(0)

    driving = asyncio.create_task(drive())
    await http.start()
    try:
        for text in ("Hello, who are you? " * 3, "Hello, who are you? " * 3, "Something else", "abc " * 60):
            assert (await ask(http, "/v1/completions", {"prompt": text, "max_tokens": 5, "ignore_eos": True}))[0] == 200
        system.actors.run()  # the statistics of the last step
        accepts = {"text": "", "open": f"{OPEN}; version=1.0.0,text/plain;q=0.5"}
        return {name: await ask(http, "/metrics", method="GET", headers={"Accept": a}) for name, a in accepts.items()}
    finally:
        driving.cancel()
        await http.close()
        system.close()


@functools.cache
def scraped() -> Mapping[str, tuple[int, Any, bytes]]:
    return asyncio.run(_scrape())


def families(format: str = "text") -> dict[str, Any]:
    """Name of the samples (a counter's with _total) -> family, of the scrape above."""
    parse = parse_text if format == "text" else parse_open
    found = list(parse(scraped()[format][2].decode()))
    assert len({f.name for f in found}) == len(found)
    return {f"{f.name}_total" if f.type == "counter" else f.name: f for f in found}


def samples(format: str = "text") -> Samples:
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families(format).values() for s in f.samples}


def value(name: str, **labels: str) -> float:
    return samples()[name, tuple(sorted(labels.items()))]


VLLM = {"model_name": "fake", "engine": "0"}


def test_prometheus_client_reads_both_formats_back_and_they_say_the_same() -> None:
    (status, headers, _), (opened, open_headers, open_raw) = scraped()["text"], scraped()["open"]
    assert (status, opened) == (200, 200)
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert open_headers["Content-Type"].startswith(f"{OPEN}; version=1.0.0")
    assert open_raw.endswith(b"# EOF\n")
    assert families("open").keys() == families().keys()
    mine, other = samples(), samples("open")
    changing = {key for key in mine if key[0].startswith("minisgl_process") or key[0].startswith("minisgl_http_req")}
    assert {k: v for k, v in other.items() if k in mine and k not in changing} == {
        k: v for k, v in mine.items() if k not in changing
    }
    assert all(family.documentation for family in families().values())


@pytest.mark.parametrize("accept", ["", "*/*", "text/html", f"x{OPEN}", "a,,;=", "text/plain; version=abc; escaping=?"])
def test_whoever_does_not_ask_for_openmetrics_gets_the_text_format(accept: str) -> None:
    body, content_type = asyncio.run(Exposition(Metered(ScriptedEngine())).render(accept))
    assert content_type.startswith("text/plain; version=0.0.4")
    assert not body.endswith(b"# EOF\n")


@pytest.mark.parametrize(
    "accept", [f"{OPEN}; version=abc", f"{OPEN};version=9.9.9;escaping=none", OPEN.upper(), f"a/b,{OPEN};q=1"]
)
def test_openmetrics_is_version_one_whatever_version_is_asked_for(accept: str) -> None:
    body, content_type = asyncio.run(Exposition(Metered(ScriptedEngine())).render(accept))
    assert content_type.startswith(f"{OPEN}; version=1.0.0")
    assert list(parse_open(body.decode()))


# ---------------- the names of other engines
def test_every_alias_has_the_value_type_and_labels_of_the_fact_that_it_is() -> None:
    known = families()
    for suffix, rows in (("", GAUGES), ("_total", COUNTERS)):
        for row in rows:
            mine = known[f"minisgl_{row.name}{suffix}"]
            for alias in row.aliases:
                labels = VLLM if alias.startswith("vllm:") else {"model_name": "fake"}
                other = known[f"{alias}{suffix}"]
                assert other.type == mine.type
                assert [(s.labels, s.value) for s in other.samples] == [(labels, mine.samples[0].value)]
    assert value("vllm:prompt_tokens_total", **VLLM) > value("vllm:prompt_tokens_cached_total", **VLLM) > 0
    assert value("vllm:generation_tokens_total", **VLLM) == 20
    assert value("vllm:prefix_cache_hits_total", **VLLM) == value("minisgl_prefix_cache_hits_total") > 0
    assert sum(v for (name, _), v in samples().items() if name == "vllm:num_requests_waiting_by_reason") == 0


def test_requests_are_counted_by_how_they_ended_under_the_reasons_that_vllm_has() -> None:
    engine = Metered(ScriptedEngine())
    engine.metrics.finished.update({"stop": 3, "timeout": 2, "error": 1, "abort": 4})
    text = asyncio.run(Exposition(engine).render())[0].decode()
    found = {f.name: {s.labels["finished_reason"]: s.value for s in f.samples} for f in parse_text(text) if "success" in f.name}
    assert found["minisgl_request_success"] == {"stop": 3, "length": 0, "abort": 4, "timeout": 2, "error": 1}
    assert found["vllm:request_success"] == {"stop": 3, "length": 0, "abort": 4, "error": 3}
    reasons = {finish.reason for finish in Finish if finish.reason not in (None, "grammar")}  # that one is an error
    assert set(ENDS) == reasons | {"timeout", "error"}


def test_the_buckets_of_an_alias_are_the_other_engines_and_count_what_ours_count() -> None:
    known = families()
    for bars in HISTOGRAMS:
        mine = {s.labels["le"]: s.value for s in known[f"minisgl_{bars.name}"].samples if s.name.endswith("_bucket")}
        assert list(mine.values()) == sorted(mine.values())
        for alias, bounds in bars.aliases.items():
            got = known[alias]
            theirs = {s.labels["le"]: s.value for s in got.samples if s.name.endswith("_bucket")}
            expected = bounds or token_bounds(8192)
            assert [float(le) for le in theirs] == [*expected, float("inf")]
            assert theirs.items() <= mine.items()
            assert all("model_name" in s.labels for s in got.samples)
    assert "7680.0" in {s.labels.get("le") for s in known["vllm:request_decode_time_seconds"].samples}  # as theirs are written
    assert token_bounds(100) == (1, 2, 5, 10, 20, 50, 100)
    assert token_bounds(99) == (1, 2, 5, 10, 20, 50)


def test_a_histogram_says_how_many_are_at_most_each_of_some_bounds() -> None:
    histogram = Histogram((0.1, 0.2, *E2E))
    for seconds in (0.05, 0.1, 0.15, 0.3, 0.31, 9000.0):
        histogram.observe(seconds, 2)
    assert histogram.at_most((0.1, 0.3)) == [4, 8, 12]
    assert histogram.at_most(E2E)[:2] == [8, 10]


def test_names_whose_values_nobody_knows_are_left_out() -> None:
    page = (ROOT / "docs/metrics.md").read_text()
    left_out = {name for row in lines.tables(page)["left out"] for name in re.findall(r"[\w:]+", row[0])}
    assert {"vllm:spec_decode_num_drafts_total", "vllm:kv_block_lifetime_seconds", "sglang:cache_hit_rate"} <= left_out
    assert not left_out & set(families())


# ---------------- what is measured
def test_the_phases_of_a_request_are_told_apart() -> None:
    async def scene() -> Metered:
        scripted = ScriptedEngine()
        scripted.stall = True
        engine = Metered(scripted)
        engine.open(TokenPrompt((1, 2, 3)), SamplingParams(), lambda item: None)
        await asyncio.sleep(0)
        scripted.live[0](Chunk("", (), Finish.NONE, 3, 2, queued=0.25, waited=0.5))  # a chunk without a token begins nothing
        scripted.live[0](Chunk("a", (1,), Finish.NONE, 3, 2, queued=0.25, waited=0.5))
        scripted.live[0](Chunk("b", (1, 2), Finish.STOP, 3, 2, queued=0.25, waited=0.5))
        return engine

    m = asyncio.run(scene()).metrics
    ttft, e2e = m.ttft.total, m.e2e.total
    assert (m.queue.total, m.prefill.total, m.inference.total) == (0.25, pytest.approx(ttft - 0.5), pytest.approx(e2e - 0.5))
    assert m.decode.total == pytest.approx(e2e - ttft) == pytest.approx(2 * m.tpot.total)
    assert (m.prompts.total, m.answers.total, m.prompt_tokens, m.cached_tokens) == (3, 3, 3, 2)
    for histogram in (m.ttft, m.queue, m.prefill, m.decode, m.inference, m.e2e, m.tpot, m.prompts, m.answers):
        assert sum(histogram.counts) == 1
    assert sum(m.itl.counts) == 2


def test_a_chunk_says_how_long_its_request_waited_from_its_opening_to_its_first_step() -> None:
    world = World(3, fake_config())
    took: list[Any] = []
    now = world.gateway.ctx.now()
    uid = world.gateway.open(TokenPrompt(tuple(prompt(5))), SamplingParams(max_tokens=2), took.append)
    entry = world.gateway._ledger[uid]
    assert entry.began == now
    entry.began -= 2.0
    world.system.run()
    assert all(isinstance(chunk, Chunk) and chunk.waited >= 2.0 for chunk in took)
    assert all(chunk.queued <= chunk.waited for chunk in took)
    world.close()


def test_a_request_that_runs_again_keeps_the_time_that_it_waited_at_first() -> None:
    world = World(3, fake_config())
    uid = world.gateway.open(TokenPrompt(tuple(talker(5, 8))), SamplingParams(max_tokens=8), lambda item: None)
    entry = world.gateway._ledger[uid]
    while not entry.delivered:
        world.system.step()
    waited, entry.began = entry.waited, entry.began - 60
    world.gateway.receive(Started(entry.name, 0.5))
    assert entry.waited == waited
    world.close()


def test_the_pages_that_a_running_request_shares_with_the_cache_are_in_use() -> None:
    """A prompt is in the prefix cache as soon as it is computed; its pages are free for others only when nobody needs them."""
    world = World(None, fake_config(tp=1, kv_tokens=80, page_size=4))
    world.gateway.open(TokenPrompt(tuple(talker(40, 8))), SamplingParams(max_tokens=8), lambda item: None)
    machine, seen = world.machine, []
    while world.gateway.open_requests:
        world.system.step()
        if len(machine.running) and machine.cache.num_pages >= 10:
            seen.append(kv_shares(machine.stats())[1])
    assert seen
    assert min(seen) >= 0.5
    world.system.run()
    filled, used = kv_shares(machine.stats())
    assert (filled > 0.5, used) == (True, 0)
    world.close()


def test_those_that_wait_for_a_prefix_or_a_grammar_do_not_wait_for_room() -> None:
    engine = ScriptedEngine()
    engine.stats = {"waiting_requests": 7, "following_requests": 2, "compiling_requests": 3}
    text = asyncio.run(Exposition(Metered(engine)).render())[0].decode()
    found = {f.name: [s.value for s in f.samples] for f in parse_text(text)}
    assert found["vllm:num_requests_waiting_by_reason"] == [5, 5]
    assert found["vllm:num_requests_waiting"] == found["minisgl_num_requests_waiting"] == [10]


def test_requests_that_wait_for_a_prefix_that_is_computed_are_counted() -> None:
    world = World(None, fake_config(tp=1, step_tokens=9, max_running=4))
    for _ in range(3):
        world.submit(prompt(24), 2)
    seen = set()
    while world.gateway.open_requests:
        world.system.step()
        stats = world.machine.stats()
        assert stats["following_requests"] <= stats["waiting_requests"]
        seen.add(stats["following_requests"])
    assert 2 in seen
    assert world.machine.stats()["following_requests"] == 0
    world.close()


# ---------------- processes
def test_processes_are_described_by_what_the_kernel_counts() -> None:
    usage = usage_of(os.getpid())
    assert usage is not None
    assert usage.cpu_seconds > 0.1
    assert usage.memory > 10_000_000
    assert usage.threads >= 1
    assert usage.descriptors is not None
    assert usage.descriptors >= 3
    assert value("minisgl_process_heartbeat_age_seconds", process="worker0") == 0.5
    assert ("minisgl_process_heartbeat_age_seconds", (("process", "api"),)) not in samples()
    for name in ("cpu_seconds_total", "resident_memory_bytes", "threads", "open_fds"):
        assert value(f"minisgl_process_{name}", process="api") > 0
        assert value(f"minisgl_process_{name}", process="worker0") > 0


STAT = "17 ({}) {} 1 17 17 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 5 0 100 1000000 300 18446744073709551615 1"


@pytest.mark.parametrize("name", ["minisgl::api", "a) R (b", "", "x y"])
def test_a_process_may_have_any_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "17").mkdir()
    (tmp_path / "17/stat").write_text(STAT.format(name, "S"))
    usage = usage_of(17, str(tmp_path))
    assert usage == (300 / os.sysconf("SC_CLK_TCK"), 300 * os.sysconf("SC_PAGE_SIZE"), 5, None)


@pytest.mark.parametrize("stat", [None, "", "17 (x) Z 1", STAT.format("x", "Z")])
def test_a_process_that_has_ended_takes_nothing(stat: str | None, tmp_path: Path) -> None:
    (tmp_path / "17").mkdir()
    if stat is not None:
        (tmp_path / "17/stat").write_text(stat)
    assert usage_of(17, str(tmp_path)) is None
    assert usage_of(18, str(tmp_path)) is None


def test_the_kernel_is_asked_at_most_once_a_second() -> None:
    now, asked = [5.0], []
    facts = ProcessFacts(lambda: now[0])
    facts.processes = lambda: asked.append(now[0]) or {"api": Process(os.getpid()), "gone": Process(1 << 30)}  # type: ignore[func-returns-value]
    for at in (5.0, 5.5, 5.99, 6.0, 6.5, 9.0):
        now[0] = at
        assert list(facts.read()) == ["api"]
    assert asked == [5.0, 6.0, 9.0]


# ---------------- the page of the documentation
def test_the_page_about_metrics_has_every_name_with_its_type_labels_and_meaning() -> None:
    rows = {row[0].strip("`"): row[1:] for row in lines.tables((ROOT / "docs/metrics.md").read_text())["metric"]}
    known = families()
    aliases: dict[str, set[str]] = {}
    for name, family in known.items():
        if family.documentation.startswith("As "):
            of = family.documentation.removeprefix("As ").removesuffix(".")
            aliases.setdefault(of, set()).add(name)
    ours = {name for name, family in known.items() if not family.documentation.startswith("As ")}
    assert set(rows) == ours | {"minisgl_otel_spans_total"}
    for name in ours:
        kind, labels, meaning, others = rows[name]
        family = known[name]
        found = {label for s in family.samples for label in s.labels} - {"le"}
        assert (kind, set(labels.split())) == (family.type, found), name
        assert meaning == family.documentation, name
        assert set(others.replace("`", "").split()) == aliases.get(name.removesuffix("_total"), set()), name


def test_every_count_is_drawn_from_the_facts_of_a_scrape_and_none_is_kept_twice() -> None:
    """Nothing in a chunk's way is counted under a second name: aliases are made when somebody reads."""
    engine = Metered(ScriptedEngine())
    before = vars(engine.metrics).keys()
    asyncio.run(Exposition(engine).render())
    assert vars(engine.metrics).keys() == before
    assert len(before) < 25
