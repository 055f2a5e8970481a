"""Grammars in the GPU worker, interpreted: masks arrive with the step they are for, and draw what the CPU worker draws."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
import test_cuda_steps as gpu
from test_grammar import _plan
from tiny_models import Driver, save_llama

from minisgl import grammar
from minisgl.model.common.grammar import Grammars, Vocabulary, unpack
from minisgl.model.cpu.penalties import restrict as readable
from minisgl.model.cuda.step import COUNTED, GRAMMAR_ROWS
from minisgl.model.kernels import grammar_mask as kernels
from minisgl.plan import StepPlan

WORDS = Vocabulary([bytes([i]) for i in range(128)] + [b""] * 75, frozenset(), (202,))
PATTERN = r"[0-9][a-z]"


class Passed:
    """The event of a step: tokens may be read only when the test lets it pass."""

    def __init__(self, log: list[int], step: int, tokens: torch.Tensor, now: torch.Tensor) -> None:
        self._log, self._step, self._tokens, self._now = log, step, tokens, now

    def synchronize(self) -> None:
        self._log.append(self._step)
        self._tokens.copy_(self._now)


def test_the_kernel_does_what_its_readable_form_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", 64)
    torch.manual_seed(0)
    logits = torch.randn(5, 203).bfloat16()
    logits[1, ::3] = -torch.inf
    words = np.random.default_rng(0).integers(0, 1 << 32, (7, 7), np.uint32)
    slots, grammar_rows = (
        torch.tensor([3, 1, 6, 0, 2], dtype=torch.int32),
        torch.tensor([0, 1, 0, 1, 1, 1, 1], dtype=torch.int32),
    )
    got = kernels.restrict(logits, slots, grammar_rows, torch.from_numpy(words.view(np.int32)))
    want = readable(logits, torch.from_numpy(unpack(words[slots.numpy()], 203)))
    free = grammar_rows[slots] == 0
    assert torch.equal(got, torch.where(free[:, None], logits.float(), want))
    assert free.tolist() == [False, False, False, True, True]


def plans(driver: Driver) -> list[StepPlan]:
    """Three slots, of which 0 and 2 are bound and decode in turns; at the end slot 0 has an owner without a grammar."""
    for slot in range(3):
        driver.join(slot, **({"presence": 1.5} if slot == 2 else {}))
    out = [driver.plan([(s, [3 + s, 5, 8], True) for s in range(3)])]
    _enter(out[0], [(s, grammar.regex(PATTERN), []) for s in (0, 2)])
    out += [driver.plan(decode=batch) for batch in ([1], [0, 1], [1, 2], [0, 1], [2])]
    driver.join(0)
    out.append(driver.plan([(0, [4], True)], decode=[1]))
    _enter(out[-1], [(0, "", [])])
    return out


def _enter(plan: StepPlan, owners: list[tuple[int, str, list[int]]]) -> None:
    entered = _plan(owners)
    plan.grammars, plan.said, plan.grammar_text = entered.grammars, entered.said, entered.grammar_text


def run(worker: Any, step: int, plan: StepPlan, read: list[int]) -> list[int]:
    """Its tokens; the worker gets them when it asks, and no earlier."""
    tokens: list[int] = worker.run(plan)
    late = torch.full((len(tokens),), -5, dtype=torch.int32)
    worker.steps.grammar_rows.end(late, Passed(read, step, late, torch.tensor(tokens, dtype=torch.int32)))
    return tokens


def test_the_gpu_worker_draws_what_the_cpu_worker_draws_and_waits_for_no_running_step(tmp_path: Path) -> None:
    save_llama(tmp_path)
    worker, runner = gpu.Interpreted(tmp_path), gpu.cpu_runner(tmp_path)
    worker.steps.grammar_rows.grammars, runner._grammars = Grammars(lambda: WORDS), Grammars(lambda: WORDS)
    said: dict[int, list[int]] = {0: [], 1: [], 2: []}
    read: list[int] = []
    batch: list[int] = []
    for step, plan in enumerate(plans(Driver(gpu.PAGES, 4))):
        raw = plan.pack()
        tokens = run(worker, step, StepPlan.unpack(raw), read)
        assert step - 1 not in read, "it waited for the step that is still running"
        assert tokens == runner.launch(StepPlan.unpack(raw)).result().tokens.tolist()
        batch = batch if plan.decode is None else plan.decode.tolist()
        for slot, token in zip([*plan.prefill["slot"].tolist(), *batch], tokens, strict=True):
            said[slot].append(token)
    assert read, "tokens were read"
    for slot in (0, 2):
        assert re.fullmatch(PATTERN, b"".join(WORDS.tokens[t] for t in said[slot][:2]).decode())
        assert said[slot][2] == 202
    kinds = {key[2] if len(key) > 2 else 0 for key in worker.graphs.keys if isinstance(key, tuple) and isinstance(key[0], int)}
    assert kinds == {0, GRAMMAR_ROWS, GRAMMAR_ROWS | COUNTED}  # the unbound row alone is the plain graph


def test_matchers_that_miss_their_tokens_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path)
    monkeypatch.setattr(Grammars, "feed", lambda self, matchers, tokens: None)
    worker = gpu.Interpreted(tmp_path)
    worker.steps.grammar_rows.grammars = Grammars(lambda: WORDS)
    tokens = [run(worker, step, plan, [])[0] for step, plan in enumerate(plans(Driver(gpu.PAGES, 4))[:3])]
    assert not re.fullmatch(PATTERN, "".join(chr(tokens[step]) for step in (0, 2)))


def test_a_worker_without_grammars_keeps_nothing_for_them(tmp_path: Path) -> None:
    save_llama(tmp_path)
    worker, driver = gpu.Interpreted(tmp_path), Driver(gpu.PAGES, 4)
    driver.join(0)
    for plan in (driver.plan([(0, [1, 2], True)]), driver.plan(decode=[0])):
        worker.run(plan)
    grammar_rows = worker.steps.grammar_rows
    assert len(grammar_rows.has_grammar) == len(grammar_rows.masks) == len(grammar_rows._unread) == 0
    assert grammar_rows.grammars._tokenizer is None
    assert all(len(key) == 2 for key in worker.graphs.keys if isinstance(key, tuple))
