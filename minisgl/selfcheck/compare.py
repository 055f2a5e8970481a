"""Compares the arrays of the engine with those of transformers: differences, their limits, and faults, for `minisgl selfcheck`.

Pure, except that every comparison prints its result.  "ours" are the arrays of selfcheck/probe.py, "theirs" those of
selfcheck/reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minisgl.arrays import F32
from minisgl.config import Config
from minisgl.model.common.shard import Shard

Arrays = Mapping[str, Any]

ROUNDING = 1e-4  # the relative difference of float32 results that different orders of summation may make
FLOAT8 = 0.2  # the same with 8-bit floats of a GPU in weights, activations or caches
SLACK = 3.0  # a limit over the reference's own rounding, to the dtype that is checked or to half precision (`Yardstick`)
PERPLEXITY = 1e-3
PERPLEXITY_WIDE = 0.01  # where single tokens may be far off
# The largest change of a matrix by rounding, |w' - w| / |w|, by the bits.  In a group of 32 with the largest weight a no number
# moves by more than half a step, a / 254, so the group moves by at most a sqrt(32) / 254, and its norm is at least a.  With 4
# bits a step is (high - low) / 15: the group moves by at most (high - low) sqrt(32) / 30, and its norm is at least
# (high - low) / sqrt(2).
CHANGED = {8: 0.023, 4: 0.27}
GROUP = 32  # weights that share a scale on a CPU


@dataclass(slots=True)
class Column:
    """One comparison: relative differences of the tokens' vectors, median and largest for each row, and their limits.

    The largest finds an error at one position; the median stays sharp where rounding spoils a few tokens.
    """

    name: str
    errors: F32  # [2, rows]
    limits: F32  # [2, rows]

    def first_bad(self) -> int | None:
        bad = np.flatnonzero(~(self.errors <= self.limits).all(0))  # NaN is bad
        return int(bad[0]) if len(bad) else None


@dataclass(frozen=True, slots=True)
class Yardstick:
    """The kinds of the reference's results that set the standard: ours must equal `exact` up to SLACK times the distance of
    `rough` from it.

    A CPU that computes on weights in 4 or 8 bits is compared with float32 on the same weights, so the limits need no room for
    the cost of the bits; the rounding itself is judged apart (`CHANGED`).
    """

    exact: str = "float32"
    rough: str = "float32"
    floor: float = ROUNDING  # the smallest limit
    largest: float = 0.0  # the smallest limit for a single token
    greedy: float = 0.0  # the smallest limit for a choice that is not the likeliest token
    perplexity: float = PERPLEXITY
    wide: bool = False  # single tokens may move the perplexity by chance

    @classmethod
    def of(cls, config: Config, theirs: Arrays) -> Yardstick:
        engine = config.engine
        if "0.rounded.logits" in theirs:
            if config.model.num_experts:  # rounding may send a token to another expert, which changes its full vector
                return cls("rounded", "half", largest=1.0, greedy=FLOAT8, perplexity=PERPLEXITY_WIDE, wide=True)
            return cls("rounded", "half")
        if engine.device == "cuda" and (engine.eight_bits or engine.kv_cache_dtype == "fp8"):
            perplexity = PERPLEXITY_WIDE if engine.eight_bits else PERPLEXITY
            return cls("float32", config.dtype, FLOAT8, perplexity=perplexity, wide=engine.eight_bits)
        return cls("float32", config.dtype)


def _difference(a: F32, b: F32) -> F32:
    """Median and largest over the tokens of |a - b| / |b|: [..., S, N] -> [2, ...]."""
    each = np.linalg.norm(a - b, axis=-1) / np.maximum(np.linalg.norm(b, axis=-1), 1e-30)
    return np.stack([np.median(each, -1), each.max(-1)]).astype(np.float32)


def rows_of(a: Arrays, b: Arrays, first: str, second: str, start: int = 0) -> F32:
    """Differences of "hidden" and "logits" under the prefixes `first` and `second`; the latter's rows begin at `start`."""
    n = min(len(a[f"{first}.logits"]), len(b[f"{second}.logits"]) - start)
    hidden = _difference(a[f"{first}.hidden"][:, -n:], b[f"{second}.hidden"][:, -n:])
    logits = _difference(a[f"{first}.logits"][-n:], b[f"{second}.logits"][-n:])
    return np.concatenate([hidden, logits[:, None]], 1)


def columns_of(config: Config, ids: list[list[int]], ours: Arrays, theirs: Arrays, spread: Arrays | None) -> list[Column]:
    """All comparisons; `spread`: the arrays of several ranks."""
    each, yard = range(len(ids)), Yardstick.of(config, theirs)

    def worst(*found: F32) -> F32:
        return np.asarray(np.max(found, axis=0), np.float32)

    def allowed(rough: str, exact: str) -> F32:
        rounding = worst(*(rows_of(theirs, theirs, f"{i}.{rough}", f"{i}.{exact}") for i in each))
        floor = [[yard.floor], [max(yard.floor, yard.largest)]]
        return np.maximum(SLACK * np.maximum.accumulate(rounding, 1), floor).astype(np.float32)

    limits = allowed(yard.rough, yard.exact)
    columns = [
        Column("transformers", worst(*(rows_of(ours, theirs, f"{i}.prefill", f"{i}.{yard.exact}") for i in each)), limits),
        Column("decode", worst(*(rows_of(ours, ours, f"{i}.decode", f"{i}.prefill", len(ids[i])) for i in each)), limits),
    ]
    cached = [i for i in each if f"{i}.cached.logits" in ours]
    if cached:
        found = [rows_of(ours, ours, f"{i}.cached", f"{i}.prefill") for i in cached]
        columns.append(Column("cached", worst(*found), limits))
    if spread is not None:
        found = [rows_of(spread, ours, f"{i}.prefill", f"{i}.prefill") for i in each]
        if yard.exact == "rounded" and not _ranks_keep_groups(config):
            limits = np.maximum(limits, allowed("rounded", "float32"))
        columns.append(Column(f"tp {config.engine.tp}", worst(*found), limits))
    return columns


def _ranks_keep_groups(config: Config) -> bool:
    """Whether no group of weights is cut between ranks, so that they round to the numbers of one rank."""
    tp = config.engine.tp
    shards = [Shard.of(config.model, rank, tp) for rank in range(tp)]
    return all(s.q_rows[0] % GROUP == s.mlp[0] % GROUP == 0 for s in shards)


def changed(theirs: Arrays) -> list[str]:
    """Print how much rounding has changed the weights, which both sides share; returns the faults."""
    faults = []
    for bits, bound in CHANGED.items():
        if f"changed.{bits}" in theirs:
            most = float(theirs[f"changed.{bits}"][0])
            print(f"weights rounded to {bits} bits: no matrix changes by more than {100 * most:.2f} %")
            if not most <= bound:
                faults.append(f"rounding to {bits} bits changes a matrix by {100 * most:.2f} % ({100 * bound:g} % allowed)")
    return faults


def print_table(columns: list[Column]) -> list[str]:
    """Print one line for each layer; returns a sentence for each column that exceeds its limit."""
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


def greedy(
    ids: list[list[int]], ours: Arrays, exact: list[F32], answers: Mapping[str, list[list[int]]], limit: float
) -> list[str]:
    """The engine's tokens must be the likeliest ones of the reference, or so near to them that rounding decides.

    A text is judged up to the first token that the probe did not choose: the reference has no logits for the rest.
    """
    faults = []
    for cache, texts in answers.items():
        same = judged = 0
        for i, (prompt, text) in enumerate(zip(ids, texts, strict=True)):
            known = ours[f"{i}.tokens"].tolist()
            for at, (token, logits) in enumerate(zip(text, exact[i][len(prompt) - 1 :], strict=True)):
                judged += 1
                if token == int(logits.argmax()):
                    same += 1
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


def perplexity(text: list[int], ours: Arrays, theirs: Arrays, yard: Yardstick) -> list[str]:
    """Compare the perplexity of the first prompt; returns the faults."""
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
