"""Computes sizes in memory that follow from a model's sizes alone: packed weights, KV pages, reserves.  No torch.

Runners size their memory by these functions, and `minisgl fit` predicts it by the same ones, before any weight is loaded.
"""

from __future__ import annotations

from minisgl.config import EngineConfig, ModelSpec
from minisgl.model.common.host import MAX_KV_TOKENS
from minisgl.model.common.shard import Shard
from minisgl.sampling_params import MAX_EOS_IDS, MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS

STORED_BITS = {2: 4, 3: 4, 8: 8}  # ggml's numbers of the types Q4_0, Q4_1 and Q8_0, and the bits of their numbers
LANES = 16  # outputs in a block of a packed matrix
BLOCK_BYTES = {4: 320, 8: 544}  # of LANES outputs and GROUP inputs: numbers, scales, and offsets of 4 bits
MAX_DIM = 512  # of a head that the C kernel of attention serves
MAX_BIAS = MAX_LOGIT_BIAS + MAX_STOP_TOKEN_IDS + MAX_EOS_IDS  # logits of a slot that are adjusted


# ---------------- weights
def bits_of(kind: str, stored: list[int]) -> int:
    """Bits of the weights of one product, which all have the same.  stored: bits of the parts in their file; 0: other types."""
    if kind != "int8" and set(stored) == {4}:
        return 4
    # The table of tokens is often the head, too, where 4 bits cost most: it stays at 8 unless it is stored in 4.
    return 4 if kind == "q4" and not stored[0] else 8


# ---------------- KV cache
def token_bytes(spec: ModelSpec, shard: Shard, item: int) -> int:
    """Bytes of the KV cache for one token over all layers of a rank.  item: bytes of a number."""
    return spec.num_layers * 2 * shard.num_kv_heads * spec.head_dim * item


def can_attend(spec: ModelSpec, page_size: int) -> bool:
    """Whether the C kernel of attention, with its cache in half precision, serves this model with this page size."""
    rotary = spec.rotary_dim or spec.head_dim
    return page_size % LANES == 0 and spec.head_dim % LANES == 0 and spec.head_dim <= MAX_DIM and rotary % 2 == 0


def host_pages(engine: EngineConfig, max_context: int, token: int, available: int) -> int:
    """Pages of a KV cache in the memory of the host, for each of its ranks; 0 where none fits.

    token: bytes of one token; available: bytes that are free when the weights are loaded.
    """
    if engine.kv_tokens:
        tokens = engine.kv_tokens
    else:
        share = int(available * engine.memory_fraction) // engine.tp // (engine.page_size * token) * engine.page_size
        tokens = min(share, engine.max_running * max_context, MAX_KV_TOKENS)
    return -(-tokens // engine.page_size)


def host_line(weights: int, available: int, tokens: int, token: int) -> str:
    """The line at the start of a CPU server: where a rank's memory goes.  The KV cache takes its bytes as it fills."""
    gib = 1 << 30
    return (
        f"CPU: {weights / gib:.2f} GiB weights, then {available / gib:.1f} GiB available, of which the KV cache may take "
        f"{tokens * token / gib:.2f} ({tokens} tokens)"
    )


# ---------------- reserves of a GPU
def extras_bytes(slots: int, vocab: int) -> int:
    """Bytes of biases and counts by slot, with the adjusted logits of a step of as many rows."""
    return 4 * slots * (2 * vocab + 3 * MAX_BIAS)
