"""One tensor-parallel rank on an NVIDIA GPU.  Runs in a worker process; same interface as the CPU Runner.

What differs from the CPU: a step is only *launched* here, the token it samples stays on the device in `last_token[slot]`,
where the next step finds it, and the host learns it later (`Pending`).  So the host never needs a token to prepare the next
step.

A step of decodes only is one CUDA graph: token gather, layers, LM head, sampling, token write-back; there is a graph for each
padded batch size, captured when it is first needed.  Other steps run eagerly.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from minisgl.config import Config
from minisgl.errors import UserError
from minisgl.model.cuda_sampler import filtered_sample, gumbel_sample
from minisgl.model.flashinfer_attention import FlashInferAttention
from minisgl.model.llama import Llama
from minisgl.model.loader import Weights, open_weights
from minisgl.model.parallel import Parallel
from minisgl.model.random_weights import RandomWeights
from minisgl.model.shard import Range, Shard
from minisgl.model.state import Batch, SlotState
from minisgl.plan import StepPlan, StepResult

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_RESERVE_BYTES = 2 << 30  # graphs, FlashInfer's workspace, the allocator's fragments


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
    tokens: torch.Tensor  # i32 on the host, valid once the event has passed
    event: torch.cuda.Event
    launched: float

    def done(self) -> bool:
        """Never blocks."""
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def result(self) -> StepResult:
        """What the step sampled; `busy_us` is the time from launch, in which a step before it may still have run."""
        return StepResult(self.step, self.tokens.numpy(), int((time.perf_counter() - self.launched) * 1e6))


@dataclass(slots=True)
class _Inputs:
    """The device buffers of one graph: what the host uploads before a replay."""

    ints: torch.Tensor  # i64 [4, rows]: slot, position, kv_index, seed
    temperature: torch.Tensor  # f32 [rows]
    tokens: torch.Tensor  # i32 [rows]: out
    graph: torch.cuda.CUDAGraph | None = None


class CudaRunner:
    """Life: construct, `max_pages`, `allocate`, `launch` for every plan in order, `close`."""

    def __init__(self, config: Config, rank: int, run_dir: str) -> None:
        engine, spec = config.engine, config.model
        self._device = torch.device("cuda", rank)
        torch.cuda.set_device(self._device)
        self._config = config
        name = spec.dtype if engine.dtype == "auto" else engine.dtype
        self._dtype = _DTYPES[name]
        self._shard = Shard.of(spec, rank, engine.tp)
        self._parallel = Parallel(rank, engine.tp, run_dir, backend="nccl")
        with torch.inference_mode():
            weights: Weights = (
                RandomWeights(self._dtype, self._device)
                if spec.format == "random"
                else _OnDevice(open_weights(spec, self._dtype), self._device)
            )
            self._model = Llama(spec, self._shard, weights, self._parallel, self._dtype, device=self._device)
            weights.finish()
        self._state = SlotState(engine.max_running, config.max_context, engine.page_size)
        # One spare slot takes what the padding rows of a graph sample.
        self._last_token = torch.zeros(engine.max_running + 1, dtype=torch.int64, device=self._device)
        self._attention: FlashInferAttention | None = None
        self._graphs: dict[int, _Inputs] = {}

    # ---------------- memory
    def max_pages(self) -> int:
        """How many KV pages fit beside the weights and the activations of the largest step.  Raises UserError if none does."""
        engine, spec = self._config.engine, self._config.model
        page_bytes = engine.page_size * spec.num_layers * 2 * self._shard.num_kv_heads * spec.head_dim * self._dtype.itemsize
        if engine.kv_tokens:
            return -(-engine.kv_tokens // engine.page_size)
        free, _ = torch.cuda.mem_get_info(self._device)
        widest = max(2 * spec.intermediate_size, spec.hidden_size * 3) * engine.step_tokens
        activations = 4 * widest * self._dtype.itemsize + engine.max_running * spec.vocab_size * 8
        pages = int((free - activations - _RESERVE_BYTES) * engine.memory_fraction) // page_bytes
        if pages < 1:
            raise UserError(
                f"no memory for the KV cache on GPU {self._device.index}: {free >> 20} MiB are free after the weights. Use a "
                "larger --tp, a smaller --step-tokens, or a smaller model."
            )
        return pages

    def allocate(self, num_pages: int) -> None:
        """Create the KV cache: `num_pages` pages, the same number on every rank."""
        spec, engine = self._config.model, self._config.engine
        self._attention = FlashInferAttention(
            num_layers=spec.num_layers,
            num_pages=num_pages,
            page_size=engine.page_size,
            num_heads=self._shard.num_heads,
            num_kv_heads=self._shard.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=self._dtype,
            device=self._device,
            max_rows=_bucket(engine.max_running),
            max_pages_per_row=-(-self._config.max_context // engine.page_size),
        )

    # ---------------- steps
    def launch(self, plan: StepPlan) -> CudaPending:
        """Start a step behind those already started.  Plans come in order, each exactly once."""
        attention = self._attention
        if attention is None:
            raise RuntimeError("launch before allocate")
        start = time.perf_counter()
        batch = self._state.apply(plan)
        with torch.inference_mode():
            if len(batch.ids) == 0:
                tokens = torch.empty(0, dtype=torch.int32, device=self._device)
            elif len(batch.chunk_lens) == 0 and not _filters(batch):
                tokens = self._replay(batch, attention)
            else:
                tokens = self._eager(batch, attention)
            host = torch.empty(tokens.shape, dtype=torch.int32, pin_memory=True)
            host.copy_(tokens, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return CudaPending(plan.step, host, event, start)

    def _eager(self, batch: Batch, attention: FlashInferAttention) -> torch.Tensor:
        attention.prepare(batch)
        upload = attention.upload
        ids = upload(batch.ids)
        n_prompt_ids = int(batch.chunk_lens.sum())
        if n_prompt_ids < len(ids):
            ids[n_prompt_ids:] = self._last_token[upload(batch.decode_slots)]
        logits = self._model(ids, upload(batch.positions), upload(batch.sample_rows), attention)
        if len(logits) == 0:
            return torch.empty(0, dtype=torch.int32, device=self._device)
        s = batch.sampling
        common = (logits, upload(s.temperature), upload(s.seed.view(np.int64)), upload(s.positions))
        if _filters(batch):
            tokens = filtered_sample(*common, top_k=upload(s.top_k), top_p=upload(s.top_p), min_p=upload(s.min_p))
        else:
            tokens = gumbel_sample(*common)
        self._last_token[upload(batch.sample_slots)] = tokens.long()
        return tokens

    def _replay(self, batch: Batch, attention: FlashInferAttention) -> torch.Tensor:
        """A step of decodes only, from the graph of the next larger batch size.  Rows are in the order of the result."""
        n = len(batch.sample_slots)
        rows = _bucket(n)
        inputs = self._graphs.get(rows)
        if inputs is None:
            inputs = self._graphs[rows] = self._buffers(rows)
        # Row i of the result is decode row sample_rows[i] of the batch; padding rows use the spare slot and the spare page.
        order = batch.sample_rows
        ints = np.empty((4, rows), np.int64)
        ints[:, n:] = np.array([[self._config.engine.max_running], [0], [attention.num_pages * attention.page_size], [0]])
        ints[0, :n], ints[1, :n] = batch.sample_slots, batch.positions[order]
        ints[2, :n], ints[3, :n] = batch.kv_index[order], batch.sampling.seed.view(np.int64)
        temperature = np.zeros(rows, np.float32)
        temperature[:n] = batch.sampling.temperature
        kv_lens = np.ones(rows, np.int32)
        kv_lens[:n] = batch.kv_lens[order]
        pages = np.full((rows, batch.pages.shape[1]), attention.num_pages, np.int32)
        pages[:n] = batch.pages[order]
        inputs.ints.copy_(torch.from_numpy(ints).pin_memory(), non_blocking=True)
        inputs.temperature.copy_(torch.from_numpy(temperature).pin_memory(), non_blocking=True)
        attention.prepare_graph(rows, kv_lens, pages, inputs.ints[2])
        if inputs.graph is None:
            self._capture(inputs, attention)
        assert inputs.graph is not None
        inputs.graph.replay()
        return inputs.tokens[:n]

    def _buffers(self, rows: int) -> _Inputs:
        return _Inputs(
            ints=torch.zeros(4, rows, dtype=torch.int64, device=self._device),
            temperature=torch.zeros(rows, device=self._device),
            tokens=torch.zeros(rows, dtype=torch.int32, device=self._device),
        )

    def _capture(self, inputs: _Inputs, attention: FlashInferAttention) -> None:
        """Record the graph of one batch size: once eagerly (libraries allocate and tune on first use), then for good.

        The eager run draws the step's tokens and writes them back; the replay that follows must start from the same state.
        """
        before = self._last_token.clone()
        self._decode_step(inputs, attention)
        self._last_token.copy_(before)
        torch.cuda.synchronize(self._device)
        inputs.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(inputs.graph):
            self._decode_step(inputs, attention)

    def _decode_step(self, inputs: _Inputs, attention: FlashInferAttention) -> None:
        slots, positions, _, seeds = inputs.ints
        logits = self._model(self._last_token[slots], positions, None, attention)
        tokens = gumbel_sample(logits, inputs.temperature, seeds, positions + 1)
        inputs.tokens.copy_(tokens)
        self._last_token[slots] = tokens.long()

    def close(self) -> None:
        """Drop the graphs before the group: a graph holds on to its communicator.  Idempotent."""
        torch.cuda.synchronize(self._device)
        self._graphs.clear()
        self._attention = None
        self._parallel.close()


def _filters(batch: Batch) -> bool:
    s = batch.sampling
    return bool((s.top_k > 0).any() or (s.top_p < 1).any() or (s.min_p > 0).any())


def _bucket(rows: int) -> int:
    """The padded batch size: powers of two up to 8, then multiples of 8 up to 64, of 16 up to 256, of 64 beyond."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 16 if rows <= 256 else 64
    return -(-rows // step) * step
