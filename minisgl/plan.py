"""Defines the binary records that scheduler and workers exchange: one per step, in each direction.  numpy only.

`StepPlan`    scheduler -> every worker, through the plan ring.   What to run at step k.
`StepResult`  worker 0  -> scheduler,    through the token ring.  What step k sampled.

A worker keeps, by *slot*, everything a decode step needs (last token, KV length, page table, sampling parameters), so a plan
carries only what changed.  In steady state a decode plan is its 64-byte header and 12 bytes per page boundary crossed.

Layout of a plan (little-endian; the sections follow the header in this order):

    header        step i64 | kind u8 | SAME u8 | reserved u16 | the length of each section, u32[12] | 4 bytes of padding
    new_slots     a slot gets a new owner: its KV length (the cached prefix) and sampling parameters
    page_grants   page_table[slot, index] = page
    prefill       n_ids prompt tokens of a slot, appended at its KV length; `sample` DRAW: draw a token after the last one
    decode        slots that append their last token and draw the next; empty under SAME: the batch of the previous plan
    ids           i32, the prompt tokens of the prefill rows, concatenated
    extras        penalties, biases and log probabilities of a new slot, for the few requests that have any; NO_EXTRA resets
                  a slot whose new owner has none
    bias          n_bias rows for each extra: added to a token's logit; the token is impossible at positions below `until`
    history       i32, for each extra n_prompt tokens of the prompt and n_output of the answer so far, which penalties count
    targets       i32, for each prefill row with SCORE the prompt tokens that follow each of its tokens: n_ids of them, one
                  less where the row draws
    grammars      the grammar of a new slot, for the few requests that have one; n_bytes 0 resets a slot whose new owner has
                  none
    said          i32, for each grammar n_output tokens of the answer so far
    grammar_text  for each grammar n_bytes of UTF-8

A prefill row with SUM adds the final hidden states of its tokens to what its slot has of the same prompt (a row at position 0
begins anew).  With POOL, which comes with DRAW, the result has a vector: the mean of these, or the last state without SUM.

Order within a step: joins, extras, grants, then all rows at once.  The rows that sample are, in order: prefill rows with DRAW,
then the decode rows; `StepResult.tokens` has one token for each of them, or a negative number that says why there is none.
"""

from __future__ import annotations

import enum
import operator
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from minisgl.arrays import F32, I32

Rows = npt.NDArray[np.void]


def _row(**types: str) -> np.dtype[np.void]:
    """The dtype of a row, from the types of its columns."""
    return np.dtype(list(types.items()))


JOIN = _row(slot="<u4", kv_len="<i4", temperature="<f4", top_k="<i4", top_p="<f4", min_p="<f4", seed="<u8")
GRANT = _row(slot="<u4", index="<u4", page="<i4")
PREFILL = _row(slot="<u4", sample="<u4", n_ids="<i4")
# `logprobs`: log probabilities of each token and of this many alternatives; -1: of none.
EXTRA = _row(
    slot="<u4", presence="<f4", frequency="<f4", repetition="<f4", logprobs="<i4", n_bias="<i4", n_prompt="<i4", n_output="<i4"
)
BIAS = _row(token="<i4", value="<f4", until="<i4")
GRAMMAR = _row(slot="<u4", n_bytes="<i4", n_output="<i4")
NO_EXTRA = (0.0, 0.0, 1.0, -1, 0, 0, 0)  # an EXTRA without its slot
FAILED = -1  # instead of a token: the grammar could not go on
NOT_A_NUMBER = -2  # instead of a token: the logits are not finite numbers
DRAW, SCORE, SUM, POOL = 1, 2, 4, 8  # flags of a prefill row's `sample`
SCORED_TOKENS = 256  # most `targets` of one step: each has a row of logits, for which workers reserve memory
POOLED_ROWS = 64  # most vectors of one result


class PlanKind(enum.IntEnum):
    """What the workers do with a record.

    STOP travels in band so that all ranks leave at the same step, CAPTURE so that they capture the same graph at the same time,
    REJOIN so that a scheduler that takes over knows when the steps of the one before have ended.  None of them is a step: there
    is no result, and "the previous plan" is the one before.
    """

    STEP = 0
    STOP = 1
    CAPTURE = 2
    REJOIN = 3


_I32 = np.dtype("<i4")
_NO_SLOTS = np.zeros(0, _I32)
_HEADER = struct.Struct("<qBBH12I4x")  # step, kind, SAME, reserved, and the length of every section
_RESULT = struct.Struct("<qiiiiiii")
_SCORES = struct.Struct("<ii")


def _no(dtype: np.dtype[Any]) -> Callable[[], Any]:
    """Makes the default of a section: one empty array for all plans."""
    nothing = np.zeros(0, dtype)
    return lambda: nothing


@dataclass(slots=True)
class StepPlan:
    """One step; the arrays stand in the order of the record.  `decode=None` means "the same decode batch as in the previous
    plan" (never the first).
    """

    step: int
    kind: PlanKind = PlanKind.STEP
    new_slots: Rows = field(default_factory=_no(JOIN))
    page_grants: Rows = field(default_factory=_no(GRANT))
    prefill: Rows = field(default_factory=_no(PREFILL))
    decode: I32 | None = field(default_factory=_no(_I32))
    ids: I32 = field(default_factory=_no(_I32))
    extras: Rows = field(default_factory=_no(EXTRA))
    bias: Rows = field(default_factory=_no(BIAS))
    history: I32 = field(default_factory=_no(_I32))
    targets: I32 = field(default_factory=_no(_I32))
    grammars: Rows = field(default_factory=_no(GRAMMAR))
    said: I32 = field(default_factory=_no(_I32))
    grammar_text: bytes = b""

    def pack(self) -> bytes:
        """The record's bytes.  Runs in the scheduler process."""
        arrays = list(_arrays_of(self))
        if same := self.decode is None:
            arrays[_DECODE] = _NO_SLOTS
        lengths = list(map(len, arrays))
        head = _HEADER.pack(self.step, self.kind, same, 0, *lengths, len(self.grammar_text))
        sections = zip(arrays, lengths, _SECTIONS.values(), strict=True)
        parts = [array.astype(dtype, copy=False).tobytes() for array, n, dtype in sections if n]
        return b"".join([head, *parts, self.grammar_text])

    @classmethod
    def unpack(cls, raw: bytes) -> StepPlan:
        """Read a record; the arrays are read-only views of `raw`.  Runs in every worker.  Raises ValueError if malformed."""
        if len(raw) < _HEADER.size:
            raise ValueError(f"a plan has at least {_HEADER.size} bytes, got {len(raw)}")
        step, kind, same, _, *lengths, n_text = _HEADER.unpack_from(raw)
        at, arrays = _HEADER.size, {}
        for n, (name, dtype) in zip(lengths, _SECTIONS.items(), strict=True):
            if n:
                arrays[name] = np.frombuffer(raw, dtype, n, at)
                at += n * dtype.itemsize
        if at + n_text != len(raw):
            raise ValueError(f"plan {step} has {len(raw)} bytes, its header says {at + n_text}")
        plan = cls(step, PlanKind(kind), **arrays, grammar_text=raw[at:])
        if same:
            plan.decode = None
        return plan


_SECTIONS: dict[str, np.dtype[Any]] = {f.name: getattr(StepPlan(0), f.name).dtype for f in fields(StepPlan)[2:-1]}
_DECODE = tuple(_SECTIONS).index("decode")
_arrays_of = operator.attrgetter(*_SECTIONS)


def _ints(array: I32) -> bytes:
    return array.astype("<i4", copy=False).tobytes()


def _floats(array: F32) -> bytes:
    return array.astype("<f4", copy=False).tobytes()


@dataclass(slots=True)
class StepLogprobs:
    """Log probabilities of M tokens: the drawn tokens of slots that request them, in the order of the rows, then the plan's
    `targets`.  W is the largest number of alternatives that any of these slots requests; alternatives come most likely first,
    the smaller id first among equals.
    """

    logprobs: F32  # [M]
    top_ids: I32  # [M, W]
    top_logprobs: F32  # [M, W]

    def pack(self) -> bytes:
        """The end of a result's record."""
        head = _SCORES.pack(*self.top_ids.shape)
        return head + b"".join([_floats(self.logprobs), _ints(self.top_ids), _floats(self.top_logprobs)])

    @classmethod
    def unpack(cls, raw: bytes, at: int) -> StepLogprobs:
        """Read the record's bytes from `at` to the end.  Raises ValueError if malformed."""
        m, w = _SCORES.unpack_from(raw, at)
        at += _SCORES.size
        if min(m, w) < 0 or len(raw) != at + 4 * m * (1 + 2 * w):
            raise ValueError(f"a result with {m} scores has {len(raw)} bytes instead of {at + 4 * m * (1 + 2 * w)}")
        return cls(
            np.frombuffer(raw, "<f4", m, at),
            np.frombuffer(raw, "<i4", m * w, at + 4 * m).reshape(m, w),
            np.frombuffer(raw, "<f4", m * w, at + 4 * m * (1 + w)).reshape(m, w),
        )


@dataclass(slots=True)
class StepResult:
    """What one step sampled: `tokens` i32[rows], in the order of the plan, and what it took, in microseconds.

    `scores`: the requested log probabilities, None without any.  `vectors` f32[rows with POOL, hidden size].
    `busy_us`: how long the device computed; `idle_us`: how long it had waited for the step since the one before it ended, 0
    where the engine had nothing to do; `launch_us`: CPU time of the launch; `warmups`: graphs captured and kernels
    compiled in it.
    """

    step: int
    tokens: I32
    busy_us: int = 0
    idle_us: int = 0
    launch_us: int = 0
    scores: StepLogprobs | None = None
    vectors: F32 | None = None
    warmups: int = 0

    def pack(self) -> bytes:
        """The record's bytes.  Runs in worker 0."""
        shape = (0, 0) if self.vectors is None else self.vectors.shape
        head = _RESULT.pack(self.step, len(self.tokens), self.busy_us, self.idle_us, self.launch_us, self.warmups, *shape)
        vectors = b"" if self.vectors is None else _floats(self.vectors)
        return b"".join([head, _ints(self.tokens), vectors, b"" if self.scores is None else self.scores.pack()])

    @classmethod
    def unpack(cls, raw: bytes) -> StepResult:
        """Read a record.  Runs in the scheduler.  Raises ValueError if malformed."""
        if len(raw) < _RESULT.size:
            raise ValueError(f"a result has at least {_RESULT.size} bytes, got {len(raw)}")
        step, n, busy, idle, launch, warmups, m, width = _RESULT.unpack_from(raw)
        at = _RESULT.size + 4 * n
        end = at + 4 * m * width
        if min(n, m, width) < 0 or len(raw) < end or end < len(raw) < end + _SCORES.size:
            raise ValueError(f"result {step} has {len(raw)} bytes, its header says {end}")
        scores = StepLogprobs.unpack(raw, end) if len(raw) > end else None
        vectors = np.frombuffer(raw, "<f4", m * width, at).reshape(m, width) if m else None
        return cls(step, np.frombuffer(raw, "<i4", n, _RESULT.size), busy, idle, launch, scores, vectors, warmups)
