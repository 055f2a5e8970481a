"""Predicts what the workers measure at a start: the bytes of weights by part, and of the largest step.  No torch.

tests/model/test_memory.py compares the weights, to the byte, with the tensors that ranks build of every architecture, and the
steps with what GPUs have measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minisgl.config import EngineConfig, ModelSpec
from minisgl.model.common.memory import BLOCK_BYTES, LANES, STORED_BITS, bits_of
from minisgl.model.common.shard import GROUP, Shard
from minisgl.model.cuda.attention.requirements import WIDENED_BYTES, WORKSPACE_BYTES

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
_LIBRARY_BYTES = 56 << 20  # workspaces of cuBLAS on this generation, and the integers of FlashInfer's plans
_RANK_ROWS = 8  # tensors [T, C] that several ranks need besides to add up: what two of them took more than this formula


# ---------------- weights
@dataclass(frozen=True, slots=True)
class Matrix:
    """One product's weight on a rank, [outputs, inputs]; `parts` of the checkpoint stand on top of each other in it."""

    kind: str  # "attention" | "mlp" | "experts" | "head"
    layer: int  # -1: the head
    parts: tuple[str, ...]
    outputs: int
    inputs: int
    cut: bool = False  # the inputs of this rank begin or end within a group of GROUP
    count: int = 1  # as many of them


MatrixBytes = Callable[[Matrix], int]


def matrices(spec: ModelSpec, shard: Shard) -> Iterator[Matrix]:
    """Every product of the decoder but routers and the head."""
    q, kv, mlp, expert = (end - start for start, end in (shard.q_rows, shard.kv_rows, shard.mlp, shard.expert))
    hidden, odd_q, odd_mlp = spec.hidden_size, _within(shard.q_rows), _within(shard.mlp)
    for layer in range(spec.num_layers):
        yield Matrix("attention", layer, ("q_proj", "k_proj", "v_proj"), q + 2 * kv, hidden)
        yield Matrix("attention", layer, ("o_proj",), hidden, q, odd_q)
        if spec.has_experts(layer):
            yield Matrix("experts", layer, ("gate_up",), 2 * expert, hidden, count=spec.num_experts)
            yield Matrix("experts", layer, ("down",), hidden, expert, count=spec.num_experts)
        else:
            yield Matrix("mlp", layer, ("gate_proj", "up_proj"), 2 * mlp, hidden)
            yield Matrix("mlp", layer, ("down_proj",), hidden, mlp, odd_mlp)


def head_of(spec: ModelSpec, shard: Shard) -> Matrix:
    """The product that gives the logits; its weight may be the table of the embedding."""
    part = "embed_tokens" if spec.tie_embeddings else "lm_head"
    return Matrix("head", -1, (part,), shard.vocab[1] - shard.vocab[0], spec.hidden_size)


def _within(columns: tuple[int, int]) -> bool:
    return any(end % GROUP for end in columns)


def in_dtype(item: int) -> MatrixBytes:
    """Matrices as they are, `item` bytes a number."""
    return lambda m: m.count * m.outputs * m.inputs * item


def in_fp8(item: int) -> MatrixBytes:
    """A byte for each number and a float32 for each output; the head keeps its `item` bytes."""
    plain = in_dtype(item)
    return lambda m: plain(m) if m.kind == "head" else m.count * m.outputs * (m.inputs + 4)


def in_blocks(kind: str, stored: Callable[[int, str], int]) -> MatrixBytes:
    """Blocks of 4 or 8 bits, as the C kernels read them; experts keep four bytes.

    kind: see `EngineConfig.quantization`.  stored: (layer, part) -> ggml's number of the type that the file has.
    """

    def size(m: Matrix) -> int:
        if m.kind == "experts":
            return in_dtype(4)(m)
        found = [0 if m.cut else STORED_BITS.get(stored(m.layer, part), 0) for part in m.parts]
        bits = bits_of(kind, found)
        return -(-m.outputs // LANES) * -(-m.inputs // GROUP) * BLOCK_BYTES[bits]

    return size


_PACKED = {2: (4, 32), 3: (4, 32), 8: (8, 32), 12: (4, 32), 13: (8, 32), 14: (8, 16)}  # ggml's type -> bits, inputs of a scale


def in_packed(item: int, spec: ModelSpec, stored: Callable[[int, str], int]) -> MatrixBytes:
    """Numbers of 4 or 8 bits, and four bytes for each output and group of inputs, where all parts of a product have them.

    stored: as for `in_blocks`.
    """
    form = spec.weight_format

    def kind(layer: int, part: str) -> tuple[int, int]:
        if form is not None and form.bits in (4, 8) and layer >= 0:
            return form.bits, form.group_size
        return _PACKED.get(stored(layer, part), (0, 0))

    def size(m: Matrix) -> int:
        found = [kind(m.layer, part) for part in m.parts] if m.kind != "experts" and not m.cut else [(0, 0)]
        if any(bits == 0 for bits, _ in found):
            return in_dtype(item)(m)
        bits, group = max(bits for bits, _ in found), min(group for _, group in found)
        block = (32 if group <= 0 or group % 32 == 0 else 16) * 16 // bits
        inputs = -(-m.inputs // block) * block
        group = inputs if group <= 0 or group >= m.inputs else group if group % block == 0 else math.gcd(group, block)
        return m.outputs * (inputs * bits // 8 + 4 * -(-inputs // group))

    return size


def weight_bytes(spec: ModelSpec, shard: Shard, item: int, size: MatrixBytes, *, separate_head: bool = False) -> dict[str, int]:
    """Bytes by part of the model on one rank.

    item: bytes of a number of the embedding, norms and biases.  separate_head: a head that is tied to the embedding has a copy.
    """
    hidden, head = spec.hidden_size, head_of(spec, shard)
    found = {"embedding": head.outputs * hidden * item, "attention": 0, "mlp": 0, "experts": 0, "head": 0, "norms": 0}
    for matrix in matrices(spec, shard):
        found[matrix.kind] += size(matrix)
    if separate_head or not spec.tie_embeddings:
        found["head"] = size(head)
    gemma = spec.architecture.startswith("Gemma")
    norms = (spec.num_layers * (4 if gemma else 2) + 1) * hidden + spec.num_layers * 2 * spec.head_dim * spec.qk_norm
    found["norms"] = norms * (4 if gemma else item)
    (q0, q1), (kv0, kv1), (e0, e1) = shard.q_rows, shard.kv_rows, shard.expert
    biases = spec.qkv_bias * (q1 - q0 + 2 * (kv1 - kv0)) + spec.o_bias * hidden * (shard.rank == 0)
    found["attention"] += spec.num_layers * (biases * item + spec.sinks * 4 * (shard.heads[1] - shard.heads[0]))
    if spec.num_experts:
        layers, biased = spec.num_layers - len(spec.dense_layers), spec.activation == "clamped_swiglu"
        numbers = hidden + biased * (1 + 2 * (e1 - e0) + hidden)  # of the router, and biases
        found["experts"] += layers * spec.num_experts * numbers * item
    return {part: n for part, n in found.items() if n}


# ---------------- steps of a GPU
def state_bytes(engine: EngineConfig, max_context: int) -> int:
    """Page tables and inputs by slot, which the workers count with the weights."""
    return 4 * (engine.max_running + 1) * -(-max_context // engine.page_size) + 8 * engine.step_tokens


def largest_step(engine: EngineConfig, spec: ModelSpec, shard: Shard, item: int, *, flashinfer: bool = True) -> int:
    """About the bytes of the largest step; within 0.1 GiB of what H200s measured for dense bfloat16 models (benchmarks.md).

    Alive at the widest place: the residual stream, the outputs of two blocks, the norm's, and gate and up with their product.
    """
    tokens, hidden, fp8 = engine.step_tokens, spec.hidden_size, engine.quantization == "fp8"
    inner = shard.mlp[1] - shard.mlp[0]
    if spec.num_experts:  # every choice has a row of its own, and its part of the sum
        inner = max(inner if spec.dense_layers else 0, spec.experts_per_token * (shard.expert[1] - shard.expert[0]))
        hidden += spec.experts_per_token * hidden // 4
    widest = tokens * (3 * hidden * item + (hidden + inner) * (1 if fp8 else item) + 2 * inner * item)
    if shard.size > 1:
        widest += _RANK_ROWS * tokens * spec.hidden_size * item
    rows = min(engine.max_running, tokens)
    step = max(widest, rows * spec.vocab_size * item * (2 if engine.tp == 1 else 3)) + _LIBRARY_BYTES
    if flashinfer:
        step += WORKSPACE_BYTES + (WIDENED_BYTES if engine.kv_cache_dtype == "fp8" else 0)
    return step
