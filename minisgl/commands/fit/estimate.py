"""Predicts the memory ledger of a start from a ModelSpec and an EngineConfig, by the functions that the runners use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from minisgl.commands.fit.hardware import OTHER_GIB, OTHER_GIB_RANKS, Hardware
from minisgl.commands.fit.predict import (
    ITEM_BYTES,
    MatrixBytes,
    in_blocks,
    in_dtype,
    in_fp8,
    in_packed,
    largest_step,
    state_bytes,
    weight_bytes,
)
from minisgl.config import Config, EngineConfig, ModelSpec
from minisgl.errors import UserError
from minisgl.model.checkpoint.gguf_spec import stored_types
from minisgl.model.common.memory import can_attend, host_pages, token_bytes
from minisgl.model.common.shard import Shard
from minisgl.model.cuda.attention.requirements import check_float8, flashinfer_lacks
from minisgl.model.cuda.memory import Ledger, graph_bytes

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Load:
    """What is to be served: so many requests of so many tokens each, prompt and answer together, at the same time."""

    users: int
    context: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """The ledger of the rank with the most to hold, in bytes."""

    spec: ModelSpec
    engine: EngineConfig
    hardware: Hardware
    weights: dict[str, int]  # by part
    token: int  # KV cache of one token on that rank
    entries: dict[str, int]  # the other entries of the ledger
    pages: int  # of the KV cache; 0: there is no room
    refused: str = ""  # why no cache fits, in the engine's words

    @property
    def kv_tokens(self) -> int:
        return self.pages * self.engine.page_size

    def pages_of(self, load: Load) -> int:
        """Pages that a load takes when every request has its full length."""
        return load.users * -(-load.context // self.engine.page_size)

    def holds(self, load: Load) -> bool:
        return self.pages >= self.pages_of(load) and load.users <= self.engine.max_running

    def users_at(self, context: int) -> int:
        """Requests of `context` tokens that run at the same time."""
        return min(self.engine.max_running, self.pages // -(-context // self.engine.page_size))

    def context_of(self, users: int) -> int:
        """The longest context of so many requests at the same time."""
        return self.pages // users * self.engine.page_size if users <= self.engine.max_running else 0


def matrix_bytes(spec: ModelSpec, engine: EngineConfig, item: int, *, kernels: bool) -> MatrixBytes:
    """How the engine keeps the weights of products.  kernels: whether a CPU has its C kernels."""
    if engine.device == "cuda":
        if engine.packed and item == 2:
            return in_packed(item, spec, stored_types(spec))
        return in_fp8(item) if engine.quantization == "fp8" else in_dtype(item)
    if engine.eight_bits and (kernels or engine.quantization != "auto"):
        return in_blocks(engine.quantization, stored_types(spec))
    return in_dtype(item)


def estimate(spec: ModelSpec, engine: EngineConfig, hardware: Hardware, *, kernels: bool = True) -> Estimate:
    """The ledger.  Raises UserError for what the engine refuses.

    kernels: on a CPU, whether a compiler is there to make the C kernels.
    """
    config = Config(spec, engine)
    shards = [Shard.of(spec, rank, engine.tp) for rank in range(engine.tp)]
    return min((_of_rank(config, shard, hardware, kernels) for shard in shards), key=lambda e: e.pages)


def _of_rank(config: Config, shard: Shard, hardware: Hardware, kernels: bool) -> Estimate:
    spec, engine, item = config.model, config.engine, ITEM_BYTES[config.dtype]
    packed = engine.device == "cpu" and engine.eight_bits and kernels
    size = matrix_bytes(spec, engine, item, kernels=kernels)
    weights = weight_bytes(spec, shard, item, size, separate_head=engine.device == "cpu")
    total = int(hardware.gib * GIB)
    if engine.device == "cpu":
        half = packed and can_attend(spec, engine.page_size)
        token = token_bytes(spec, shard, 2 if half else item)
        free = total - sum(weights.values()) * engine.tp
        pages = host_pages(engine, config.max_context, token, max(0, free))
        kv = pages * engine.page_size * token * engine.tp
        refused = "" if 0 < kv <= free else "the weights and a page of the KV cache do not fit"
        return Estimate(spec, engine, hardware, weights, token, {}, 0 if refused else pages, refused)
    widths = [spec.hidden_size, *(end - start for start, end in (shard.q_rows, shard.kv_rows, shard.mlp))]
    check_float8(engine, config.dtype, hardware.capability, widths)
    token = token_bytes(spec, shard, 1 if engine.kv_cache_dtype == "fp8" else item)
    lacks = flashinfer_lacks(spec.head_dim, config.dtype, hardware.capability, sinks=spec.sinks, installed=True)
    other = int((OTHER_GIB if engine.tp == 1 else OTHER_GIB_RANKS) * GIB)
    state = state_bytes(engine, config.max_context)
    step = largest_step(engine, spec, shard, item, flashinfer=lacks is None)
    graphs = graph_bytes(engine, spec, item)
    held = sum(weights.values()) + state
    ledger = Ledger(total, other, held, step, engine.page_size * token, engine.page_size, graphs)
    entries = {"taken before": other, "slots": state, "largest step": step, "graphs": graphs}
    try:
        pages, refused = ledger.pages(engine.kv_tokens, engine.memory_fraction, 0), ""
    except UserError as e:
        pages, refused = 0, str(e)
    entries["free"] = ledger.room - pages * ledger.page
    return Estimate(spec, engine, hardware, weights, token, entries, pages, refused)


# ---------------- what would make it fit
@dataclass(frozen=True, slots=True)
class Remedy:
    """A change, and the ledger with it."""

    flags: str
    load: Load
    estimate: Estimate


def remedies(found: Estimate, load: Load) -> Iterator[Remedy]:
    """Changes of one thing each that make the load fit, and at last of several."""
    engine, changes = found.engine, list(_changes(found))
    for text, changed in changes:
        if (fits := _try(found, changed)) is not None and fits.holds(load):
            yield Remedy(text, load, fits)
    if load.users > 1 and (users := found.users_at(load.context)) > 0:
        yield Remedy(f"--users {users}", replace(load, users=users), found)
    if (context := found.context_of(load.users)) > 0:
        yield Remedy(f"--context {context}", replace(load, context=context), found)
    together = engine
    for text, changed in changes:
        if text.endswith("fp8"):
            together = (
                replace(together, quantization=changed.quantization)
                if "quant" in text
                else replace(together, kv_cache_dtype="fp8")
            )
    for base, extra in ((engine, ""), (together, " with float8 weights and KV cache")):
        if (more := _more_gpus(found, base, load)) is not None:
            yield Remedy(f"--gpus {more.engine.tp}{extra if base is not engine else ''}", load, more)
            break


def _changes(found: Estimate) -> Iterator[tuple[str, EngineConfig]]:
    engine, users = found.engine, found.engine.max_running
    if engine.device == "cpu":
        for kind in ("auto", "int8", "q4"):
            if kind != engine.quantization:
                yield f"--quantization {kind}", replace(engine, quantization=kind, dtype="auto")
        if not engine.kv_tokens and engine.memory_fraction < 0.9:
            yield "--memory-fraction 0.9", replace(engine, memory_fraction=0.9)
        return
    if engine.kv_cache_dtype != "fp8":
        yield "--kv-cache-dtype fp8", replace(engine, kv_cache_dtype="fp8")
    if engine.quantization != "fp8":
        yield "--quantization fp8", replace(engine, quantization="fp8")
    if engine.kv_cache_dtype != "fp8" and engine.quantization != "fp8":
        yield "--quantization fp8 --kv-cache-dtype fp8", replace(engine, quantization="fp8", kv_cache_dtype="fp8")
    if engine.step_tokens > 2048:
        few = replace(engine, max_running=min(users, 1024), step_tokens=2048)
        yield f"--step-tokens 2048{' --max-running 1024' if users > 1024 else ''}", few


def _try(found: Estimate, engine: EngineConfig) -> Estimate | None:
    """The ledger with other flags; None where the engine refuses them."""
    try:
        return estimate(found.spec, engine, found.hardware)
    except UserError:
        return None


def _more_gpus(found: Estimate, engine: EngineConfig, load: Load) -> Estimate | None:
    """The smallest number of GPUs, of the usual ones, on which the load fits."""
    for tp in (2, 4, 8, 16):
        if engine.device == "cuda" and engine.tp < tp <= found.spec.num_heads:
            more = _try(found, replace(engine, tp=tp))
            if more is not None and more.holds(load):
                return more
    return None
