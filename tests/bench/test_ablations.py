"""Each ablation switches off what it says, computes the same answers, and names code that exists."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import World

from minisgl.actors.scheduler.interface import SchedulerLimits
from minisgl.actors.scheduler.step_cost import features
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.bench.ablations import ABLATIONS, Setup, changed, variants
from minisgl.bench.machines import EarlyPlans, SeparateSteps, WholePrompts
from minisgl.bench.workload import jobs_of
from minisgl.config import AUTO_ITL, Config, EngineConfig
from minisgl.errors import UserError
from minisgl.model.checkpoint.resolve import fake_model
from minisgl.plan import StepPlan
from minisgl.sampling_params import Finish
from minisgl.simulation.trace import load
from scripts.check import lines

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"max_running": 6, "step_tokens": 48, "kv_tokens": 2048, "max_context": 512, "page_size": 4}
BASE = Setup(EngineConfig(**SMALL), 400, fake=True)
ON_A_CPU = ("overlap", "radix", "chunked", "mixed", "order", "share")


def test_every_ablation_names_code_that_exists() -> None:
    for name, ablation in ABLATIONS.items():
        module, _, symbol = ablation.where.partition(":")
        body = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text()).body
        for part in symbol.split("."):
            [found] = [n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
            body = found.body
        assert ablation.term, name
        assert ablation.off, name


def test_the_documents_have_the_table_of_the_code() -> None:
    rows = lines.tables((ROOT / "docs/ablations.md").read_text())["ablation"]
    assert [[cell.strip("`") for cell in row[:3]] for row in rows] == [[n, a.term, a.off] for n, a in ABLATIONS.items()]
    for row, ablation in zip(rows, ABLATIONS.values(), strict=True):
        module, _, symbol = ablation.where.partition(":")
        assert row[3] == f"[`{symbol}`](../{module.replace('.', '/')}.py)"


def test_a_machine_overrides_the_code_that_its_ablation_names() -> None:
    for name, machine in (("chunked", WholePrompts), ("mixed", SeparateSteps)):
        assert ABLATIONS[name].where.rpartition(".")[2] in vars(machine)
        assert ABLATIONS[name].change(BASE).edit.machine is machine
    assert ABLATIONS["just-in-time"].change(BASE).edit.machine is EarlyPlans


class Plans:
    """Watches the plans and the requests of a run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plans: list[StepPlan] = []
        self.most_in_flight = 0
        step = StepMachine.step

        def watched(machine: StepMachine, inbox: Any, now: float) -> Any:
            out = step(machine, inbox, now)
            if out.plan is not None:
                self.plans.append(out.plan)
                self.most_in_flight = max(self.most_in_flight, len(machine.inflight))
                self.machine = machine
                self.decodes.append(self._decodes(machine, out.plan))
            return out

        self.decodes: list[int] = []
        monkeypatch.setattr(StepMachine, "step", watched)

    @staticmethod
    def _decodes(machine: StepMachine, plan: StepPlan) -> int:
        drawing = int((plan.prefill["sample"] & 1).sum())
        return len(machine.inflight[-1].slots) - drawing


JOBS = jobs_of(load("synthetic:rate=0,n=24,input=3-300,output=1-20,shared=40,groups=3,seed=1"), 256, 512)


def answers(setup: Setup, jobs: Any = JOBS, seed: int | None = None) -> list[list[int]]:
    """Of all actors in one thread, with the scheduler of a setup; its books are checked at the end."""
    world = World(seed, Config(replace(fake_model(), max_context=512), setup.engine), setup.make_scheduler)
    uids = [world.submit(list(job.prompt), job.output, temperature=0, ignore_eos=True) for job in jobs]
    world.system.run()
    world.close()
    assert [world.ends[uid] for uid in uids] == [Finish.LENGTH] * len(jobs)
    return [world.answers[uid] for uid in uids]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return answers(BASE)


@pytest.mark.parametrize("name", ON_A_CPU)
def test_an_ablation_computes_the_same_answers_in_another_way(
    name: str, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, without = Plans(monkeypatch), None
    answers(BASE)
    monkeypatch.undo()
    without = Plans(monkeypatch)
    assert answers(ABLATIONS[name].change(BASE)) == expected
    both = {"usual": usual, "without": without}
    whole = {len(job.prompt) for job in JOBS}
    if name == "overlap":
        assert (usual.most_in_flight, without.most_in_flight) == (2, 1)
    if name == "radix":
        assert without.machine.counters.cached_tokens == 0 < usual.machine.counters.cached_tokens
    if name == "chunked":  # every chunk is the rest of a prompt behind its cached pages, so it draws a token
        ends = {k: [bool(flags & 1) for p in v.plans for flags in p.prefill["sample"].tolist()] for k, v in both.items()}
        assert all(ends["without"])
        assert not all(ends["usual"])
        assert max(len(p.ids) for p in without.plans) > SMALL["step_tokens"] >= max(len(p.ids) for p in usual.plans)
        assert max(len(p.ids) for p in without.plans) <= SMALL["step_tokens"] + max(whole)
    if name == "mixed":
        mixed = {k: sum(len(p.prefill) > 0 and n > 0 for p, n in zip(v.plans, v.decodes, strict=True)) for k, v in both.items()}
        assert mixed["without"] == 0 < mixed["usual"]
    if name == "order":
        assert without.machine.limits.order == "arrival"
    if name == "share":
        assert without.machine.limits.wait_for_shared_prefix is False
        assert without.machine.counters.prefill_tokens > usual.machine.counters.prefill_tokens


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["chunked", "mixed"])
def test_edited_schedulers_answer_all_when_pages_are_short(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    small = {"max_running": int(rng.integers(1, 9)), "step_tokens": int(rng.integers(10, 40)), "kv_tokens": 128, "page_size": 4}
    base = Setup(EngineConfig(**small, max_context=100), 100, fake=True)
    jobs = jobs_of(load(f"synthetic:rate=0,n=20,input=1-60,output=1-30,shared=8,groups=2,seed={seed}"), 256, 100)
    assert answers(ABLATIONS[name].change(base), jobs, seed) == answers(base, jobs, seed)


def test_plans_just_in_time_are_early_without_it() -> None:
    server = BASE.set(itl_target_ms=AUTO_ITL)
    setup = ABLATIONS["just-in-time"].change(server)
    limits = SchedulerLimits(4, 64, 4, 128, 64, 2, 256, itl_target=None)
    costs = [machine(limits).costs for machine in (StepMachine, setup.edit.machine)]
    for c in costs:
        for rows in range(1, 40):
            c.observe(features(0, rows, 100 * rows), 0.03 + 0.001 * rows)
    slacks = [c.slack([features(0, 20, 2000)], 0.0, 0.0) for c in costs]
    assert slacks[0] == pytest.approx(0.9 * 0.05 - 1.5e-3, rel=0.05)
    assert slacks[1] == 0.0
    assert costs[0].seconds(8, 20, 2000) == costs[1].seconds(8, 20, 2000)  # all else is as it was
    assert answers(setup) == answers(server)
    [variant], _ = variants("pacing", server)
    assert variant.setup.engine.itl_target_ms == 0


# ---------------- names
@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("overlop", "--ablate overlop: unknown; did you mean overlap?"),
        ("qqq", "there are overlap, radix"),
        ("graphs", "--ablate graphs: the fake engine has no model"),
        ("quantized", "--ablate quantized: the fake engine has no model"),
        ("pacing", "--ablate pacing: without --itl-target-ms"),
        ("overlap,overlap", "--ablate: a name is given twice"),
        (" , ", "--ablate: no name is given"),
        ("chunked+mixed", "two of these are different schedulers"),
        ("lag=0", "--ablate lag=0: --lag must be between 1 and 8, got 0"),
        ("lag=x", "--ablate lag: 'x' is no whole number"),
        ("lagg=1", "--ablate lagg: there is no such setting; did you mean lag?"),
        ("graphs=off", "--ablate graphs=off: --graphs off needs a GPU"),
        ("lag=2", "--ablate lag=2: lag=2 changes nothing here"),
    ],
)
def test_names_that_cannot_be_ablated_say_why(names: str, text: str) -> None:
    with pytest.raises(UserError) as e:
        variants(names, BASE)
    assert text in str(e.value)


def test_what_is_off_already_cannot_be_switched_off() -> None:
    base = BASE.set(lag=1, cache="none")
    for name, why in (
        ("overlap", "it is off already"),
        ("radix", "it is off already"),
        ("order", "--cache none"),
        ("share", "--cache none"),
    ):
        with pytest.raises(UserError, match=why):
            variants(name, base)
    on_a_cpu = replace(BASE, fake=False)
    with pytest.raises(UserError, match="CUDA graphs need a GPU"):
        variants("graphs", on_a_cpu)


def test_all_leaves_out_what_does_not_apply_and_says_so() -> None:
    found, notes = variants("all", BASE)
    assert [v.name for v in found] == [f"{name} off" for name in ON_A_CPU]
    assert {note.partition(":")[0] for note in notes} == {"pacing", "just-in-time", "graphs", "quantized"}
    found, notes = variants("all", replace(BASE, fake=False).set(itl_target_ms=AUTO_ITL))
    assert "quantized off" in [v.name for v in found]
    assert [note.partition(":")[0] for note in notes] == ["graphs"]


def test_several_changes_join() -> None:
    [a, b], _ = variants("overlap+radix, page_size=8+mixed", BASE)
    assert (a.name, b.name) == ("overlap off + radix off", "page_size=8 + mixed off")
    assert (a.setup.engine.lag, a.setup.engine.cache) == (1, "none")
    assert (b.setup.engine.page_size, b.setup.edit.machine) == (8, SeparateSteps)
    assert changed(BASE, "--step-tokens", "64", "--sweep").engine.step_tokens == 64
