"""Runs `python -m minisgl selfcheck`: compares this installation with transformers.  To be run after changing a kernel.

Layer by layer with transformers, and with itself: decode with prefill, cached with uncached, `--tp N` with one rank; then the
greedy answers of the engine.  Every job that needs torch runs in a process of its own, so it begins with free memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from minisgl.commands.flags import add_engine_flags, model_of
from minisgl.commands.parser import Parser
from minisgl.config import Config, engine_config
from minisgl.errors import UserError
from minisgl.selfcheck.compare import FLOAT8, Arrays, Yardstick, changed, columns_of, greedy, perplexity, print_table

Jobs = Callable[[str, list[list[str]]], None]  # (kind, further arguments of each process): runs them in parallel

TEXT = (
    "The lighthouse keeper kept two books. In the first he wrote, every evening, what the sea had done: the height of the "
    "waves, the colour of the water, and the names of the ships that had passed. In the second he wrote what he had expected "
    "the sea to do. At the end of each year he laid the books side by side and counted the days on which they agreed. In forty "
    "years the number had never risen above a hundred, and yet he would not have called himself a poor judge of the weather. "
    '"The second book is not there to be right," he told the boy who brought the oil. "It is there so that I look."'
)
PROMPTS = (TEXT, "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return", "2, 4, 8, 16, 32, 64, 128, 256,")


# Runs a job where this process would find it: not in the current folder.
_JOB = "import sys; sys.path[:] = {}; import runpy; runpy.run_module('minisgl.selfcheck.job', None, '__main__', True)"


def run(argv: list[str]) -> int:
    """Check and print.  Returns 0 if everything is within its limit, else 1.  Raises UserError."""
    args = _parser().parse_args(argv)
    from minisgl.model.checkpoint.resolve import resolve
    from minisgl.model.common.shard import check_tp

    spec = resolve(model_of(args), args.revision)
    if spec.format == "fake":
        raise UserError("--model fake: there is no model to check; name a checkpoint with --model")
    config = Config(spec, engine_config(vars(args)))
    check_tp(spec, config.engine.tp)
    return check(config, args.tokens)


def _parser() -> Parser:
    p = Parser(
        engine=True,
        prog="minisgl selfcheck",
        description="Compare this installation with transformers (float32, on the CPU, which takes 4 bytes of memory per "
        "parameter) layer by layer, and with itself: decode and prefill, cached and uncached, --tp N and one rank.  Exit code "
        "1 if something differs by more than rounding.",
    )
    p.add_argument("--tokens", type=int, default=16, metavar="N", help="greedy tokens after each prompt (%(default)s)")
    add_engine_flags(p)
    return p


# ---------------- the check
def check(config: Config, tokens: int, jobs: Jobs | None = None) -> int:
    """Run all jobs and print the table; returns the exit code.  `jobs`: a replacement for processes in tests."""
    ids = prompts(config, tokens)
    tp = config.engine.tp
    with tempfile.TemporaryDirectory(prefix="minisgl-selfcheck-") as folder:
        ours, theirs, spread = _observe(config, ids, tokens, Path(folder), jobs or _processes)
    yard = Yardstick.of(config, theirs)
    where = f"{config.engine.device}, {config.dtype}" + (f", --tp {tp}" if tp > 1 else "")
    if yard.exact == "rounded":
        where += ", weights in 4 or 8 bits, also those of transformers"
    elif yard.floor == FLOAT8:
        where += ", 8 bits: the limits are wide, --quantization none compares closely"
    lengths = ", ".join(str(len(p)) for p in ids)
    print(f"minisgl selfcheck: {config.model.name} ({where}), prompts of {lengths} tokens and {tokens} more")
    columns = columns_of(config, ids, ours, theirs, spread)
    faults = print_table(columns) + perplexity(ids[0], ours, theirs, yard) + changed(theirs)
    with phase("the whole engine"):  # last: it may not start at all
        answers = _answers(config, ids, tokens)
    exact = [theirs[f"{i}.{yard.exact}.logits"] for i in range(len(ids))]
    faults += greedy(ids, ours, exact, answers, max(yard.greedy, columns[0].limits[0, -1]))
    for fault in faults:
        print(f"selfcheck: {fault}")
    print("selfcheck: FAILED" if faults else "selfcheck: everything agrees")
    return 1 if faults else 0


def prompts(config: Config, tokens: int) -> list[list[int]]:
    """The fixed prompts as token ids, cut to the context of the model."""
    from minisgl.model.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    room = config.max_context - tokens
    if tokens < 2 or room < 2:
        raise UserError(f"--tokens must be between 2 and {config.max_context - 2}, got {tokens}")
    return [tokenizer.encode(text, add_special=True)[:room].tolist() for text in PROMPTS]


def _observe(
    config: Config, ids: list[list[int]], tokens: int, folder: Path, jobs: Jobs
) -> tuple[Arrays, Arrays, Arrays | None]:
    """The arrays of one rank, of transformers, and of `tp` ranks on the same sequences (None: `tp` is 1)."""
    from safetensors.numpy import load_file

    from minisgl.selfcheck.job import write_job

    engine, longest = config.engine, max(map(len, ids)) + tokens
    small = replace(
        engine,
        tp=1,
        lag=1,
        graphs="off" if engine.device == "cuda" else "on",  # layers are watched from Python
        max_running=4,
        step_tokens=longest + 4,
        max_context=longest,
        kv_tokens=4 * (longest + engine.page_size),
    )
    one, many = folder / "1", folder / "n"
    write_job(one, replace(config, engine=small), ids, tokens)
    with phase("layers, one rank"):
        jobs("probe", [[str(one), "0"]])
    with phase("transformers on the CPU"):
        jobs("reference", [[str(one)]])
    ours, theirs = load_file(one / "probe.safetensors"), load_file(one / "reference.safetensors")
    if engine.tp == 1:
        return ours, theirs, None
    sequences = [p + ours[f"{i}.tokens"].tolist()[:-1] for i, p in enumerate(ids)]
    write_job(many, replace(config, engine=replace(small, tp=engine.tp)), sequences, 0)
    with phase(f"layers, {engine.tp} ranks"):
        jobs("probe", [[str(many), str(rank)] for rank in range(engine.tp)])
    return ours, theirs, load_file(many / "probe.safetensors")


@contextmanager
def phase(text: str) -> Iterator[None]:
    """Print the progress on stderr."""
    start = time.monotonic()
    print(f"selfcheck: {text} ...", file=sys.stderr, flush=True)
    yield
    print(f"selfcheck: {text}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def _processes(kind: str, arguments: list[list[str]]) -> None:
    """Run one process of minisgl.selfcheck.job for each list of arguments.  Raises UserError with the last words of the first
    that fails; the others are killed.
    """
    from minisgl.selfcheck.job import FAILED

    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in arguments]
        running = []
        for a, file in zip(arguments, logs, strict=True):
            command = [sys.executable, "-c", _JOB.format(sys.path), str(os.getpid()), kind, *a]
            running.append(stack.enter_context(subprocess.Popen(command, stderr=file)))
            stack.callback(running[-1].kill)
        codes: list[int | None] = [None]
        while None in codes and not any(codes):  # after a failure the other ranks would wait
            time.sleep(0.05)
            codes = [p.poll() for p in running]
        failed = next(((code, file) for code, file in zip(codes, logs, strict=True) if code), None)
        if failed is not None:
            code, file = failed
            file.seek(0)
            text = file.read().strip() or "it said nothing"
            raise UserError(text.splitlines()[-1] if code == FAILED else f"the {kind} ended with code {code}:\n{text}")


def _answers(config: Config, ids: list[list[int]], tokens: int) -> dict[str, list[list[int]]]:
    """Greedy tokens of the engine, first with a cold cache, then with a warm one."""
    from minisgl.llm import LLM
    from minisgl.sampling_params import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    with LLM(config.model, **asdict(config.engine)) as llm:
        out = {}
        for cache in ("cold", "warm"):
            done = llm.generate(ids, params, errors="return")
            if (error := next((c.error for c in done if c.error), None)) is not None:
                raise UserError(f"the engine could not answer: {error}")
            out[cache] = [c.token_ids for c in done]
        return out
