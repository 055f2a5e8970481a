"""Runs one rank's share of the model on an NVIDIA GPU, with the interface of the CPU runner.  Runs in a worker process.

Other than on the CPU, a step is only *launched* here.  The tokens it samples stay on the device, by slot, where the next step
finds them, and the host reads them later (`CudaPending`), so the host never needs a token to prepare the next step.

A decode step is one graph, from the gather of the last tokens to the write-back of the new ones, and the host uploads only what
the plan changed: in steady state nothing.  A short step with prompt chunks is a graph, too.  A long one, whose kernels take
longer than their launches, is launched kernel by kernel.  See step.py for the steps and graphs.py for their graphs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from minisgl.config import Config
from minisgl.errors import UserError
from minisgl.model.common.grammar import Grammars
from minisgl.model.common.interfaces import Build
from minisgl.model.common.memory import token_bytes
from minisgl.model.common.parallel import to_stderr
from minisgl.model.common.registry import model_class
from minisgl.model.common.shard import Shard
from minisgl.model.common.weights import OpenWeights
from minisgl.model.cuda.attention.base import AttentionSpec
from minisgl.model.cuda.attention.choose import choose, find
from minisgl.model.cuda.attention.kv_cache import FP8, KVCache
from minisgl.model.cuda.attention.paged import PagedAttention
from minisgl.model.cuda.attention.requirements import check_float8
from minisgl.model.cuda.graphs import Graphs
from minisgl.model.cuda.layers import CudaLayers
from minisgl.model.cuda.memory import Ledger, graph_bytes
from minisgl.model.cuda.parallel import make_parallel
from minisgl.model.cuda.step import Steps
from minisgl.model.kernels.compilations import compiled, watch
from minisgl.model.kernels.logprobs import DeviceLogprobs
from minisgl.plan import FAILED, StepPlan, StepResult

_PAUSE_MS = 20.0  # a device that waited longer had no work, which is not counted as idle


@dataclass(slots=True)
class CudaPending:
    """A launched step: its tokens are on their way to pinned memory."""

    step: int
    tokens: torch.Tensor  # i32 on the host, valid once `end` has passed
    scored: DeviceLogprobs | None
    scores: torch.Tensor | None  # i32 on the host, valid then
    vectors: torch.Tensor | None  # f32 on the host, valid then
    start: torch.cuda.Event
    end: torch.cuda.Event
    before: torch.cuda.Event | None  # the end of the previous step; None for the first
    launch_us: int
    warmups: int
    failed: npt.NDArray[np.int64] | None = None  # rows whose grammar allowed no token

    def done(self) -> bool:
        """Whether the step has run.  Never blocks."""
        return bool(self.end.query())  # type: ignore[no-untyped-call]

    def result(self) -> StepResult:
        """The step's tokens and times.  Only after `done`."""
        idle = 0.0 if self.before is None else self.before.elapsed_time(self.start)
        tokens = self.tokens.numpy().copy()
        if self.failed is not None:
            tokens[self.failed] = FAILED
        return StepResult(
            self.step,
            tokens,
            # A step in which something was captured or compiled says nothing about its cost.
            busy_us=0 if self.warmups else int(self.start.elapsed_time(self.end) * 1000),
            idle_us=int(idle * 1000) if idle < _PAUSE_MS else 0,
            launch_us=self.launch_us,
            warmups=self.warmups,
            scores=None if self.scored is None or self.scores is None else self.scored.read(self.scores.numpy()),
            vectors=None if self.vectors is None else self.vectors.numpy(),
        )


class CudaRunner:
    """Life: construct, `max_pages`, `allocate`, `launch` for every plan in order, `close`."""

    def __init__(self, config: Config, rank: int, run_dir: str, open_weights: OpenWeights, grammars: Grammars) -> None:
        """Join the group and load this rank's weights.  Raises UserError for a bad checkpoint or one that does not fit."""
        engine, spec = config.engine, config.model
        self._config, self._rank = config, rank
        self._device = torch.device("cuda", rank)
        torch.cuda.set_device(self._device)
        watch()
        self._dtype = getattr(torch, config.dtype)
        self._shard = Shard.of(spec, rank, engine.tp)
        self._parallel = make_parallel(
            "nccl", rank, engine.tp, run_dir, self._device, dtype=self._dtype, width=spec.hidden_size
        )
        properties = torch.cuda.get_device_properties(self._device)
        kv_dtype = FP8 if engine.kv_cache_dtype == "fp8" else self._dtype
        self._heads = AttentionSpec.of(spec, self._shard, self._dtype, kv_dtype, 10 * properties.major + properties.minor)
        widths = [spec.hidden_size, *(end - start for start, end in (self._shard.q_rows, self._shard.kv_rows, self._shard.mlp))]
        check_float8(engine, config.dtype, self._heads.capability, widths)
        self._backends = choose(engine.attention_backend, self._heads, self._compile_flashinfer)
        free, total = torch.cuda.mem_get_info(self._device)
        self._total, self._other = total, total - free
        layers = CudaLayers(
            self._dtype, self._device, no_partial_sums=self._parallel.needs_tensors, fp8=engine.quantization == "fp8"
        )
        try:
            with torch.inference_mode():
                weights = open_weights(spec, self._dtype, device=self._device, packed=engine.packed)
                served = replace(spec, max_context=config.max_context)
                build = Build(served, self._shard, weights, self._parallel, layers)
                self._model = model_class(spec.architecture)(build)
                weights.finish()
        except torch.OutOfMemoryError as e:
            raise UserError(
                f"the weights of {spec.name} do not fit GPU {rank} ({total >> 30} GiB, of which {free >> 30} were free). Use a "
                "larger --tp, --quantization fp8, or a smaller model."
            ) from e
        torch.cuda.empty_cache()
        processors = properties.multi_processor_count
        self._steps = Steps(config, self._model, grammars, self._heads, processors=processors, device=self._device)
        self._weights = torch.cuda.memory_allocated(self._device)  # with the state of the slots, which is small
        self._graphs = Graphs(self._steps.state, self._device, self._say)
        # A worker gets plan k + lag only after the result of step k, so lag + 1 buffers are enough.
        self._results = [torch.zeros_like(self._steps.tokens, device="cpu").pin_memory() for _ in range(engine.lag + 1)]
        self._score_results: list[torch.Tensor] = []  # the same for log probabilities, made for the first of them
        self._launched = 0
        self._ready = False  # the cache exists
        self._last: torch.cuda.Event | None = None  # the end of the latest step
        if self._backends.remark:
            self._say(self._backends.remark)

    def _say(self, text: str) -> None:
        """Print a line for the user, from rank 0."""
        if self._rank == 0:
            to_stderr(text)

    def _compile_flashinfer(self) -> None:
        """Rank 0 compiles missing modules while the others wait; all of them raise UserError if it fails."""
        from minisgl.model.cuda.flashinfer.compile import build_missing

        failure: UserError | None = None
        if self._rank == 0:
            capability = f"{self._heads.capability // 10}.{self._heads.capability % 10}"
            try:
                build_missing(self._config.model, self._config.engine, capability, self._say)
            except UserError as e:
                failure = e
        failed = torch.full((1,), float(failure is not None), device=self._device)
        if float(self._parallel.all_reduce_(failed)) > 0:
            raise failure or UserError("rank 0 could not compile FlashInfer's kernels")

    # ---------------- memory
    def max_pages(self) -> int:
        """KV pages that fit next to the weights and the largest step, which is run once.  Raises UserError if none does."""
        engine, spec = self._config.engine, self._config.model
        page = engine.page_size * token_bytes(spec, self._shard, self._heads.kv_dtype.itemsize)
        try:
            step = self._largest_step(page)
        except torch.OutOfMemoryError as e:
            raise UserError(
                f"a step of --step-tokens {engine.step_tokens} does not fit GPU {self._rank} next to the weights; use less."
            ) from e
        graphs = graph_bytes(engine, spec, self._dtype.itemsize)
        self._ledger = Ledger(self._total, self._other, self._weights, step, page, engine.page_size, graphs)
        return self._ledger.pages(engine.kv_tokens, engine.memory_fraction, self._rank)

    def _largest_step(self, page: int) -> int:
        """Peak bytes of the largest step without weights and KV cache, measured by running it on a cache of one page."""
        before = torch.cuda.memory_allocated(self._device)
        self._use_cache(1)
        torch.cuda.reset_peak_memory_stats(self._device)
        with torch.inference_mode():
            self._steps.run_largest()
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device) - before - 2 * page  # there is a spare one
        self._ready = False
        torch.cuda.empty_cache()
        return max(0, peak)

    def allocate(self, num_pages: int) -> None:
        """Create the KV cache: `num_pages` pages, the same number on every rank."""
        try:
            self._use_cache(num_pages)
        except torch.OutOfMemoryError as e:
            raise UserError(
                f"GPU {self._rank} had room for a KV cache of {num_pages} pages when it was measured and no longer has: does "
                "another program use it? Start again, or set --kv-tokens."
            ) from e
        if self._config.model.eos_ids:
            self.grammars.load_vocabulary()  # later, it would delay every request for a second or two
        b = self._backends
        self._say(f"GPU 0: {self._ledger.describe(num_pages)}; attention: {b.prefill} (prefill), {b.decode} (decode)")

    def _use_cache(self, num_pages: int) -> None:
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
        prefill, decode = self._backends.prefill, self._backends.decode
        made = {name: find(name)(heads, cache, self._steps.state.page_table) for name in {prefill, decode}}
        short = made.get("triton") or made[prefill]
        attention = PagedAttention(heads, cache, made[prefill], made[decode], short)
        on = self._config.engine.graphs == "on"
        self._steps.use(attention, self._graphs, decode_graphs=on and made[decode].graphs, short_graphs=on and short.graphs)
        self._ready = True

    # ---------------- steps
    def launch(self, plan: StepPlan) -> CudaPending:
        """Start a step behind those already started.  Plans arrive in order, each exactly once."""
        began = time.perf_counter()
        if not self._ready:
            raise RuntimeError("launch before allocate")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.inference_mode():
            start.record()
            prepared = self._graphs.captures + len(compiled)
            count = self._steps.run(plan)
            self._launched += 1
            host = self._results[self._launched % len(self._results)][:count]
            host.copy_(self._steps.tokens[:count], non_blocking=True)
            scored = self._steps.scored
            scores = None if scored is None else self._fetch_scores(scored, count)
            vectors = self._fetch_vectors()
            end.record()
        grammar_rows = self._steps.grammar_rows
        grammar_rows.end(host, end)
        before, self._last = self._last, end
        warmups = self._graphs.captures + len(compiled) - prepared
        launch_us = int((time.perf_counter() - began) * 1e6)
        return CudaPending(
            plan.step, host, scored, scores, vectors, start, end, before, launch_us, warmups, grammar_rows.failed
        )

    def _fetch_scores(self, scored: DeviceLogprobs, count: int) -> torch.Tensor:
        """Start to copy the log probabilities of a step to the host."""
        scores = self._steps.scores
        if not self._score_results:
            self._score_results = [torch.zeros_like(scores, device="cpu").pin_memory() for _ in self._results]
        host = self._score_results[self._launched % len(self._score_results)]
        for first, n in ((0, count if len(scored.drawn) else 0), (scored.first, scored.targets)):
            host[first : first + n].copy_(scores[first : first + n], non_blocking=True)
        return host

    def _fetch_vectors(self) -> torch.Tensor | None:
        """Start to copy the vectors of a step to the host, into new memory: few steps have them."""
        vectors = self._steps.vectors
        if vectors is None:
            return None
        return torch.empty(vectors.shape, dtype=torch.float32, pin_memory=True).copy_(vectors, non_blocking=True)

    @property
    def grammars(self) -> Grammars:
        """The grammars of its slots."""
        return self._steps.grammar_rows.grammars

    def capture_ahead(self) -> bool:
        """Capture one graph that is likely to be needed; called while there is nothing else to do, until it returns False.

        A graph contains collectives: all ranks call this at the same point of their plans and capture the same graph.
        """
        if not self._ready:
            return False
        with torch.inference_mode():
            return self._steps.capture_ahead()

    def close(self) -> None:
        """Drop the graphs, which hold on to the communicator, then leave the group.  Idempotent."""
        torch.cuda.synchronize(self._device)
        self._ready = False
        self._graphs.clear()
        self._parallel.close()
