"""Runs one rank's share of the model on a CPU, plan by plan: weights, KV cache, slots.  Runs in a worker process."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace

import numpy as np
import torch

from minisgl.arrays import I32
from minisgl.config import Config
from minisgl.errors import UserError
from minisgl.model.common.finished import Finished
from minisgl.model.common.grammar import Grammars, unpack
from minisgl.model.common.host import anonymous_bytes, available_bytes, threads_per_rank
from minisgl.model.common.interfaces import Build
from minisgl.model.common.memory import host_line, host_pages, token_bytes
from minisgl.model.common.parallel import Parallel, to_stderr
from minisgl.model.common.pooling import Pooling
from minisgl.model.common.registry import model_class
from minisgl.model.common.shard import Shard
from minisgl.model.common.slots import SlotState, StepBatch
from minisgl.model.common.weights import OpenWeights
from minisgl.model.cpu.attention import TorchAttention
from minisgl.model.cpu.attention_c import KernelAttention
from minisgl.model.cpu.backend import CpuArithmetic
from minisgl.model.cpu.penalties import Adjustments, restrict
from minisgl.model.cpu.sampler import sample, score
from minisgl.plan import FAILED, StepLogprobs, StepPlan, StepResult

_NO_ROWS = np.zeros(0, np.int64)


class Runner:
    """Life: construct, `max_pages`, `allocate`, `launch` for every plan in order, `close`."""

    def __init__(self, config: Config, rank: int, run_dir: str, open_weights: OpenWeights, grammars: Grammars) -> None:
        """Join the group and load this rank's weights.  run_dir: see `join`.  Raises UserError for a bad checkpoint."""
        engine, spec = config.engine, config.model
        threads = threads_per_rank(engine)
        with contextlib.suppress(RuntimeError):  # may be set once per process, before the first parallel work
            torch.set_num_interop_threads(1)
        self._config = config
        self._arithmetic = CpuArithmetic.choose(engine, spec, threads)
        torch.set_num_threads(self._arithmetic.torch_threads)
        if rank == 0:
            to_stderr(self._arithmetic.text)
        self._shard = Shard.of(spec, rank, engine.tp)
        self._parallel = Parallel(rank, engine.tp, run_dir)
        before = anonymous_bytes()
        with torch.inference_mode():
            weights = open_weights(spec, self._arithmetic.dtype, lazy=self._arithmetic.lazy)
            served = replace(spec, max_context=config.max_context)
            build = Build(served, self._shard, weights, self._parallel, self._arithmetic.layers)
            self._model = model_class(spec.architecture)(build)
            weights.finish()
        self._weights, self._available = max(0, anonymous_bytes() - before), 0
        self._state = SlotState(engine.max_running, config.max_context, engine.page_size)
        self._adjustments = Adjustments(engine.max_running, spec.vocab_size)
        self._grammars = grammars
        self._pooling = Pooling()
        self._attention: TorchAttention | KernelAttention | None = None

    def max_pages(self) -> int:
        """The number of KV pages that fit next to the weights on this rank.  Raises UserError if none fits."""
        engine = self._config.engine
        self._available, token = available_bytes(), self._token_bytes()
        pages = host_pages(engine, self._config.max_context, token, self._available)
        if pages < 1:
            raise UserError(
                f"no memory for the KV cache: a page of {engine.page_size} tokens takes {engine.page_size * token >> 10} KiB, "
                f"and memory_fraction {engine.memory_fraction:g} of the free memory is less. Free some, or set kv_tokens."
            )
        return pages

    def allocate(self, num_pages: int) -> None:
        """Create the KV cache: `num_pages` pages, the same number on every rank."""
        page_size = self._config.engine.page_size
        if self._parallel.rank == 0:
            to_stderr(host_line(self._weights, self._available, num_pages * page_size, self._token_bytes()))
        self._attention = self._arithmetic.attention(self._config.model, self._shard, num_pages, page_size)

    def launch(self, plan: StepPlan) -> Finished:
        """Run one step.  Plans come in order, each exactly once, and the same ones on every rank."""
        if self._attention is None:
            raise RuntimeError("launch before allocate")
        start = time.perf_counter_ns()
        batch = self._state.apply(plan)
        if len(plan.extras):
            self._adjustments.join(plan)
        if len(plan.grammars):
            self._grammars.join(plan)
        if len(batch.ids) == 0:  # new slots and page grants alone
            return Finished(StepResult(plan.step, np.zeros(0, np.int32)))
        with torch.inference_mode():
            self._attention.plan(batch)
            ids, positions = torch.from_numpy(batch.ids), torch.from_numpy(batch.positions)
            rows = torch.from_numpy(np.concatenate((batch.sample_rows, batch.score_rows)))
            vectors: torch.Tensor | None = None
            if self._pooling.needed(plan):
                x, delta = self._model.states(ids, positions, self._attention)
                vectors = self._pooling.take(plan, batch, lambda rows: self._model.final(x, delta, torch.from_numpy(rows)))
                logits = self._model.logits(x, delta, rows)
            else:
                logits = self._model(ids, positions, rows, self._attention)
            tokens = self._draw(logits[: len(batch.sample_rows)], batch)
            drawn = np.maximum(tokens, 0)  # any token goes on in the place of a failure
            scores = self._score(logits, batch, drawn) if self._parallel.rank == 0 else None
        self._state.advance(batch, drawn)
        pooled = None if vectors is None else vectors.numpy()
        return Finished(StepResult(plan.step, tokens, (time.perf_counter_ns() - start) // 1000, scores=scores, vectors=pooled))

    def _draw(self, logits: torch.Tensor, batch: StepBatch) -> I32:
        """A token or a reason why there is none for each row, after biases, penalties and grammars."""
        state, slots = self._state, batch.sample_slots
        if state.extras and len(rows := np.flatnonzero(state.adjusted[slots])):
            adjusted = self._adjustments.apply(logits[torch.from_numpy(rows)], slots[rows], batch.sampling.positions[rows])
            logits = logits.float().index_copy(0, torch.from_numpy(rows), adjusted)
        masked = self._grammars.rows(slots) if self._grammars else _NO_ROWS
        if len(masked):
            masks, failed = self._grammars.masks(slots[masked])
            at, allowed = torch.from_numpy(masked), torch.from_numpy(unpack(masks, logits.shape[1]))
            logits = logits.float().index_copy(0, at, restrict(logits[at], allowed))
        tokens = sample(logits, batch.sampling)
        if state.extras and len(counted := np.flatnonzero(state.counted[slots])):
            self._adjustments.count(slots[counted], tokens[counted])
        if len(masked):
            self._grammars.advance(slots[masked], np.maximum(tokens[masked], 0))
            tokens[masked[failed & (tokens[masked] >= 0)]] = FAILED
        return tokens

    def _score(self, logits: torch.Tensor, batch: StepBatch, tokens: I32) -> StepLogprobs | None:
        """The requested log probabilities of sampled tokens and of tokens of prompts."""
        if not self._state.extras:
            return None
        rows = np.flatnonzero(self._state.logprobs[batch.sample_slots] >= 0)
        if not len(rows) and not len(batch.targets):
            return None
        chosen = np.concatenate((rows, len(batch.sample_rows) + np.arange(len(batch.targets))))
        widths = self._state.logprobs[np.concatenate((batch.sample_slots[rows], batch.score_slots))]
        return score(logits[torch.from_numpy(chosen)], np.concatenate((tokens[rows], batch.targets)), widths)

    @property
    def grammars(self) -> Grammars:
        """The grammars of its slots."""
        return self._grammars

    def capture_ahead(self) -> bool:
        """There are no graphs to capture on a CPU."""
        return False

    def close(self) -> None:
        """Leave the group and drop the cache.  Idempotent."""
        self._attention = None
        self._parallel.close()

    def _token_bytes(self) -> int:
        """Bytes of the KV cache per token on this rank."""
        return token_bytes(self._config.model, self._shard, self._arithmetic.kv_dtype.itemsize)
