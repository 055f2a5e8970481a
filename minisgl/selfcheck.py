"""`python -m minisgl selfcheck`: does this installation compute what the model means?  What to run after changing a kernel.

Layer by layer against transformers, and against itself: decode against prefill, cached against uncached, `--tp N` against one
rank; then greedy answers of the whole engine.  Everything that needs torch runs in processes of its own, so each job begins
with free memory.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minisgl.cli import add_engine_flags, engine_config
from minisgl.config import Config, EngineConfig, ModelSpec
from minisgl.errors import UserError

F32 = npt.NDArray[np.float32]
Arrays = Mapping[str, Any]
Jobs = Callable[[str, list[list[str]]], None]  # (kind, further arguments of each process): run them side by side

ROUNDING = 1e-4  # of float32: the relative difference that different orders of summation may make
FLOAT8 = 0.2  # what 8-bit floats of a GPU, in weights, activations or caches, may add to that
SLACK = 3.0  # times the reference's own rounding: in the dtype that is checked, or to half precision (`Yardstick`)
PERPLEXITY = 1e-3
PERPLEXITY_WIDE = 0.01  # where single tokens may be far off
# What rounding may change of a matrix, |w' - w| / |w|, by its bits.  In a group of 32 with the largest weight a no number moves
# by more than half a step, a / 254, so the group by a sqrt(32) / 254 at most, and its norm is at least a.  In 4 bits a step is
# (high - low) / 15, so that is (high - low) sqrt(32) / 30, and the norm is at least (high - low) / sqrt(2).
CHANGED = {8: 0.023, 4: 0.27}
GROUP = 32  # of the weights that share a scale on a CPU
TEXT = (
    "The lighthouse keeper kept two books. In the first he wrote, every evening, what the sea had done: the height of the "
    "waves, the colour of the water, and the names of the ships that had passed. In the second he wrote what he had expected "
    "the sea to do. At the end of each year he laid the books side by side and counted the days on which they agreed. In forty "
    "years the number had never risen above a hundred, and yet he would not have called himself a poor judge of the weather. "
    '"The second book is not there to be right," he told the boy who brought the oil. "It is there so that I look."'
)
PROMPTS = (TEXT, "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return", "2, 4, 8, 16, 32, 64, 128, 256,")


def run(argv: list[str]) -> int:
    """Check and print.  Returns 0 where everything is within its limit, else 1.  Raises UserError."""
    args = _parser().parse_args(argv)
    from minisgl.model.resolve import resolve
    from minisgl.model.shard import check_tp

    spec = resolve(args.model, args.revision)
    given = {name: value for name, value in vars(args).items() if value is not None}
    config = Config(spec, engine_config(given))
    check_tp(spec, config.engine.tp)
    return check(config, given, args.tokens)


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="minisgl selfcheck",
        description="Compare this installation with transformers (float32, on the CPU, which takes 4 bytes of memory per "
        "parameter) layer by layer, and with itself: decode and prefill, cached and uncached, --tp N and one rank.  Exit code "
        "1 if something differs by more than rounding.",
    )
    p.add_argument("--tokens", type=int, default=16, metavar="N", help="greedy tokens after each prompt (%(default)s)")
    add_engine_flags(p)
    return p


@dataclass(slots=True)
class Column:
    """One comparison: relative differences of the tokens' vectors, median and largest by row of the table, and their limits.

    The largest finds what goes wrong at one position; the median is sharp where rounding spoils a few tokens anyway.
    """

    name: str
    errors: F32  # [2, rows]
    limits: F32  # [2, rows]

    def first_bad(self) -> int | None:
        bad = np.flatnonzero(~(self.errors <= self.limits).all(0))  # NaN is bad
        return int(bad[0]) if len(bad) else None


@dataclass(frozen=True, slots=True)
class Yardstick:
    """Which of the reference's results ours must equal, and which tells by its distance from that what rounding may cost.

    What a CPU computes on weights in 4 or 8 bits is compared with float32 on the same weights, so that the limits need not
    make room for what the bits cost; whether rounding was sound is judged for itself (`CHANGED`).
    """

    exact: str = "float32"
    rough: str = "float32"
    floor: float = ROUNDING  # of the limits
    largest: float = 0.0  # of the limits for single tokens
    greedy: float = 0.0  # of the limit that tells which tokens are near enough to the likeliest
    perplexity: float = PERPLEXITY
    wide: bool = False  # single tokens may move the perplexity by chance

    @classmethod
    def of(cls, config: Config, theirs: Arrays) -> Yardstick:
        engine = config.engine
        if "0.rounded.logits" in theirs:
            if config.model.num_experts:  # rounding may send a token to another expert, which changes all of its vector
                return cls("rounded", "half", largest=1.0, greedy=FLOAT8, perplexity=PERPLEXITY_WIDE, wide=True)
            return cls("rounded", "half")
        if engine.device == "cuda" and (engine.eight_bits or engine.kv_cache_dtype == "fp8"):
            perplexity = PERPLEXITY_WIDE if engine.eight_bits else PERPLEXITY
            return cls("float32", config.dtype, FLOAT8, perplexity=perplexity, wide=engine.eight_bits)
        return cls("float32", config.dtype)


# ---------------- the check
def check(config: Config, given: Mapping[str, Any], tokens: int, jobs: Jobs | None = None) -> int:
    """Run all jobs, print the table.  `given`: keywords for LLM; `jobs` stands in for processes in tests."""
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
    columns = _columns(config, ids, ours, theirs, spread)
    faults = _print_table(columns) + _perplexity(ids[0], ours, theirs, yard) + _changed(theirs)
    with phase("the whole engine"):  # last: it may not even start
        answers = _answers(config.model, given, ids, tokens)
    exact = [theirs[f"{i}.{yard.exact}.logits"] for i in range(len(ids))]
    faults += _greedy(ids, ours, exact, answers, max(yard.greedy, columns[0].limits[0, -1]))
    for fault in faults:
        print(f"selfcheck: {fault}")
    print("selfcheck: FAILED" if faults else "selfcheck: everything agrees")
    return 1 if faults else 0


def prompts(config: Config, tokens: int) -> list[list[int]]:
    """The fixed prompts as token ids, cut to the context of the model."""
    from minisgl.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    room = config.max_context - tokens
    if tokens < 2 or room < 2:
        raise UserError(f"--tokens must be between 2 and {config.max_context - 2}, got {tokens}")
    return [tokenizer.encode(text, add_special=True)[:room].tolist() for text in PROMPTS]


def _observe(
    config: Config, ids: list[list[int]], tokens: int, folder: Path, jobs: Jobs
) -> tuple[Arrays, Arrays, Arrays | None]:
    """What one rank computes, what transformers does, and what `tp` ranks compute of the same sequences (None: one rank)."""
    from safetensors.numpy import load_file

    from minisgl.model.jobs import write_job

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
    whole = [p + ours[f"{i}.tokens"].tolist()[:-1] for i, p in enumerate(ids)]
    write_job(many, replace(config, engine=replace(small, tp=engine.tp)), whole, 0)
    with phase(f"layers, {engine.tp} ranks"):
        jobs("probe", [[str(many), str(rank)] for rank in range(engine.tp)])
    return ours, theirs, load_file(many / "probe.safetensors")


@contextmanager
def phase(text: str) -> Iterator[None]:
    """Progress, for whoever waits."""
    start = time.monotonic()
    print(f"selfcheck: {text} ...", file=sys.stderr, flush=True)
    yield
    print(f"selfcheck: {text}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def _processes(kind: str, arguments: list[list[str]]) -> None:
    from minisgl.model.jobs import FAILED

    with ExitStack() as files, ThreadPoolExecutor(len(arguments)) as waiting:
        said = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in arguments]
        running: list[subprocess.Popen[bytes]] = []
        try:
            for a, file in zip(arguments, said, strict=True):
                command = [sys.executable, "-m", "minisgl.model.jobs", str(os.getpid()), kind, *a]
                running.append(subprocess.Popen(command, stderr=file))
            for done in as_completed([waiting.submit(p.wait) for p in running]):
                if done.result():
                    break  # the other ranks would wait for this one
            failed = next(((p.returncode, file) for p, file in zip(running, said, strict=True) if p.poll()), None)
        finally:
            for p in running:
                p.kill()
        if failed is not None:
            code, file = failed
            file.seek(0)
            text = file.read().strip() or "it said nothing"
            raise UserError(text.splitlines()[-1] if code == FAILED else f"the {kind} ended with code {code}:\n{text}")


def _answers(spec: ModelSpec, given: Mapping[str, Any], ids: list[list[int]], tokens: int) -> dict[str, list[list[int]]]:
    """Greedy tokens of the whole engine, with a cold and a warm prefix cache."""
    from minisgl.llm import LLM
    from minisgl.types import SamplingParams

    known = {f.name for f in fields(EngineConfig)}
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    with LLM(spec, **{k: v for k, v in given.items() if k in known}) as llm:
        out = {}
        for cache in ("cold", "warm"):
            done = llm.generate(ids, params)
            if (error := next((c.error for c in done if c.error), None)) is not None:
                raise UserError(f"the engine could not answer: {error}")
            out[cache] = [c.token_ids for c in done]
        return out


# ---------------- comparisons
def _difference(a: F32, b: F32) -> F32:
    """Median and largest over the tokens of |a - b| / |b|: [..., S, N] -> [2, ...]."""
    each = np.linalg.norm(a - b, axis=-1) / np.maximum(np.linalg.norm(b, axis=-1), 1e-30)
    return np.stack([np.median(each, -1), each.max(-1)]).astype(np.float32)


def _rows(a: Arrays, b: Arrays, first: str, second: str, start: int = 0) -> F32:
    """Differences of "hidden" and "logits" under two prefixes, in the rows of both from `start` of the second on."""
    n = min(len(a[f"{first}.logits"]), len(b[f"{second}.logits"]) - start)
    hidden = _difference(a[f"{first}.hidden"][:, -n:], b[f"{second}.hidden"][:, -n:])
    logits = _difference(a[f"{first}.logits"][-n:], b[f"{second}.logits"][-n:])
    return np.concatenate([hidden, logits[:, None]], 1)


def _columns(config: Config, ids: list[list[int]], ours: Arrays, theirs: Arrays, spread: Arrays | None) -> list[Column]:
    each, yard = range(len(ids)), Yardstick.of(config, theirs)

    def worst(*found: F32) -> F32:
        return np.asarray(np.max(found, axis=0), np.float32)

    def allowed(rough: str, exact: str) -> F32:
        rounding = worst(*(_rows(theirs, theirs, f"{i}.{rough}", f"{i}.{exact}") for i in each))
        floor = [[yard.floor], [max(yard.floor, yard.largest)]]
        return np.maximum(SLACK * np.maximum.accumulate(rounding, 1), floor).astype(np.float32)

    limits = allowed(yard.rough, yard.exact)
    columns = [
        Column("transformers", worst(*(_rows(ours, theirs, f"{i}.prefill", f"{i}.{yard.exact}") for i in each)), limits),
        Column("decode", worst(*(_rows(ours, ours, f"{i}.decode", f"{i}.prefill", len(ids[i])) for i in each)), limits),
    ]
    cached = [i for i in each if f"{i}.cached.logits" in ours]
    if cached:
        found = [_rows(ours, ours, f"{i}.cached", f"{i}.prefill") for i in cached]
        columns.append(Column("cached", worst(*found), limits))
    if spread is not None:
        found = [_rows(spread, ours, f"{i}.prefill", f"{i}.prefill") for i in each]
        if yard.exact == "rounded" and not _whole_groups(config):
            limits = np.maximum(limits, allowed("rounded", "float32"))
        columns.append(Column(f"tp {config.engine.tp}", worst(*found), limits))
    return columns


def _whole_groups(config: Config) -> bool:
    """Whether the ranks cut no group of weights in two, so that they round to the numbers of one rank."""
    from minisgl.model.shard import Shard

    tp = config.engine.tp
    shards = [Shard.of(config.model, rank, tp) for rank in range(tp)]
    return all(s.q_rows[0] % GROUP == s.mlp[0] % GROUP == 0 for s in shards)


def _changed(theirs: Arrays) -> list[str]:
    """What rounding the weights, which both sides compute with, has done to them."""
    faults = []
    for bits, bound in CHANGED.items():
        if f"changed.{bits}" in theirs:
            most = float(theirs[f"changed.{bits}"][0])
            print(f"weights rounded to {bits} bits: no matrix changes by more than {100 * most:.2f} %")
            if not most <= bound:
                faults.append(f"rounding to {bits} bits changes a matrix by {100 * most:.2f} % ({100 * bound:g} % allowed)")
    return faults


def _print_table(columns: list[Column]) -> list[str]:
    """One line per layer; returns a sentence for each column that is beyond its limit."""
    limits = columns[0].limits
    names = ["embedding", *(f"layer {i}" for i in range(limits.shape[1] - 2)), "logits"]

    def cell(pair: F32, mark: str = " ") -> str:
        return f"{pair[0]:.1e}/{pair[1]:.1e}{mark}".rjust(18)

    print(f"{'':<10}" + "".join(f"{c.name:>17} " for c in columns) + f"{'limits':>17}")
    for row, name in enumerate(names):
        cells = (cell(c.errors[:, row], " " if (c.errors[:, row] <= c.limits[:, row]).all() else "!") for c in columns)
        print(f"{name:<10}" + "".join(cells) + cell(limits[:, row]).rstrip())
    print("relative differences of the tokens, median/largest: prefill against transformers, the others against prefill")
    faults = []
    for c in columns:
        bad = c.first_bad()
        if bad is not None:
            found, allowed = (cell(pair[:, bad]).strip() for pair in (c.errors, c.limits))
            faults.append(f"{c.name}: {names[bad]} is the first that differs, by {found} ({allowed} allowed)")
    return faults


def _greedy(
    ids: list[list[int]], ours: Arrays, exact: list[F32], answers: Mapping[str, list[list[int]]], limit: float
) -> list[str]:
    """The engine's tokens must be the likeliest of the reference, or so near to it that rounding decides.

    Beyond the first token that the probe did not choose the reference knows nothing of the text.
    """
    faults = []
    for cache, texts in answers.items():
        same = judged = 0
        for i, (prompt, text) in enumerate(zip(ids, texts, strict=True)):
            known = ours[f"{i}.tokens"].tolist()
            for at, (token, logits) in enumerate(zip(text, exact[i][len(prompt) - 1 :], strict=True)):
                judged += 1
                same += int(token == int(logits.argmax()))
                gap = float(logits.max() - logits[token])
                if gap > 6 * limit * float(np.sqrt(np.mean(logits**2))):  # three deviations of each of the two
                    faults.append(
                        f"greedy ({cache} cache): prompt {i} differs at token {at} of {len(text)}: {token} is no choice"
                    )
                    break
                if token != known[at]:
                    break
        print(f"greedy tokens of the engine, {cache} cache: {same} of {judged} are those of transformers")
    return faults


def _perplexity(text: list[int], ours: Arrays, theirs: Arrays, yard: Yardstick) -> list[str]:
    """Of the first prompt."""
    length = len(text)

    def nll(logits: F32) -> npt.NDArray[np.float64]:
        rows = logits[: length - 1].astype(np.float64)
        rows -= rows.max(-1, keepdims=True)
        found: npt.NDArray[np.float64] = np.log(np.exp(rows).sum(-1)) - rows[np.arange(length - 1), text[1:]]
        return found

    mine, exact, rounded = (
        nll(a) for a in (ours["0.prefill.logits"], theirs[f"0.{yard.exact}.logits"], theirs[f"0.{yard.rough}.logits"])
    )
    allowed = max(yard.perplexity, SLACK * abs(float(np.expm1(np.mean(rounded - exact)))))
    off = abs(float(np.expm1(np.mean(mine - exact))))
    chance = 2 * float(np.std(mine - exact)) / (length - 1) ** 0.5  # rounding moves single tokens either way
    print(
        f"perplexity of a text of {length} tokens: {np.exp(mine.mean()):.4f}, transformers {np.exp(exact.mean()):.4f} "
        f"({100 * off:.3f} % apart, of which {100 * chance:.3f} % may be chance)"
    )
    if any(f"changed.{bits}" in theirs for bits in CHANGED):
        cost = float(np.expm1(np.mean(exact - nll(theirs["0.float32.logits"]))))
        print(f"perplexity that the rounding of weights adds: {100 * cost:.3f} %")
    if yard.wide and not math.isnan(off):
        off = max(0.0, off - chance)
    return [f"perplexity is {100 * off:.2f} % off ({100 * allowed:.2f} % allowed)"] if not off <= allowed else []
