"""Tensor-parallel models with a GPU for each rank, and what happens when a rank is lost.

Imported by check_tp_gpu.py; not a command.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import queue
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from minisgl import LLM, SamplingParams
from minisgl.api.engine import Chunk, TokenPrompt
from minisgl.config import Config, EngineConfig, ModelSpec
from minisgl.errors import RequestError, UserError
from minisgl.lifeline import die_with_parent
from minisgl.model.checkpoint.presets import random_shape
from minisgl.model.common.parallel import Parallel
from minisgl.model.cuda.parallel import make_parallel

Report = Callable[..., None]
Outcome = dict[str, Any]  # "logits": of a prefill; "tokens": greedy, all steps and rows

SHAPES = [("Llama", 8, 2, 64), ("Qwen3", 10, 2, 128)]
VARIANTS = [("float32", True), ("float32", False), ("bfloat16", True), ("bfloat16", False)]  # dtype, eager
DECODES = 24
LOAD = 40  # requests that run when a rank is killed
LOSS_SECONDS = 10.0  # by when all of them must have failed


# ---------------------------------------------------------------- models
def outcome(spec: ModelSpec, parallel: Parallel, rank: int, dtype: str, eager: bool) -> Outcome:
    """Prefill in two chunks and greedy decode steps on this rank."""
    from minisgl.actors.spawn import make_runner
    from minisgl.model.common.grammar import Grammars
    from scripts.check import gpu as check_gpu

    engine = EngineConfig(
        device="cuda", tp=parallel.size, dtype=dtype, graphs="off" if eager else "on", attention_backend="triton",
        memory_fraction=0.9, max_running=40, step_tokens=2048, kv_tokens=32_768, page_size=16,
    )  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Grammars, "load_vocabulary"))  # these checkpoints have no tokenizer
        stack.enter_context(mock.patch("minisgl.model.cuda.runner.make_parallel", return_value=parallel))
        stack.enter_context(mock.patch.object(parallel, "close"))  # all models of this process share the group
        runner = make_runner(Config(spec, engine), rank, "")
        pages = runner.max_pages()
        runner.allocate(pages)
        harness = check_gpu.Harness(runner, pages, 16)
        texts = check_gpu.prompts(random.Random(1), check_gpu.LENGTHS)
        logits, tokens = check_gpu.two_chunks(harness, texts)
        for _ in range(DECODES):
            tokens += harness.run([], list(texts))
        runner.close()
    return {"logits": logits.numpy() if eager else None, "tokens": tokens}


def model_rank(rank: int, size: int, run_dir: str, specs: list[ModelSpec], results: Any) -> None:
    """All models on one rank of `size`."""
    die_with_parent(os.getppid())
    try:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        parallel = make_parallel("nccl", rank, size, run_dir, device, dtype=torch.bfloat16)
        outcomes = [outcome(spec, parallel, rank, *variant) for spec in specs for variant in VARIANTS]
        torch.cuda.synchronize()
        parallel.close()
        results.put((size, rank, outcomes))
        results.close()
        results.join_thread()
    except Exception:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # as workers do; a process whose peers are stuck in a kernel cannot clean up


def collect(size: int, specs: list[ModelSpec], run_dir: str, seconds: float) -> tuple[dict[tuple[int, int], Any], list[Any]]:
    """(group size, rank) -> outcomes, of one rank alone and of `size` ranks, which run at the same time; and exit codes."""
    context = multiprocessing.get_context("spawn")
    results, deadline = context.Queue(), time.monotonic() + seconds
    ranks = [
        context.Process(target=model_rank, args=(rank, n, run_dir, specs, results), daemon=True)
        for n in (1, size)
        for rank in range(n)
    ]
    heard: dict[tuple[int, int], Any] = {}
    try:
        for p in ranks:
            p.start()
        while len(heard) < len(ranks) and time.monotonic() < deadline and not any(p.exitcode for p in ranks):
            try:
                n, rank, outcomes = results.get(timeout=1)
            except queue.Empty:
                continue
            heard[n, rank] = outcomes
        for p in ranks:
            p.join(max(0.0, min(10.0, deadline - time.monotonic())) if len(heard) == len(ranks) else 0.0)
        exits = [p.exitcode for p in ranks]
    finally:
        for p in ranks:
            p.kill()
            p.join(10)
    return heard, exits


def check_models(size: int, seconds: float, report: Report) -> None:
    """Logits and greedy text of `size` ranks against one: the same in float32; in bfloat16 as near to that as one rank is."""
    from scripts.check import gpu as check_gpu

    with tempfile.TemporaryDirectory(prefix="minisgl-") as run_dir:
        specs = []
        for kind, heads, kv_heads, dim in SHAPES:
            (Path(run_dir) / kind).mkdir()
            specs.append(check_gpu.tiny(f"{run_dir}/{kind}", kind, heads, kv_heads, dim))
        heard, exits = collect(size, specs, run_dir, seconds)
    done = len(heard) == 1 + size
    report("models: all ranks finish", done and not any(exits), ranks=size, exit_codes=exits, finished=len(heard))
    if not done:
        return
    for i, (kind, *_) in enumerate(SHAPES):
        at = len(VARIANTS) * i
        same = all([o["tokens"] for o in heard[size, 0]] == [o["tokens"] for o in heard[size, r]] for r in range(size))
        report(f"models: {kind}, all ranks draw the same tokens", same, ranks=size)
        one, many = (dict(zip(VARIANTS, heard[n, 0][at : at + len(VARIANTS)], strict=True)) for n in (1, size))
        exact = torch.from_numpy(one["float32", True]["logits"])

        def error(outcome: Outcome, want: torch.Tensor = exact) -> float:
            got = torch.from_numpy(outcome["logits"])
            return float((got - want).norm() / want.norm())

        wrong = error(many["float32", True])
        report(f"models: {kind} float32 logits", wrong < 2e-4, error=wrong)
        for name, eager in (("eager", True), ("graphs", False)):
            got, want = many["float32", eager]["tokens"], one["float32", True]["tokens"]
            report(f"models: {kind} float32 text, {name}", got == want, same=sum(map(int.__eq__, got, want)), of=len(want))
        alone, together = error(one["bfloat16", True]), error(many["bfloat16", True])
        report(f"models: {kind} bfloat16 logits", together < 1.5 * alone, error=together, of_one_rank=alone)


# ---------------------------------------------------------------- the loss of a rank
@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Whatever hangs inside: then this program ends, with a look at where it was, and its children with it."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def text(llm: LLM) -> list[int]:
    """One greedy answer: alone, its steps are the same in every engine."""
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=48)
    return llm.generate([list(range(100, 177))], params)[0].token_ids


def check_loss(
    size: int, seconds: float, report: Report, *, model: ModelSpec | str | None = None, device: str = "cuda", **engine: Any
) -> None:
    """Kill the last rank under load, then start another engine on the same GPUs, and end that one in order."""
    if model is None:
        model = random_shape("qwen3-0.6b")
    if device == "cuda":
        engine = {"attention_backend": "triton", "step_tokens": 4096, **engine}
    settings = {"device": device, "tp": size, "kv_tokens": 60_000, "max_running": 64, **engine}
    try:
        with ended_after(seconds):
            first = lose(size, settings, model, report)
        with ended_after(seconds):
            again(settings, model, first, report)
    except UserError as e:
        report("loss: the engine starts", False, refused=str(e))


def lose(size: int, settings: dict[str, Any], model: Any, report: Report) -> list[int]:
    """Returns the text from before the loss."""
    began = time.monotonic()
    llm = LLM(model, **settings)
    try:
        started = time.monotonic() - began
        before = text(llm)
        report("loss: the engine starts", len(before) == 48, ranks=size, seconds=round(started, 1))
        gateway, pids, victim = llm.system.gateway, llm.system.supervisor.pids, f"worker{size - 1}"
        news: list[list[Chunk | RequestError]] = [[] for _ in range(LOAD)]
        params = SamplingParams(temperature=0.7, ignore_eos=True, max_tokens=1200)
        for i, box in enumerate(news):
            gateway.open(TokenPrompt(tuple(range(i + 1, i + 65))), params, box.append)
        while not all(news):  # every request has a token
            llm.system.pump(0.05)
        os.kill(pids[victim], signal.SIGKILL)
        killed = time.monotonic()
        while time.monotonic() - killed < LOSS_SECONDS and not all(isinstance(b[-1], RequestError) for b in news):
            llm.system.pump(0.05)
        took = time.monotonic() - killed
        errors = [e for box in news if isinstance(e := box[-1], RequestError)]
        clear = all((e.status, e.code) == (500, "engine_error") and victim in e.message for e in errors)
        named = f"the process {victim} was killed by signal 9" in (gateway.failure or "")
        report(
            "loss: every open request fails with the rank's name",
            len(errors) == LOAD and clear and named and gateway.state == "dead",
            failed=len(errors),
            of=LOAD,
            seconds=round(took, 3),
            failure=gateway.failure,
        )
        run_dir = llm.system.run_dir
    finally:
        llm.close()
    left = sorted(name for name, pid in pids.items() if alive(pid))
    report("loss: no process and no file is left", not left and not os.path.exists(run_dir), left=left)
    return before


def again(settings: dict[str, Any], model: Any, want: list[int], report: Report) -> None:
    began = time.monotonic()
    with LLM(model, **settings) as llm:
        started = time.monotonic() - began
        got = text(llm)
        pids, supervisor = llm.system.supervisor.pids, llm.system.supervisor
        killed: list[str] = []
        inner = supervisor.kill

        def kill() -> None:
            killed.extend(supervisor.pids)
            inner()

        supervisor.kill = kill  # type: ignore[method-assign]
        ending = time.monotonic()
    ended = time.monotonic() - ending
    report("loss: a new engine answers as the first", got == want, seconds=round(started, 1))
    left = sorted(name for name, pid in pids.items() if alive(pid))
    report("loss: the end, without a kill", not killed and not left, seconds=round(ended, 2), killed=killed, left=left)
