"""One tensor-parallel rank on an NVIDIA GPU.  Runs in a worker process; same interface as the CPU Runner.

What differs from the CPU: a step is only *launched* here; the tokens it samples stay on the device, by slot, where the next
step finds them, and the host learns them later (`Pending`).  So the host never needs a token to prepare the next step.

A step of decodes only is one CUDA graph, from the gather of the last tokens to the write-back of the new ones, and the host
uploads only what the plan changed: in steady state nothing.  A short step with prompt chunks is a graph, too; a long one, whose
kernels take longer than their launches, runs eagerly.  Graphs are captured when they are first needed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from minisgl.config import Config
from minisgl.errors import UserError
from minisgl.model.cuda.attention import (
    Chunks,
    DecodeRows,
    Heads,
    PagedAttention,
    choose,
    find,
    kv_dtype_of,
    splits_for,
)
from minisgl.model.cuda.blocks import CudaBlocks
from minisgl.model.cuda.cache import KVCache, page_bytes
from minisgl.model.cuda.memory import Ledger
from minisgl.model.cuda.state import DeviceState, Uploads
from minisgl.model.kernels.prefill_attention import block_q, tiles_of
from minisgl.model.kernels.sampling import sample
from minisgl.model.kernels.step import decode_inputs, mixed_inputs
from minisgl.model.llama import Llama
from minisgl.model.loader import Weights, open_weights
from minisgl.model.parallel import make_parallel
from minisgl.model.random_weights import RandomWeights
from minisgl.model.shard import Range, Shard
from minisgl.model.state import Batch, SlotState
from minisgl.plan import I32, StepPlan, StepResult

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_STEPS = (64, 128, 256, 512, 1024)  # tokens of the steps with prompt chunks that are captured as graphs
_PAUSE_MS = 20.0  # a device that has waited longer had nothing to do
FEW_ROWS = 16  # rows of such a graph; a second one takes as many as there are slots


class _OnDevice:
    """A checkpoint whose tensors come out on the device."""

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self._weights, self._device = weights, device

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> torch.Tensor:
        return self._weights.take(name, shape, rows=rows, cols=cols).to(self._device)

    def finish(self) -> None:
        self._weights.finish()


@dataclass(slots=True)
class CudaPending:
    """A launched step: its tokens are on their way to pinned memory."""

    step: int
    tokens: torch.Tensor  # i32 on the host, valid once `end` has passed
    start: torch.cuda.Event
    end: torch.cuda.Event
    before: torch.cuda.Event | None  # the end of the step before, None where none has been
    launch_us: int

    def done(self) -> bool:
        """Never blocks."""
        return bool(self.end.query())  # type: ignore[no-untyped-call]

    def result(self) -> StepResult:
        """What the step sampled."""
        idle = 0.0 if self.before is None else self.before.elapsed_time(self.start)
        return StepResult(
            self.step,
            self.tokens.numpy().copy(),
            busy_us=int(self.start.elapsed_time(self.end) * 1000),
            idle_us=int(idle * 1000) if idle < _PAUSE_MS else 0,
            launch_us=self.launch_us,
        )


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Of the arrays that describe a step with prompt chunks: tokens, rows, sampling rows, tiles."""

    tokens: int
    rows: int
    samples: int
    tiles: int

    @property
    def key(self) -> tuple[int, ...]:
        return (self.tokens, self.rows, self.samples, self.tiles)

    @property
    def words(self) -> int:
        return 3 * self.tokens + 2 * self.rows + 4 * self.samples + 4 * self.tiles


class CudaRunner:
    """Life: construct, `max_pages`, `allocate`, `launch` for every plan in order, `close`."""

    def __init__(self, config: Config, rank: int, run_dir: str) -> None:
        """Join the group and load this rank's weights.  Raises UserError for a bad checkpoint or where it does not fit."""
        engine, spec = config.engine, config.model
        self._config, self._rank = config, rank
        self._device = torch.device("cuda", rank)
        torch.cuda.set_device(self._device)
        self._dtype = _DTYPES[spec.dtype if engine.dtype == "auto" else engine.dtype]
        self._shard = Shard.of(spec, rank, engine.tp)
        self._parallel = make_parallel("nccl", rank, engine.tp, run_dir, self._device)
        properties = torch.cuda.get_device_properties(self._device)
        self._processors = properties.multi_processor_count
        self._heads = Heads(
            num_heads=self._shard.num_heads,
            num_kv_heads=self._shard.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=self._dtype,
            kv_dtype=kv_dtype_of(engine.kv_cache_dtype, self._dtype),
            capability=10 * properties.major + properties.minor,
        )
        self._names = choose(engine.attention_backend, self._heads)
        free, total = torch.cuda.mem_get_info(self._device)
        self._total, self._other = total, total - free
        blocks = CudaBlocks(self._dtype, self._device, whole=engine.tp > 1, fp8=engine.quantization == "fp8")
        try:
            with torch.inference_mode():
                weights: Weights = (
                    RandomWeights(self._dtype, self._device)
                    if spec.format == "random"
                    else _OnDevice(open_weights(spec, self._dtype), self._device)
                )
                self._model = Llama(spec, self._shard, weights, self._parallel, blocks)
                weights.finish()
        except torch.OutOfMemoryError as e:
            raise UserError(
                f"the weights of {spec.name} do not fit GPU {rank} ({total >> 30} GiB, of which {free >> 30} were free). Use a "
                "larger --tp, --quantization fp8, or a smaller model."
            ) from e
        torch.cuda.empty_cache()
        self._weights = torch.cuda.memory_allocated(self._device)
        self._mirror = SlotState(engine.max_running, config.max_context, engine.page_size)
        self._state = DeviceState(engine.max_running, config.max_context, engine.page_size, engine.lag, self._device)
        # Results behind the last row are those of padding rows.
        self._tokens = torch.zeros(engine.max_running + 64, dtype=torch.int32, device=self._device)
        self._results = [torch.zeros(len(self._tokens), dtype=torch.int32, pin_memory=True) for _ in range(engine.lag + 1)]
        self._inputs = Uploads(4 * (engine.step_tokens + 8 * engine.max_running + 64), engine.lag, self._device)
        self._cache: KVCache | None = None
        self._attention: PagedAttention | None = None
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        self._short_inputs: dict[_Sizes, torch.Tensor] = {}  # the fixed buffers of the graphs with prompt chunks
        self._pool: Any = None  # of memory, shared by all graphs: they run one after another
        self._resent = True  # the decode rows have changed since they were last sent
        self._steps = 0
        self._last: torch.cuda.Event | None = None  # the end of the latest step
        if self._names[2] and rank == 0:
            print(f"minisgl: {self._names[2]}", file=sys.stderr, flush=True)

    # ---------------- memory
    def max_pages(self) -> int:
        """How many KV pages fit beside the weights and the largest step, which is run once.  Raises UserError if none does."""
        engine, spec = self._config.engine, self._config.model
        page = page_bytes(spec.num_layers, engine.page_size, self._shard.num_kv_heads, spec.head_dim, self._heads.kv_dtype)
        try:
            step = self._largest_step()
        except torch.OutOfMemoryError as e:
            raise UserError(
                f"a step of --step-tokens {engine.step_tokens} does not fit GPU {self._rank} beside the weights; use less."
            ) from e
        self._ledger = Ledger(self._total, self._other, self._weights, step, page, engine.page_size)
        return self._ledger.pages(engine.kv_tokens, engine.memory_fraction, self._rank)

    def _largest_step(self) -> int:
        """Peak bytes of activations of a step of all tokens that a step may have, as many rows as possible sampling."""
        engine = self._config.engine
        self._allocate(1)
        rows = min(engine.max_running, engine.step_tokens)
        lens = np.full(rows, engine.step_tokens // rows, np.int32)
        lens[0] += engine.step_tokens - lens.sum()
        most = self._mirror.page_table.shape[1] * engine.page_size
        lens = np.minimum(lens, most)
        total, slots = int(lens.sum()), np.arange(rows, dtype=np.int32)
        ends = np.cumsum(lens).astype(np.int32)
        zeros = np.zeros(total, np.int32)
        sizes = _Sizes(total, rows, rows, 0)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        with torch.inference_mode():
            pages = np.zeros((rows, -(-int(lens.max()) // engine.page_size)), np.int32)
            arrays = [zeros, zeros, zeros, slots, lens, ends - 1, slots, lens, slots]
            self._run_mixed(self._inputs.send(arrays), sizes, Chunks(lens, lens, slots, pages), None)
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device) - before
        self._attention = self._cache = None
        self._state.kv_len.zero_()
        torch.cuda.empty_cache()
        return peak

    def allocate(self, num_pages: int) -> None:
        """Create the KV cache: `num_pages` pages, the same number on every rank."""
        self._allocate(num_pages)
        if self._rank == 0:
            prefill, decode, _ = self._names
            print(
                f"minisgl: GPU 0: {self._ledger.describe(num_pages)}; attention: {prefill} (prefill), {decode} (decode)",
                file=sys.stderr,
                flush=True,
            )

    def _allocate(self, num_pages: int) -> None:
        spec, heads = self._config.model, self._heads
        cache = KVCache(
            layers=spec.num_layers,
            num_pages=num_pages,
            page_size=self._config.engine.page_size,
            kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            dtype=heads.kv_dtype,
            device=self._device,
        )
        table = self._state.page_table
        made = {name: find(name)(heads, cache, table) for name in {*self._names[:2]}}
        prefill, decode, _ = self._names
        short = made.get("triton") or made[prefill]
        self._cache = cache
        self._attention = PagedAttention(heads, cache, made[prefill], made[decode], short)
        self._graphs_ok = made[decode].graphs
        self._short_ok = short.graphs
        self._state.spare_page(num_pages)

    # ---------------- steps
    def launch(self, plan: StepPlan) -> CudaPending:
        """Start a step behind those already started.  Plans come in order, each exactly once."""
        began = time.perf_counter()
        if self._attention is None:
            raise RuntimeError("launch before allocate")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.inference_mode():
            start.record()
            if plan.decode is not None:
                self._resent = True
            self._state.apply(plan)
            if len(plan.prefill) == 0 and self._graphs_ok:
                count = self._decode(self._mirror.advance_decode(plan))
            else:
                count = self._mixed(plan, self._mirror.apply(plan))
            self._steps += 1
            host = self._results[self._steps % len(self._results)][:count]
            host.copy_(self._tokens[:count], non_blocking=True)
            end.record()
        before, self._last = self._last, end
        return CudaPending(plan.step, host, start, end, before, int((time.perf_counter() - began) * 1e6))

    def _decode(self, slots: I32) -> int:
        """A step of decodes only: replay the graph of the next larger number of rows."""
        rows = len(slots)
        if rows == 0:
            return 0
        lens = self._mirror.kv_len[slots]
        longest = int(lens.max())
        if self._resent:
            self._state.set_decode(slots, np.argsort(-lens, kind="stable"))
            self._resent = False
        bucket = bucket_of(rows)
        splits = self._splits(bucket, rows, longest, int(lens.sum()))
        self._replay((bucket, splits), lambda: self._run_decode(bucket, splits))
        return rows

    def _splits(self, bucket: int, rows: int, longest: int, total: int) -> int:
        """Parts of a row.  Where one row is much longer than the others, four times as many keep it from being the last."""
        splits = splits_for(bucket, self._heads, 1 << 20, self._processors)
        return splits if longest * rows < 8 * total * splits else min(64, 4 * splits)

    def _run_decode(self, bucket: int, splits: int) -> None:
        state, attention = self._state, self._attention
        assert attention is not None
        slots, targets = state.decode_rows[0, :bucket], state.decode_rows[1, :bucket]
        ids, positions, kv_index, kv_lens = decode_inputs(slots, state, state.page_table, state.page_size)
        attention.plan(kv_index, None, DecodeRows(slots, kv_lens, splits))
        logits = self._model(ids, positions, None, attention)
        sample(logits, slots, kv_lens, targets, state, self._tokens, advance=True)

    # ---------------- steps with prompt chunks
    def _mixed(self, plan: StepPlan, batch: Batch) -> int:
        """Chunks and decodes.  Returns how many tokens are sampled."""
        samples, tokens = len(batch.sample_slots), len(batch.ids)
        if tokens == 0:
            return 0
        n_chunks = len(batch.chunk_lens)
        row_slots = np.concatenate((plan.prefill["slot"].astype(np.int32), batch.decode_slots.astype(np.int32)))
        ids = batch.ids.astype(np.int32)
        ids[tokens - len(batch.decode_slots) :] = -1 - batch.decode_slots
        bucket = next((t for t in SHORT_STEPS if t >= tokens), 0)
        if not bucket or not self._short_ok:
            sizes = _Sizes(tokens, len(row_slots), samples, 0)
            buffer = self._inputs.send(self._pack(sizes, batch, ids, row_slots, None))
            chunks = Chunks(batch.chunk_lens, batch.kv_lens[:n_chunks], row_slots[:n_chunks], batch.pages[:n_chunks])
            self._run_mixed(buffer, sizes, chunks if n_chunks else None, batch)
        else:
            rows = FEW_ROWS if len(row_slots) <= FEW_ROWS else self._config.engine.max_running
            sizes = self._short_sizes(bucket, rows)
            lens = np.concatenate((batch.chunk_lens, np.ones(len(batch.decode_slots), np.int32)))
            tiles = tiles_of(lens, row_slots, batch.kv_lens, self._heads.group, pad_to=sizes.tiles)
            buffer = self._inputs.send(self._pack(sizes, batch, ids, row_slots, tiles), into=self._short_input(sizes))
            self._replay(sizes.key, lambda: self._run_mixed(buffer, sizes, None, None))
        self._inputs.turn()
        return samples

    def _pack(self, sizes: _Sizes, batch: Batch, ids: I32, row_slots: I32, tiles: I32 | None) -> list[I32]:
        """The arrays of `_run_mixed` in order, padded to `sizes`: padding rows are the spare slot's, on the spare page."""
        arrays: list[np.ndarray] = [ids, batch.positions, batch.kv_index, row_slots, batch.kv_lens]
        sampling: list[np.ndarray] = [
            batch.sample_rows,
            batch.sample_slots,
            batch.sampling.positions,
            np.arange(len(batch.sample_slots)),
        ]
        return self._padded(sizes, [*arrays, *sampling], tiles)

    def _padded(self, sizes: _Sizes, arrays: list[np.ndarray], tiles: I32 | None) -> list[I32]:
        assert self._cache is not None
        spare, page = self._state.spare, self._cache.num_pages * self._cache.page_size
        t, r, s = sizes.tokens, sizes.rows, sizes.samples
        paddings = ((t, 0), (t, 0), (t, page), (r, spare), (r, 0), (s, 0), (s, spare), (s, 1), (s, len(self._tokens) - 1))
        out = []
        for array, (size, value) in zip(arrays, paddings, strict=True):
            whole = np.full(size, value, np.int32)
            whole[: len(array)] = array
            out.append(whole)
        return out if tiles is None else [*out, tiles]

    def _short_sizes(self, tokens: int, rows: int) -> _Sizes:
        return _Sizes(tokens, rows, rows, tokens // block_q(self._heads.group) + rows)

    def _short_input(self, sizes: _Sizes) -> torch.Tensor:
        """The fixed buffer of one kind of graph with prompt chunks."""
        if sizes not in self._short_inputs:
            self._short_inputs[sizes] = torch.zeros(sizes.words, dtype=torch.int32, device=self._device)
        return self._short_inputs[sizes]

    def _run_mixed(self, buffer: torch.Tensor, sizes: _Sizes, chunks: Chunks | None, batch: Batch | None) -> None:
        """A step from its arrays on the device.  In a graph there is no batch, and every row is a chunk with tiles."""
        attention, state = self._attention, self._state
        assert attention is not None
        t, r, s = sizes.tokens, sizes.rows, sizes.samples
        parts = torch.split(buffer, [t, t, t, r, r, s, s, s, s, 4 * sizes.tiles])
        raw_ids, raw_positions, raw_index, row_slots, row_lens, sample_rows, sample_slots, sample_lens, targets, tiles = parts
        ids, positions, kv_index = mixed_inputs(raw_ids, raw_positions, raw_index, row_slots, row_lens, state)
        rows = None
        if batch is None and chunks is None:
            empty = np.zeros(0, np.int32)
            chunks = Chunks(empty, empty, empty, empty, tiles.view(-1, 4))
            attention.plan(kv_index, chunks, None, short=True)
        else:
            first = 0 if chunks is None else len(chunks.chunk_lens)
            if batch is not None and len(batch.decode_slots):
                lens = batch.kv_lens[first:]
                splits = splits_for(len(lens), self._heads, int(lens.max()), self._processors)
                rows = DecodeRows(row_slots[first:], row_lens[first:], splits, lens, batch.pages[first:])
            attention.plan(kv_index, chunks, rows)
        logits = self._model(ids, positions, sample_rows.long(), attention)
        if s:
            sample(logits, sample_slots, sample_lens, targets, state, self._tokens, advance=False)

    # ---------------- graphs
    def _replay(self, key: tuple[int, ...], step: Callable[[], None]) -> None:
        """Run `step` as a graph, captured when it is first needed."""
        if key not in self._graphs:
            self._capture(key, step)
        self._graphs[key].replay()

    def _capture(self, key: tuple[int, ...], step: Callable[[], None]) -> None:
        """Record a graph.  The step runs eagerly first (libraries and kernels tune themselves), and what that did to the slots
        is undone, for the replay does it again."""
        state = self._state
        kept = [t.clone() for t in (state.last_token, state.kv_len)]
        step()
        state.last_token.copy_(kept[0])
        state.kv_len.copy_(kept[1])
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        self._pool = self._pool or graph.pool()
        self._graphs[key] = graph

    def prepare(self) -> bool:
        """Capture one graph that is likely to be needed: called while there is nothing else to do, until False.

        The rows are all the spare slot's: those of former requests would write to pages that others own by now.  Ranks are idle
        at different moments, and a graph has collectives in it, so only a single rank does this.
        """
        if self._parallel.size > 1 or self._attention is None or not self._graphs_ok:
            return False
        with torch.inference_mode():
            for bucket in sorted({bucket_of(rows) for rows in range(1, self._config.engine.max_running + 1)}):
                splits = splits_for(bucket, self._heads, 1 << 20, self._processors)
                if (bucket, splits) not in self._graphs:
                    self._state.decode_rows.fill_(self._state.spare)
                    self._resent = True
                    self._capture((bucket, splits), partial(self._run_decode, bucket, splits))
                    return True
            for tokens in SHORT_STEPS if self._short_ok else ():
                sizes = self._short_sizes(tokens, FEW_ROWS)
                if sizes not in self._short_inputs:
                    nothing = self._padded(sizes, [np.zeros(0, np.int32)] * 9, np.zeros(4 * sizes.tiles, np.int32))
                    buffer = self._short_input(sizes)
                    buffer.copy_(torch.from_numpy(np.concatenate(nothing)))
                    self._capture(sizes.key, partial(self._run_mixed, buffer, sizes, None, None))
                    return True
        return False

    def close(self) -> None:
        """Drop the graphs before the group: a graph holds on to its communicator.  Idempotent."""
        torch.cuda.synchronize(self._device)
        self._graphs.clear()
        self._attention = self._cache = None
        self._parallel.close()


def bucket_of(rows: int) -> int:
    """The padded batch size: powers of two up to 8, then multiples of 8 up to 64, of 16 up to 256, of 64 beyond."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 16 if rows <= 256 else 64
    return -(-rows // step) * step
