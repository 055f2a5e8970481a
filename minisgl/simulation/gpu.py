"""GPU cost models: predict the time of a step from a roofline per model, or from coefficients fitted to a real machine.

The roofline is that of Williams, Waterman and Patterson (2009): an operation takes as long as moving its bytes or doing its
arithmetic, whichever is longer.  A step runs three operations one after the other (all linear layers, attention, the LM head),
and has a fixed overhead.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from minisgl.arrays import F64
from minisgl.config import ModelSpec
from minisgl.errors import UserError
from minisgl.model.checkpoint.presets import SHAPES


@dataclass(frozen=True, slots=True)
class Work:
    """The work of one step, in tokens and rows.

    `pairs`: (query, key) pairs of all prefill tokens; `prefill_context`: tokens of KV that the prefill chunks read;
    `decode_context`: tokens of KV that the decode rows read (one query each, so also their pairs); `samples`: rows with logits.
    """

    prefill_tokens: int = 0
    pairs: int = 0
    prefill_context: int = 0
    decode_rows: int = 0
    decode_context: int = 0
    samples: int = 0


class CostModel(Protocol):
    """Predicts how long a step takes."""

    def seconds(self, work: Work) -> float:
        """Seconds of GPU time."""


# ---------------- roofline
@dataclass(frozen=True, slots=True)
class Machine:
    """Attainable rates.  The defaults were measured on one H200; see docs/simulator.md."""

    bandwidth: float = 4.26e12  # bytes/s: device-to-device copy
    kv_bandwidth: float = 3.8e12  # bytes/s: paged decode attention, 256 rows of 850 tokens
    flops: float = 690e12  # bf16 GEMM, 16384 x 34816 x 5120
    attention_flops: float = 500e12  # paged prefill attention, 8k tokens
    kernel_seconds: float = 1.5e-6  # per kernel, launched from a graph
    step_seconds: float = 150e-6  # launch of a step


@dataclass(frozen=True, slots=True)
class Roofline:
    """A dense decoder in bf16 on one GPU."""

    spec: ModelSpec
    machine: Machine = Machine()

    @property
    def layer_params(self) -> int:
        s = self.spec
        heads = (2 * s.num_heads + 2 * s.num_kv_heads) * s.head_dim
        return s.num_layers * s.hidden_size * (heads + 3 * s.intermediate_size)

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV per token."""
        return 4 * self.spec.num_kv_heads * self.spec.head_dim * self.spec.num_layers

    def seconds(self, work: Work) -> float:
        """Seconds of GPU time."""
        m, s, tokens = self.machine, self.spec, work.prefill_tokens + work.decode_rows
        linear = max(2 * self.layer_params / m.bandwidth, 2 * self.layer_params * tokens / m.flops)
        per_pair = 4 * s.num_heads * s.head_dim * s.num_layers
        prefill = max(work.prefill_context * self.kv_bytes / m.kv_bandwidth, work.pairs * per_pair / m.attention_flops)
        decode = max(work.decode_context * self.kv_bytes / m.kv_bandwidth, work.decode_context * per_pair / m.attention_flops)
        head_params = s.hidden_size * s.vocab_size
        logits = 4 * work.samples * s.vocab_size  # bf16, written by the GEMM and read by the sampler
        head = max((2 * head_params + logits) / m.bandwidth, 2 * head_params * work.samples / m.flops) if work.samples else 0.0
        return linear + prefill + decode + head + (9 * s.num_layers + 6) * m.kernel_seconds + m.step_seconds


PRESETS = {name: Roofline(spec) for name, spec in SHAPES.items() if not spec.num_experts}


# ---------------- fitted
@dataclass(frozen=True, slots=True)
class FittedCosts:
    """c0 + c1 * prefill tokens + c2 * decode rows + c3 * decode context + c4 * prefill pairs, in seconds."""

    c0: float
    c1: float
    c2: float
    c3: float
    c4: float = 0.0

    def seconds(self, work: Work) -> float:
        """Seconds of GPU time."""
        linear = self.c0 + self.c1 * work.prefill_tokens + self.c2 * work.decode_rows
        return linear + self.c3 * work.decode_context + self.c4 * work.pairs

    def to_json(self) -> str:
        """The text of a file for `read_costs`."""
        return json.dumps(asdict(self))


def read_costs(path: str) -> FittedCosts:
    """The coefficients in a file {"c0": seconds, "c1": ..., "c2": ..., "c3": ..., optionally "c4"}.  Raises UserError."""
    try:
        with open(path, encoding="utf-8") as file:
            row = json.load(file)
    except (OSError, ValueError) as e:
        raise UserError(f"--cost-json {path}: cannot be read ({e}).") from e
    if not isinstance(row, dict):
        raise UserError(f'--cost-json {path}: an object {{"c0": seconds, "c1": ..., "c2": ..., "c3": ...}} is expected.')
    values = {"c4": 0.0, **row}
    for name in ("c0", "c1", "c2", "c3", "c4"):
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise UserError(f"--cost-json {path}: {name} must be a number of seconds, not negative, got {value!r}.")
    costs = FittedCosts(*(float(values[name]) for name in ("c0", "c1", "c2", "c3", "c4")))
    if costs.seconds(Work(1, 1, 1, 1, 1, 1)) <= 0:
        raise UserError(f"--cost-json {path}: a step must take some time; all coefficients are 0.")
    return costs


def fit(works: list[Work], seconds: list[float]) -> FittedCosts:
    """Least squares of measured steps, with no negative coefficients.

    While a coefficient is negative (a step never takes less time for more work), the most negative one is dropped and the rest
    are fitted again.
    """
    rows = [[1, w.prefill_tokens, w.decode_rows, w.decode_context, w.pairs] for w in works]
    x: F64 = np.array(rows, np.float64).reshape(-1, 5)
    scale = np.maximum(np.abs(x).max(axis=0, initial=0.0), 1e-12)
    keep = list(range(5))
    coefficients = np.zeros(5)
    while keep:
        solved = np.linalg.lstsq(x[:, keep] / scale[keep], np.array(seconds), rcond=None)[0]
        if solved.min() >= 0:
            coefficients[keep] = solved / scale[keep]
            break
        keep.pop(int(solved.argmin()))
    return FittedCosts(*coefficients.tolist())
