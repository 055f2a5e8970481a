"""The contract between scheduler and workers: one binary record per step, in each direction.  numpy only.

`StepPlan`    scheduler -> every worker, through the plan ring.   What to run at step k.
`StepResult`  worker 0  -> scheduler,    through the token ring.  What step k sampled.

A worker keeps, by *slot*, everything a decode step needs (last token, KV length, page table, sampling parameters), so a plan
carries only what changed.  In steady state a decode plan is its 64-byte header and 12 bytes per page boundary crossed.

Layout of a plan (little-endian; the arrays follow the header in this order):

    header   step i64 | kind u8 | flags u8 | reserved u16 | n_join u32 | n_grant u32 | n_prefill u32 | n_decode u32 | n_ids u32
             | n_extra u32 | n_targets u32 | n_grammars u32
    join     a slot gets a new owner: its KV length (the cached prefix) and sampling parameters
    grant    page_table[slot, index] = page
    prefill  n_ids prompt tokens of a slot, appended at its KV length; `sample` DRAW: draw a token after the last one
    decode   slots that append their last token and draw the next; omitted under SAME: the batch of the previous plan
    ids      i32, the prompt tokens of the prefill rows, concatenated
    extra    penalties, biases and log probabilities of a slot that joins, for the few requests that have any, and once more
             (NO_EXTRA) when such a slot gets an owner without
    bias     n_bias rows for each extra: added to a token's logit; the token is impossible at positions below `until`
    history  i32, for each extra n_prompt tokens of the prompt and n_output of the answer so far, which penalties count
    targets  i32, for each prefill row with SCORE the tokens that follow each of its tokens in the prompt: n_ids of them, one
             less where the row draws
    grammar  the grammar of a slot that joins, for the few requests that have one, and once more (no bytes) when such a slot
             gets an owner without
    said     i32, for each grammar n_output tokens of the answer so far
    text     for each grammar n_bytes of UTF-8

A prefill row with SUM adds the final hidden states of its tokens to what its slot has of the same prompt (a row at position 0
begins anew).  With POOL, which comes with DRAW, the result has a vector: the mean of these, or the last state without SUM.

Order within a step: joins, extras, grants, then all rows at once.  The rows that sample are, in order: prefill rows with DRAW,
then the decode rows; `StepResult.tokens` has one token for each of them, FAILED where a grammar could not go on.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from minisgl.arrays import F32, I32

Rows = npt.NDArray[np.void]

JOIN = np.dtype(
    [
        ("slot", "<u4"),
        ("kv_len", "<i4"),
        ("temperature", "<f4"),
        ("top_k", "<i4"),
        ("top_p", "<f4"),
        ("min_p", "<f4"),
        ("seed", "<u8"),
    ]
)
GRANT = np.dtype([("slot", "<u4"), ("index", "<u4"), ("page", "<i4")])
PREFILL = np.dtype([("slot", "<u4"), ("sample", "<u4"), ("n_ids", "<i4")])
EXTRA = np.dtype(
    [
        ("slot", "<u4"),
        ("presence", "<f4"),
        ("frequency", "<f4"),
        ("repetition", "<f4"),
        ("logprobs", "<i4"),  # alternatives to each token whose log probabilities are wanted; -1: nothing is wanted
        ("n_bias", "<i4"),
        ("n_prompt", "<i4"),
        ("n_output", "<i4"),
    ]
)
BIAS = np.dtype([("token", "<i4"), ("value", "<f4"), ("until", "<i4")])
GRAMMAR = np.dtype([("slot", "<u4"), ("n_bytes", "<i4"), ("n_output", "<i4")])
NO_EXTRA = (0.0, 0.0, 1.0, -1, 0, 0, 0)  # an EXTRA without its slot
FAILED = -1  # instead of a token
DRAW, SCORE, SUM, POOL = 1, 2, 4, 8  # flags of a prefill row's `sample`
SCORED_TOKENS = 256  # `targets` of one step at most: each has a row of logits, for which workers set memory aside
POOLED_ROWS = 64  # vectors that one result may have

_HEADER = struct.Struct("<qBBHIIIIIIII")
HEADER_BYTES = 64
_SAME = 1
_RESULT = struct.Struct("<qiiiiiii")
_SCORES = struct.Struct("<ii")


class PlanKind(enum.IntEnum):
    """What a record asks of the workers.

    STOP travels in band so that all ranks leave at the same step, CAPTURE so that they capture the same graph at the same time.
    Neither is a step: there is no result, and "the previous plan" is the one before.
    """

    STEP = 0
    STOP = 1
    CAPTURE = 2


def _rows(dtype: np.dtype[np.void]) -> Rows:
    return np.zeros(0, dtype)


def _ints() -> I32:
    return np.zeros(0, np.int32)


@dataclass(slots=True)
class StepPlan:
    """One step.  `decode=None` means "the same decode batch as in the previous plan" (never the first)."""

    step: int
    kind: PlanKind = PlanKind.STEP
    new_slots: Rows = field(default_factory=lambda: _rows(JOIN))
    page_grants: Rows = field(default_factory=lambda: _rows(GRANT))
    prefill: Rows = field(default_factory=lambda: _rows(PREFILL))
    decode: I32 | None = field(default_factory=_ints)
    ids: I32 = field(default_factory=_ints)
    extras: Rows = field(default_factory=lambda: _rows(EXTRA))
    bias: Rows = field(default_factory=lambda: _rows(BIAS))
    history: I32 = field(default_factory=_ints)
    targets: I32 = field(default_factory=_ints)
    grammars: Rows = field(default_factory=lambda: _rows(GRAMMAR))
    said: I32 = field(default_factory=_ints)
    grammar_text: bytes = b""

    def pack(self) -> bytes:
        """The record's bytes.  Runs in the scheduler process."""
        same = self.decode is None
        n_decode = 0 if self.decode is None else len(self.decode)
        head = _HEADER.pack(
            self.step,
            self.kind,
            _SAME if same else 0,
            0,
            len(self.new_slots),
            len(self.page_grants),
            len(self.prefill),
            n_decode,
            len(self.ids),
            len(self.extras),
            len(self.targets),
            len(self.grammars),
        )
        parts = [head.ljust(HEADER_BYTES, b"\0"), self.new_slots.tobytes(), self.page_grants.tobytes(), self.prefill.tobytes()]
        if self.decode is not None:
            parts.append(self.decode.astype("<i4", copy=False).tobytes())
        parts.append(self.ids.astype("<i4", copy=False).tobytes())
        if len(self.extras):
            parts += [self.extras.tobytes(), self.bias.tobytes(), self.history.astype("<i4", copy=False).tobytes()]
        if len(self.targets):
            parts.append(self.targets.astype("<i4", copy=False).tobytes())
        if len(self.grammars):
            parts += [self.grammars.tobytes(), self.said.astype("<i4", copy=False).tobytes(), self.grammar_text]
        return b"".join(parts)

    @classmethod
    def unpack(cls, raw: bytes) -> StepPlan:
        """Read a record; the arrays are read-only views of `raw`.  Runs in every worker.  Raises ValueError if malformed."""
        if len(raw) < HEADER_BYTES:
            raise ValueError(f"a plan has at least {HEADER_BYTES} bytes, got {len(raw)}")
        step, kind, flags, _, n_new_slots, n_page_grants, n_prefill, n_decode, n_ids, n_extra, n_targets, n_grammars = (
            _HEADER.unpack_from(raw)
        )
        at = HEADER_BYTES
        new_slots = np.frombuffer(raw, JOIN, n_new_slots, at)
        at += new_slots.nbytes
        page_grants = np.frombuffer(raw, GRANT, n_page_grants, at)
        at += page_grants.nbytes
        prefill = np.frombuffer(raw, PREFILL, n_prefill, at)
        at += prefill.nbytes
        decode = None if flags & _SAME else np.frombuffer(raw, "<i4", n_decode, at)
        at += 0 if decode is None else decode.nbytes
        ids = np.frombuffer(raw, "<i4", n_ids, at)
        at += ids.nbytes
        plan = cls(step, PlanKind(kind), new_slots, page_grants, prefill, decode, ids)
        if n_extra:
            plan.extras = np.frombuffer(raw, EXTRA, n_extra, at)
            at += plan.extras.nbytes
            plan.bias = np.frombuffer(raw, BIAS, int(plan.extras["n_bias"].sum()), at)
            at += plan.bias.nbytes
            plan.history = np.frombuffer(raw, "<i4", int((plan.extras["n_prompt"] + plan.extras["n_output"]).sum()), at)
            at += plan.history.nbytes
        if n_targets:
            plan.targets = np.frombuffer(raw, "<i4", n_targets, at)
            at += plan.targets.nbytes
        if n_grammars:
            plan.grammars = np.frombuffer(raw, GRAMMAR, n_grammars, at)
            at += plan.grammars.nbytes
            plan.said = np.frombuffer(raw, "<i4", int(plan.grammars["n_output"].sum()), at)
            at += plan.said.nbytes
            plan.grammar_text = raw[at : at + int(plan.grammars["n_bytes"].sum())]
            at += int(plan.grammars["n_bytes"].sum())
        if at != len(raw):
            raise ValueError(f"plan {step} has {len(raw)} bytes, its header says {at}")
        return plan


@dataclass(slots=True)
class StepLogprobs:
    """Log probabilities of M tokens: of the drawn tokens of slots that want them, in the order of the rows, then of the plan's
    `targets`.  W is the largest number of alternatives that any of these slots wants; alternatives come most likely first,
    the smaller id first among equals.
    """

    logprobs: F32  # [M]
    top_ids: I32  # [M, W]
    top_logprobs: F32  # [M, W]

    def pack(self) -> bytes:
        """The end of a result's record."""
        head = _SCORES.pack(*self.top_ids.shape)
        return b"".join(
            [
                head,
                self.logprobs.astype("<f4", copy=False).tobytes(),
                self.top_ids.astype("<i4", copy=False).tobytes(),
                self.top_logprobs.astype("<f4", copy=False).tobytes(),
            ]
        )

    @classmethod
    def unpack(cls, raw: bytes, at: int) -> StepLogprobs:
        """Read what stands at `at`.  Raises ValueError if it does not reach to the end."""
        m, w = _SCORES.unpack_from(raw, at)
        at += _SCORES.size
        if len(raw) != at + 4 * m * (1 + 2 * w):
            raise ValueError(f"a result with {m} scores has {len(raw)} bytes instead of {at + 4 * m * (1 + 2 * w)}")
        return cls(
            np.frombuffer(raw, "<f4", m, at),
            np.frombuffer(raw, "<i4", m * w, at + 4 * m).reshape(m, w),
            np.frombuffer(raw, "<f4", m * w, at + 4 * m * (1 + w)).reshape(m, w),
        )


@dataclass(slots=True)
class StepResult:
    """What one step sampled: `tokens` i32[rows], in the order of the plan, and what it took, in microseconds.

    `scores`: the log probabilities that were asked for, None if none were.  `vectors` f32[rows with POOL, hidden size].
    `busy_us`: how long the device computed; `idle_us`: how long it had waited for the step since the one before it ended, 0
    where nothing was to be done; `launch_us`: CPU time of the launch; `warmups`: graphs captured and kernels compiled in it.
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
        tokens = self.tokens.astype("<i4", copy=False).tobytes()
        if self.vectors is not None:
            tokens += self.vectors.astype("<f4", copy=False).tobytes()
        return head + tokens if self.scores is None else head + tokens + self.scores.pack()

    @classmethod
    def unpack(cls, raw: bytes) -> StepResult:
        """Read a record.  Runs in the scheduler.  Raises ValueError if malformed."""
        step, n, busy, idle, launch, warmups, m, width = _RESULT.unpack_from(raw)
        at = _RESULT.size + 4 * n
        end = at + 4 * m * width
        if len(raw) < end or end < len(raw) < end + _SCORES.size:
            raise ValueError(f"result {step} has {len(raw)} bytes, its header says {end}")
        scores = StepLogprobs.unpack(raw, end) if len(raw) > end else None
        vectors = np.frombuffer(raw, "<f4", m * width, at).reshape(m, width) if m else None
        return cls(step, np.frombuffer(raw, "<i4", n, _RESULT.size), busy, idle, launch, scores, vectors, warmups)
