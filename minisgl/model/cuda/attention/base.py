"""Attention on a GPU: what every backend offers, and the part that all share.  Runs in the workers.

`PagedAttention` is what the model calls: it normalises and rotates the heads, writes keys and values to the cache, and hands
prompt chunks to one backend and decode rows to another.  A backend is one file:

    triton      (attention_triton)      our kernels: decode at the bandwidth of the memory, no plan on the host, any head size
    flashinfer  (attention_flashinfer)  prefill with FA3 or FA2 at the rate of the matrix units
    torch       (attention_torch)       the readable reference

`choose` takes, for each of the two tasks, the first of them that can do it; `--attention-backend` names one for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch

from minisgl.config import EngineConfig, ModelSpec
from minisgl.errors import UserError
from minisgl.model.common.shard import Shard
from minisgl.model.cpu.layers import QKNorm
from minisgl.model.cuda.kv_cache import FP8, KVCache
from minisgl.model.kernels.activations import Product
from minisgl.model.kernels.qk_norm_rope import prepare_heads
from minisgl.plan import I32


@dataclass(frozen=True, slots=True)
class Heads:
    """What a backend must be able to do.  `capability`: 90 for compute capability 9.0."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    capability: int
    windows: tuple[int, ...] = ()  # by layer, and so on: see ModelSpec
    scale: float = 0.0
    softcap: float = 0.0
    sinks: bool = False

    @classmethod
    def of(cls, spec: ModelSpec, shard: Shard, dtype: torch.dtype, kv_dtype: torch.dtype, capability: int) -> Heads:
        """Those of a rank."""
        return cls(
            num_heads=shard.num_heads,
            num_kv_heads=shard.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=dtype,
            kv_dtype=kv_dtype,
            capability=capability,
            windows=spec.windows,
            scale=spec.scale,
            softcap=spec.attn_softcap,
            sinks=spec.sinks,
        )

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def window(self, layer: int) -> int:
        """Tokens that a query of `layer` sees, its own included; 0: all."""
        return self.windows[layer] if self.windows else 0


@dataclass(frozen=True, slots=True)
class Chunks:
    """Prompt chunks of a step, on the host: the tokens of chunk i are the last chunk_lens[i] of kv_lens[i] in slots[i]."""

    chunk_lens: I32
    kv_lens: I32
    slots: I32
    pages: I32  # [P, pages of the longest row]
    tiles: torch.Tensor | None = None  # on the device, for backends that want them; fixed in number inside a graph


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Decode rows of a step, on the device, and their lengths as the host knows them (None inside a graph)."""

    slots: torch.Tensor  # i32[B]
    kv_lens: torch.Tensor  # i32[B]
    splits: int  # parts that each row is cut into
    host_kv_lens: I32 | None = None
    host_pages: I32 | None = None


class Backend(Protocol):
    """Attention over a KVCache.  `plan_*` once per step, then `prefill` or `decode` for every layer."""

    graphs: ClassVar[bool]  # whether `decode` can be part of a CUDA graph, planned or not

    def __init__(self, heads: Heads, cache: KVCache, page_table: torch.Tensor) -> None:
        """page_table i32 [slots, pages per slot] is read when a step runs."""

    @classmethod
    def refuses(cls, heads: Heads, task: str) -> str | None:
        """Why this backend cannot do `task` ("prefill" or "decode") for these heads here; None if it can."""

    def plan_prefill(self, chunks: Chunks) -> None:
        """Prepare a step's chunks."""

    def prefill(self, q: torch.Tensor, layer: int, sinks: torch.Tensor | None) -> torch.Tensor:
        """Causal attention of the chunks' queries [T, H, D] -> [T, H, D].  sinks f32[H]: see AttentionBackend."""

    def plan_decode(self, rows: DecodeRows) -> None:
        """Prepare a step's decode rows."""

    def decode(self, q: torch.Tensor, layer: int, sinks: torch.Tensor | None) -> torch.Tensor:
        """Attention of one query per row [B, H, D] -> [B, H, D]."""


def find(name: str) -> type[Backend]:
    """The class of a backend.  The import of FlashInfer, which takes a second, is inside its module."""
    if name == "triton":
        from minisgl.model.cuda.attention.triton import TritonAttention

        return TritonAttention
    if name == "flashinfer":
        from minisgl.model.cuda.attention.flashinfer import FlashInferAttention

        return FlashInferAttention
    from minisgl.model.cuda.attention.torch import TorchReference

    return TorchReference


@dataclass(frozen=True, slots=True)
class Choice:
    """The backends of the two tasks, and a line for the user where a better one is missing."""

    prefill: str
    decode: str
    remark: str = ""


def choose(asked: str, heads: Heads, compile_flashinfer: Callable[[], None]) -> Choice:
    """The backends for `asked` (--attention-backend); "auto": FlashInfer for prefill where it can be had, Triton for the rest.

    `compile_flashinfer` makes FlashInfer's modules, if they are not there; it raises UserError where that cannot be done, and
    so does this if a backend was named that cannot do the work.
    """
    if asked != "auto":
        for task in ("prefill", "decode"):
            if (why := find(asked).refuses(heads, task)) is not None:
                raise UserError(f"--attention-backend {asked} cannot do {task} here: {why}. Use --attention-backend auto.")
        if asked == "flashinfer":
            compile_flashinfer()
        return Choice(asked, asked)
    why = find("flashinfer").refuses(heads, "prefill")
    if why is None:
        try:
            compile_flashinfer()
        except UserError as e:
            why = str(e)
    decode = "triton" if find("triton").refuses(heads, "decode") is None else "torch"
    if why is None:
        return Choice("flashinfer", decode)
    name = {"triton": "our Triton kernels", "torch": "plain torch, slowly"}[decode]
    return Choice(decode, decode, f"attention runs on {name}; prefill without FlashInfer, because {why}")


def check_float8(
    engine: EngineConfig, dtype: torch.dtype, capability: int, widths: Sequence[int] = (), *, experts: int = 0
) -> None:
    """Raises UserError where float8 was asked for and the GPU, or its library, cannot do it.

    `widths`: rows and columns of this rank's linear layers; `experts`: of each of the model's layers.
    """
    for flag, wanted in (
        (f"--quantization {engine.quantization}", engine.quantization == "fp8"),
        (f"--kv-cache-dtype {engine.kv_cache_dtype}", engine.kv_cache_dtype == "fp8"),
    ):
        if wanted and capability < 89:
            raise UserError(
                f"{flag}: this GPU has compute capability {capability / 10:.1f}, float8 needs 8.9 or newer. Leave the flag out."
            )
    if engine.quantization == "fp8" and dtype != torch.bfloat16:
        raise UserError(f"--quantization fp8 multiplies into bfloat16, and the model runs in {dtype}. Add --dtype bfloat16.")
    if engine.quantization == "fp8" and experts:
        raise UserError("--quantization fp8: the experts of a mixture of experts have no float8 kernel. Leave the flag out.")
    uneven = [width for width in widths if width % 16]
    if engine.quantization == "fp8" and uneven:
        raise UserError(
            f"--quantization fp8 needs layers whose sizes are multiples of 16, and with --tp {engine.tp} a rank has one of "
            f"{uneven[0]}. Use another --tp, or leave --quantization out."
        )


class PagedAttention:
    """The AttentionBackend of a model on a GPU, over one cache."""

    def __init__(self, heads: Heads, cache: KVCache, prefill: Backend, decode: Backend, short: Backend) -> None:
        """`short`: the backend for the chunks of steps that are captured as graphs."""
        self.heads, self.cache = heads, cache
        self._backends = {"prefill": prefill, "short": short}
        self._decode_backend = decode
        self._prefill_backend = prefill
        self._kv_index = torch.empty(0)
        self._split = 0  # tokens of the step that belong to prompt chunks
        self._rows = 0

    def plan(self, kv_index: torch.Tensor, chunks: Chunks | None, rows: DecodeRows | None, *, short: bool = False) -> None:
        """Prepare a step: chunks first, then decode rows.  kv_index i64 or i32 [T]: page * page_size + offset of each token.

        `short`: the chunks' tokens include the decode rows' (as chunks of one token); used inside graphs.
        """
        self._kv_index = kv_index
        self._rows = 0 if rows is None else len(rows.slots)
        self._split = len(kv_index) - self._rows
        if chunks is not None:
            self._prefill_backend = self._backends["short" if short else "prefill"]
            self._prefill_backend.plan_prefill(chunks)
        if rows is not None:
            self._decode_backend.plan_decode(rows)

    def __call__(
        self,
        layer: int,
        qkv: Product,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        qk_norm: QKNorm | None,
        *,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        q = prepare_heads(
            qkv,
            cos,
            sin,
            None if qk_norm is None else qk_norm.q,
            None if qk_norm is None else qk_norm.k,
            self.cache.keys(layer),
            self.cache.values(layer),
            self._kv_index,
            dtype=self.heads.dtype,
            eps=0.0 if qk_norm is None else qk_norm.eps,
        )
        parts = []
        if self._split:
            parts.append(self._prefill_backend.prefill(q[: self._split], layer, sinks))
        if self._rows:
            parts.append(self._decode_backend.decode(q[self._split :], layer, sinks))
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
        return out.view(len(q), self.heads.num_heads * self.heads.head_dim)


def splits_for(rows: int, kv_heads: int, max_len: int, processors: int, kv_bytes: int) -> int:
    """Parts to cut each decode row into, a power of two: programs for all processors, and no part much longer than the others.

    Several programs for each processor keep its loads in flight to the end; `kv_bytes` is 2, or 1 for a float8 cache, whose
    tokens are read in half the time.  `kv_heads` must be the same number on all ranks: the parts are part of a graph's key, and
    ranks that capture at different steps would mix up their collectives.
    """
    wanted = 8 * kv_bytes * processors // (rows * kv_heads)
    return min(triton_parts(max_len), 1 << (wanted.bit_length() - 1) if wanted > 1 else 1)


def triton_parts(max_len: int) -> int:
    """The most parts that make sense: at least 64 tokens in each, 64 parts at most."""
    return max(1, min(64, 1 << (max(1, max_len // 64)).bit_length() - 1))


def kv_dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """--kv-cache-dtype: "auto" is the model's own."""
    return FP8 if name == "fp8" else dtype


def paging(kv_lens: npt.NDArray[np.int32], pages: I32, page_size: int) -> tuple[I32, I32, I32]:
    """(indptr i32[rows + 1], page numbers of all rows on end, tokens in each row's last page)."""
    counts = -(-kv_lens // page_size)
    mine = np.arange(pages.shape[1]) < counts[:, None]
    indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return indptr, pages[mine].astype(np.int32), (kv_lens - (counts - 1) * page_size).astype(np.int32)
