"""The runner: slots and plans, sampling through them, memory, and tensor-parallel ranks in real processes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import LLAMA3_ROPE, Driver, config_for, save_llama, save_qwen3

from minisgl.actors.spawn import make_runner
from minisgl.config import Config, EngineConfig
from minisgl.errors import UserError
from minisgl.model.common.host import (
    MAX_KV_TOKENS,
    SPIN_COUNT,
    available_bytes,
    prepare_environment,
    threads_per_rank,
    usable_cores,
)
from minisgl.model.common.slots import SlotState
from minisgl.model.cpu import runner as runner_module
from minisgl.plan import StepPlan

PROMPTS = [[int(t) for t in np.random.default_rng(i).integers(3, 203, 5 + 9 * i)] for i in range(4)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_llama(path, rope=LLAMA3_ROPE)
    return path


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    save_qwen3(path)
    return path


def make(checkpoint, **engine):
    config = config_for(checkpoint, **engine)
    runner = make_runner(config, 0, "")
    runner.allocate(runner.max_pages())
    return runner, Driver(runner.max_pages(), config.engine.page_size)


def tokens_of(runner, plan) -> list[int]:
    pending = runner.launch(plan)
    assert pending.done()
    assert pending.result().step == plan.step
    return pending.result().tokens.tolist()


# ---------------------------------------------------------------- slots
def test_a_batch_lays_out_its_rows_as_the_plan_says():
    state, driver = SlotState(8, 64, 4), Driver(40, 4)
    driver.join(2, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, seed=(1 << 64) - 1)
    driver.join(5)
    first = state.apply(driver.plan(prefill=[(2, [10, 11, 12], True), (5, [20, 21, 22, 23, 24, 25], False)]))
    assert first.ids.tolist() == [10, 11, 12, 20, 21, 22, 23, 24, 25]
    assert first.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    pages2, pages5 = driver.pages[2], driver.pages[5]
    assert first.kv_index.tolist() == [pages2[0] * 4 + i for i in range(3)] + [pages5[i // 4] * 4 + i % 4 for i in range(6)]
    assert first.sample_rows.tolist() == [2]
    assert first.sample_slots.tolist() == [2]
    assert first.sampling.positions.tolist() == [3]
    assert (first.sampling.top_k[0], first.sampling.seed[0]) == (7, (1 << 64) - 1)
    state.advance(first, np.array([77], np.int32))

    driver.join(6)
    second = state.apply(driver.plan(prefill=[(5, [26], True), (6, [30], True)], decode=[2]))
    assert second.ids.tolist() == [26, 30, 77]
    assert second.positions.tolist() == [6, 0, 3]
    assert second.kv_lens.tolist() == [7, 1, 4]
    assert second.sample_slots.tolist() == [5, 6, 2]
    state.advance(second, np.array([1, 2, 3], np.int32))

    third = state.apply(driver.plan(decode=[6, 5, 2]))
    fourth = state.apply(driver.plan(decode=None, same=[6, 5, 2]))
    assert third.ids.tolist() == [1, 3, 2]  # laid out longest first
    assert third.ids[third.sample_rows].tolist() == [2, 1, 3]  # and sampled in the order of the plan
    assert fourth.sample_slots.tolist() == [6, 5, 2]
    assert fourth.positions[fourth.sample_rows].tolist() == [2, 8, 5]


def test_a_join_forgets_everything_about_the_former_owner():
    state, driver = SlotState(4, 64, 4), Driver(40, 4)
    driver.join(0, temperature=1.0, top_p=0.5, seed=9)
    state.advance(state.apply(driver.plan(prefill=[(0, list(range(10)), True)])), np.array([5], np.int32))
    driver.join(0)
    batch = state.apply(driver.plan(prefill=[(0, [1], True)]))
    assert batch.positions.tolist() == [0]
    assert batch.pages.tolist() == [driver.pages[0]]
    assert (batch.sampling.temperature[0], batch.sampling.top_p[0], batch.sampling.seed[0]) == (0, 1, 0)


def test_a_plan_of_joins_and_grants_alone_samples_nothing(checkpoint):
    runner, driver = make(checkpoint)
    driver.join(0)
    assert tokens_of(runner, driver.plan()) == []
    assert tokens_of(runner, StepPlan(9, decode=None)) == []


# ---------------------------------------------------------------- sampling
def test_a_seeded_request_gets_the_same_tokens_alone_and_in_a_crowd(checkpoint):
    params = {"temperature": 0.9, "top_p": 0.95, "seed": 1234}

    def run(crowd: list[int], slot: int, page_seed: int) -> list[int]:
        runner, driver = make(checkpoint)
        driver.free = list(np.random.default_rng(page_seed).permutation(driver.free))
        driver.join(slot, **params)
        for other in crowd:
            driver.join(other, temperature=1.0, seed=other)
        rows = [(slot, PROMPTS[1], True), *((o, PROMPTS[2], True) for o in crowd)]
        got = tokens_of(runner, driver.plan(prefill=rows))[:1]
        batch = [*crowd, slot]
        for _ in range(10):
            got.append(tokens_of(runner, driver.plan(decode=batch))[-1])
        return got

    alone = run([], 3, 0)
    assert alone == run([0, 1, 2, 7], 5, 1)
    assert len(set(alone)) > 3


# ---------------------------------------------------------------- memory and threads
def test_kv_tokens_are_rounded_up_to_pages(checkpoint):
    assert make_runner(config_for(checkpoint, kv_tokens=33, page_size=4), 0, "").max_pages() == 9


@pytest.mark.parametrize(
    ("free", "engine", "pages"),
    [
        (1 << 50, {"max_running": 8, "max_context": 128}, 8 * 128 // 4),  # what the slots can use
        (1 << 50, {"max_running": 4096, "max_context": 256, "step_tokens": 8192}, MAX_KV_TOKENS // 4),  # the limit of a CPU
        (3072 * 100, {"memory_fraction": 0.5}, 50),  # 2 layers x 2 x 3 heads x 16 x 4 bytes x 4 tokens = 3 KiB a page
        (3072 * 100 - 1, {"memory_fraction": 0.5}, 49),
    ],
)
def test_without_kv_tokens_the_cache_takes_its_share_of_free_memory(free, engine, pages, checkpoint, monkeypatch):
    monkeypatch.setattr(runner_module, "available_bytes", lambda: free)
    assert make_runner(config_for(checkpoint, kv_tokens=0, **engine), 0, "").max_pages() == pages


def test_a_machine_without_room_for_one_page_is_told_so(checkpoint, monkeypatch):
    monkeypatch.setattr(runner_module, "available_bytes", lambda: 3000)
    with pytest.raises(UserError, match="no memory for the KV cache"):
        make_runner(config_for(checkpoint, kv_tokens=0), 0, "").max_pages()


def fake_root(tmp_path, files: dict[str, str]):
    for name, text in {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8000 * 1024),
        ({"proc/self/cgroup": "0::/\n"}, 8000 * 1024),
        (
            {  # the limit is set on the parent; its file cache does not count as used
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "1\n",
                "sys/fs/cgroup/a/b/memory.stat": "anon 1\n",
                "sys/fs/cgroup/a/memory.max": "5000000\n",
                "sys/fs/cgroup/a/memory.current": "3000000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 2\ninactive_file 1000000\n",
            },
            3_000_000,
        ),
        (
            {  # version 1, seen from inside a container
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/abc\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000000\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
            },
            3_000_000,
        ),
    ],
)
def test_free_memory_is_what_machine_and_control_groups_leave(files, free, tmp_path):
    assert available_bytes(fake_root(tmp_path, files)) == free


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 6),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 6),
        (  # the quota is the parent's; a part of a core is a core
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "150000 100000",
            },
            2,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "800000 100000\n"}, 6),
        (
            {  # version 1
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "20000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
    ],
)
def test_cores_are_those_of_the_affinity_within_the_quotas_of_control_groups(files, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert usable_cores(fake_root(tmp_path, files)) == cores


def test_threads_are_divided_over_the_ranks(monkeypatch):
    assert threads_per_rank(EngineConfig(threads=8, tp=3)) == 2
    assert threads_per_rank(EngineConfig(threads=1, tp=4)) == 1
    assert threads_per_rank(EngineConfig()) >= 1
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    prepare_environment(3)
    assert os.environ["OMP_NUM_THREADS"] == "7"  # the user's choice
    assert os.environ["GOMP_SPINCOUNT"] == str(SPIN_COUNT)


def test_launching_without_a_cache_is_a_bug_that_says_so(checkpoint):
    with pytest.raises(RuntimeError, match="allocate"):
        make_runner(config_for(checkpoint), 0, "").launch(StepPlan(1))


def test_half_precision_runs_and_agrees_roughly(checkpoint):
    def first(dtype: str) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        runner, driver = make(checkpoint, dtype=dtype)
        model = runner._model
        runner._model = lambda *args: seen.append(model(*args)) or seen[-1]
        driver.join(0)
        runner.launch(driver.plan(prefill=[(0, PROMPTS[3], True)]))
        runner.launch(driver.plan(decode=[0]))
        return seen

    full, half = first("float32"), first("bfloat16")
    assert half[0].dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(full[0], half[0].float()).item() > 0.99


# ---------------------------------------------------------------- tensor parallelism
Job = tuple[Config, str, list[bytes]]  # a model, the directory where its ranks meet, and packed plans


def digest(logits: torch.Tensor) -> str:
    """A pipe that nobody reads yet holds 64 KiB."""
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest()


def _rank(jobs: list[Job], rank: int, out: multiprocessing.SimpleQueue) -> None:
    """One worker process: run the plans of each model, report tokens and a digest of the logits of every step that sampled."""
    seen = []
    real = runner_module.sample
    runner_module.sample = lambda logits, rows: (seen.append(digest(logits)), real(logits, rows))[1]
    reports = []
    for config, run_dir, raw_plans in jobs:
        runner = make_runner(config, rank, run_dir)
        runner.allocate(runner.max_pages())
        results = [runner.launch(StepPlan.unpack(raw)).result() for raw in raw_plans]
        assert any(r.scores is not None for r in results) == (rank == 0)  # who publishes them computes them
        reports.append(([r.tokens.tolist() for r in results], seen[:]))
        seen.clear()
        runner.close()
    out.put((rank, reports))


def _plans(config: Config) -> list[bytes]:
    """Prompts in chunks beside decodes, greedy and sampled, plain and penalised, with a pause of sampling in between."""
    driver = Driver(config.engine.kv_tokens // config.engine.page_size, config.engine.page_size)
    extras: list[dict[str, Any]] = [
        {},
        {"repetition": 1.4, "frequency": 1.0, "prompt": PROMPTS[1]},
        {"presence": 1.5, "bias": [(7, 2.5, 0), (9, 0.0, 30)]},
        {"logprobs": 2},
    ]
    for slot in range(4):
        driver.join(slot, temperature=0.8 * (slot % 2), top_p=0.9, seed=slot, **extras[slot])
    plans = [
        driver.plan(prefill=[(3, PROMPTS[3][:20], False)]),
        driver.plan(prefill=[(0, PROMPTS[0], True), (1, PROMPTS[1], True)]),
        driver.plan(prefill=[(3, PROMPTS[3][20:], True), (2, PROMPTS[2], True)], decode=[1, 0]),
        driver.plan(decode=[0, 1, 2, 3]),
        *(driver.plan(decode=None, same=[0, 1, 2, 3]) for _ in range(3)),
    ]
    return [p.pack() for p in plans]


@pytest.mark.parametrize("tp", [2, 3])
def test_ranks_together_compute_what_one_rank_computes(tp, checkpoint, qwen3, tmp_path):
    jobs, expected = [], []
    for path in (checkpoint, qwen3):
        config = config_for(path)
        plans = _plans(config)
        alone = make_runner(config, 0, "")
        alone.allocate(alone.max_pages())
        expected.append([alone.launch(StepPlan.unpack(raw)).result().tokens.tolist() for raw in plans])
        run_dir = tmp_path / path.name
        run_dir.mkdir()
        jobs.append((replace(config, engine=replace(config.engine, tp=tp)), str(run_dir), plans))

    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(jobs, r, queue), daemon=True) for r in range(tp)]
    try:
        for p in ranks:
            p.start()
        for p in ranks:
            p.join(100)
        assert [p.exitcode for p in ranks] == [0] * tp
        reports = [report for _, report in sorted((queue.get() for _ in ranks), key=lambda r: r[0])]
    finally:
        for p in ranks:
            p.kill()
    for model, tokens in enumerate(expected):
        assert all(report[model][0] == tokens for report in reports)
        first = reports[0][model][1]
        for report in reports:  # bitwise the same logits on every rank, hence the same tokens
            assert report[model][1] == first != []
