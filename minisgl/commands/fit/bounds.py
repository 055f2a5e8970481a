"""Lower bounds on times from a roofline: bytes over bandwidth, or arithmetic over its peak, whichever is longer.

The roofline is that of Williams, Waterman and Patterson (2009).  No schedule and no kernel is faster on that hardware; what the
engine reaches is slower, by the launches, the exchange between ranks and how far its kernels are from the peaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from minisgl.commands.fit.estimate import Estimate, matrix_bytes
from minisgl.commands.fit.predict import ITEM_BYTES, MatrixBytes, head_of, matrices
from minisgl.config import Config
from minisgl.model.common.shard import Shard


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes that one rank moves and operations that it does, at 16 bits and at 8."""

    bytes: float
    flops: float
    fp8_flops: float = 0.0


@dataclass(frozen=True)
class Bounds:
    """Of one model on one hardware.  Seconds are None where neither bandwidth nor arithmetic of the hardware is known."""

    estimate: Estimate

    def seconds(self, work: Work) -> float | None:
        """The longer of both."""
        h = self.estimate.hardware
        fp8 = work.fp8_flops / h.fp8_flops if h.fp8_flops else 0.0
        times = [work.bytes / h.bandwidth] if h.bandwidth else []
        times += [work.flops / h.flops + fp8] if h.flops else []
        return max(times, default=None)

    def decode(self, rows: int, context: int) -> Work:
        """One step of `rows` decodes, each of which attends to `context` tokens."""
        spec, shard = self.estimate.spec, self._shard
        weights, linear = self._products(rows)
        head = head_of(spec, shard)
        weights += self._size(head)
        read = rows * sum(self._seen(layer, context) for layer in range(spec.num_layers))
        attention = 4.0 * read * shard.num_heads * spec.head_dim
        more = 2.0 * rows * head.outputs * head.inputs + attention
        return self._work(weights + read * self.estimate.token / spec.num_layers, linear, more)

    def prefill(self, tokens: int) -> Work:
        """A prompt of so many tokens, in chunks of --step-tokens that each read the weights."""
        spec, shard, step = self.estimate.spec, self._shard, self.estimate.engine.step_tokens
        weights, linear = self._products(tokens)
        pairs = sum(self._pairs(layer, tokens) for layer in range(spec.num_layers))
        head = head_of(spec, shard)
        more = 4.0 * pairs * shard.num_heads * spec.head_dim + 2.0 * head.outputs * head.inputs
        read = weights * -(-tokens // step) + self._size(head) + tokens * self.estimate.token
        return self._work(read, linear, more)

    # ---------------- parts
    @cached_property
    def _shard(self) -> Shard:
        return Shard.of(self.estimate.spec, 0, self.estimate.engine.tp)

    @cached_property
    def _size(self) -> MatrixBytes:
        e = self.estimate
        return matrix_bytes(e.spec, e.engine, ITEM_BYTES[Config(e.spec, e.engine).dtype], kernels=True)

    def _work(self, read: float, linear: float, more: float) -> Work:
        eight = self.estimate.engine.quantization == "fp8"
        return Work(read, more, linear) if eight else Work(read, linear + more)

    def _products(self, rows: int) -> tuple[float, float]:
        """(bytes of weights that `rows` tokens read, operations of their products), without the head.

        Of experts those that any of the rows chooses, where each chooses evenly: E (1 - (1 - k / E)^rows).
        """
        spec, read, flops = self.estimate.spec, 0.0, 0.0
        share = spec.experts_per_token / spec.num_experts if spec.num_experts else 1.0
        for matrix in matrices(spec, self._shard):
            chosen = share if matrix.kind == "experts" else 1.0
            read += self._size(matrix) * (1.0 - (1.0 - chosen) ** rows)
            flops += 2.0 * rows * chosen * matrix.count * matrix.outputs * matrix.inputs
        return read, flops

    def _seen(self, layer: int, context: int) -> int:
        """Tokens that one query of a layer sees."""
        window = self.estimate.spec.window(layer)
        return min(context, window) if window else context

    def _pairs(self, layer: int, tokens: int) -> int:
        """(query, key) pairs of a prompt in a layer."""
        seen = self._seen(layer, tokens)
        return seen * (seen + 1) // 2 + (tokens - seen) * seen
