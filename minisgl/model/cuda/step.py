"""A step on the device, from a plan: what is uploaded, what is computed, and which steps are graphs.  Runs in the workers.

Everything here is tensors and kernels; streams, events and graphs are the runner's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from minisgl.arrays import I32
from minisgl.config import Config
from minisgl.model.common.grammar import Grammars
from minisgl.model.common.interfaces import Model
from minisgl.model.common.pooling import Pooling
from minisgl.model.common.slots import SlotState, StepBatch
from minisgl.model.cuda.attention.base import AttentionSpec, Chunks, DecodeRows, splits_for
from minisgl.model.cuda.attention.paged import PagedAttention
from minisgl.model.cuda.device_state import DeviceState, Uploads
from minisgl.model.cuda.grammar import GrammarRows
from minisgl.model.kernels.apply_plan import decode_inputs, mixed_inputs
from minisgl.model.kernels.grammar_mask import restrict
from minisgl.model.kernels.logprobs import SCORE_WORDS, DeviceLogprobs, score
from minisgl.model.kernels.penalties import adjust
from minisgl.model.kernels.prefill_attention import block_q, tiles_of
from minisgl.model.kernels.sampling import sample
from minisgl.plan import SCORED_TOKENS, StepPlan

SHORT_STEPS = (64, 128, 256, 512, 1024)  # tokens of the steps with prompt chunks that are captured as graphs
SHORT_CONTEXT = 4096  # of any of their rows: they walk over a context with one program, which a long one would stall
FEW_ROWS = 16  # rows of such a graph; a second one takes as many as there are slots


class Replays(Protocol):
    """minisgl.model.cuda.graphs.Graphs, or something that just runs the step."""

    def __contains__(self, key: Hashable) -> bool: ...

    def replay(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run `step` as the graph of `key`."""

    def capture(self, key: Hashable, step: Callable[[], None]) -> None:
        """Record it without running it: the slots are as before."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the arrays that describe a step with prompt chunks: tokens, rows, sampling rows, tiles."""

    tokens: int
    rows: int
    samples: int
    tiles: int

    @property
    def words(self) -> int:
        return 3 * self.tokens + 2 * self.rows + 4 * self.samples + 4 * self.tiles


PLAIN, EXTRAS, COUNTED = 0, 1, 2  # what the rows of a step want of sampling: nothing special; biases or scores; penalties too
GRAMMAR_ROWS = 4  # and this where a row has a grammar


class Steps:
    """Runs plans in order.  After `run`, the sampled tokens are in `tokens`, in the order of StepResult, and `scored` says what
    log probabilities are in `scores`; `vectors` are those that its plan wanted."""

    def __init__(
        self,
        config: Config,
        model: Model,
        grammars: Grammars,
        heads: AttentionSpec,
        *,
        processors: int,
        device: torch.device,
    ) -> None:
        engine = config.engine
        self._model, self._heads, self._processors, self._device = model, heads, processors, device
        self._kv_heads = -(-config.model.num_kv_heads // engine.tp)  # of the largest shard: all ranks must reckon alike
        self._max_running, self._step_tokens = engine.max_running, engine.step_tokens
        self.mirror = SlotState(engine.max_running, config.max_context, engine.page_size)
        vocab = config.model.vocab_size
        self.state = DeviceState(engine.max_running, config.max_context, engine.page_size, engine.lag, device, vocab=vocab)
        # i32; what stands behind the last row of a step are the results of padding rows.
        self.tokens = torch.zeros(engine.max_running + 64, dtype=torch.int32, device=device)
        # One line for each of `tokens`, and behind them for tokens of prompts; made when it is first needed.
        self._scores: torch.Tensor | None = None
        self.scored: DeviceLogprobs | None = None
        self.vectors: torch.Tensor | None = None  # f32 on the device, of the latest step's rows with POOL
        self._pooling = Pooling()
        self._inputs = Uploads(4 * (engine.step_tokens + 8 * engine.max_running + 64), engine.lag, device)
        self._short_inputs: dict[Sizes, torch.Tensor] = {}  # the fixed buffers of the graphs with prompt chunks
        self._resent = True  # the decode rows have changed since they were last sent
        self._attention: PagedAttention | None = None
        self.grammar_rows = GrammarRows(grammars, engine.max_running + 1, vocab, engine.lag, device)

    def use(self, attention: PagedAttention, graphs: Replays, *, decode_graphs: bool, short_graphs: bool) -> None:
        """Attention over the cache that steps run on from now on, and which kinds of steps may be graphs."""
        self._attention, self._graphs = attention, graphs
        self._decode_graphs, self._short_graphs = decode_graphs, short_graphs
        self.state.spare_page(attention.cache.num_pages)

    def run(self, plan: StepPlan) -> int:
        """Launch one plan; returns how many tokens it samples."""
        if plan.decode is not None:
            self._resent = True
        self.state.apply(plan)
        self.grammar_rows.begin(plan)
        self.scored = self.vectors = None
        if len(plan.prefill) == 0 and self._decode_graphs:
            return self._decode(self.mirror.advance_decode(plan))
        return self._mixed(plan, self.mirror.apply(plan))

    @property
    def scores(self) -> torch.Tensor:
        """i32[*, SCORE_WORDS] on the device, see minisgl.model.kernels.logprobs."""
        if self._scores is None:
            lines = len(self.tokens) + SCORED_TOKENS
            self._scores = torch.zeros(lines, SCORE_WORDS, dtype=torch.int32, device=self._device)
        return self._scores

    def _kind(self, slots: npt.NDArray[Any], batch: StepBatch | None = None) -> int:
        """What the sampling rows want; notes what will be scored, and sends the masks of grammars."""
        return self._wish(slots, batch) | (GRAMMAR_ROWS if self.grammar_rows.bind(slots) else 0)

    def _wish(self, slots: npt.NDArray[Any], batch: StepBatch | None) -> int:
        mirror = self.mirror
        if not mirror.extras:
            return PLAIN
        wanted = mirror.logprobs[slots]
        drawn = np.flatnonzero(wanted >= 0)
        targets = 0 if batch is None else len(batch.targets)
        if len(drawn) or targets:
            width = max(int(wanted.max(initial=0)), int(mirror.logprobs[batch.score_slots].max(initial=0)) if batch else 0)
            self.scored = DeviceLogprobs(drawn, len(self.tokens), targets, width)
        if mirror.counted[slots].any():
            return COUNTED
        return EXTRAS if len(drawn) or mirror.adjusted[slots].any() else PLAIN

    def _sample(
        self,
        kind: int,
        logits: torch.Tensor,
        slots: torch.Tensor,
        kv_lens: torch.Tensor,
        targets: torch.Tensor,
        *,
        advance: bool,
    ) -> None:
        """The end of a step, with what its `kind` asks for."""
        state, grammar_rows, kind = self.state, kind & GRAMMAR_ROWS, kind & ~GRAMMAR_ROWS
        counted = kind == COUNTED
        adjusted = logits if kind == PLAIN else adjust(logits, slots, kv_lens, state, counted=counted)
        if grammar_rows:
            adjusted = restrict(adjusted, slots, self.grammar_rows.has_grammar, self.grammar_rows.masks)
        sample(adjusted, slots, kv_lens, targets, state, self.tokens, advance=advance, counted=counted)
        if kind != PLAIN:
            score(logits, slots, self.tokens, targets, state, self.scores)

    def run_largest(self) -> None:
        """A step of as many tokens as one may have, as many rows as possible sampling: to see what memory that takes.

        It needs a cache of one page, and leaves the slots as they were when nothing has run yet.
        """
        rows = min(self._max_running, self._step_tokens)
        lens = np.full(rows, self._step_tokens // rows, np.int32)
        lens[0] += self._step_tokens - lens.sum()
        lens = np.minimum(lens, self.mirror.page_table.shape[1] * self.state.page_size)
        slots = np.arange(rows, dtype=np.int32)
        ends = np.cumsum(lens).astype(np.int32)
        zeros = np.zeros(int(lens.sum()), np.int32)
        pages = np.zeros((rows, -(-int(lens.max()) // self.state.page_size)), np.int32)
        buffer = self._inputs.send([zeros, zeros, zeros, slots, lens, ends - 1, slots, lens, slots])
        self._run_mixed(buffer, Sizes(len(zeros), rows, rows, 0), Chunks(lens, lens, slots, pages), None)
        self.state.kv_len.zero_()

    def capture_ahead(self) -> bool:
        """Capture one graph that is likely to be needed; False if there is none left.

        The rows are all the spare slot's: those of former requests would write to pages that others own by now.
        """
        buckets = sorted({bucket_of(rows) for rows in range(1, self._max_running + 1)}) if self._decode_graphs else []
        for bucket in buckets:
            splits = self._parts(bucket, 1 << 20)
            if (bucket, splits) not in self._graphs:
                self.state.decode_rows.fill_(self.state.spare)
                self._resent = True
                self._graphs.capture((bucket, splits), partial(self._run_decode, bucket, splits))
                return True
        short = (
            [(rows, tokens) for rows in (FEW_ROWS, self._max_running) for tokens in SHORT_STEPS] if self._short_graphs else []
        )
        for rows, tokens in short:
            sizes = self._short_sizes(tokens, rows)
            if sizes not in self._graphs:
                nothing = self._padded(sizes, [np.zeros(0, np.int32)] * 9, np.zeros(4 * sizes.tiles, np.int32))
                buffer = self._short_input(sizes)
                buffer.copy_(torch.from_numpy(np.concatenate(nothing)))
                self._graphs.capture(sizes, partial(self._run_mixed, buffer, sizes, None, None))
                return True
        return False

    # ---------------- decodes only
    def _decode(self, slots: I32) -> int:
        """A step of decodes only: replay the graph of the next larger number of rows."""
        rows = len(slots)
        if rows == 0:
            return 0
        lens = self.mirror.kv_len[slots]
        longest = int(lens.max())
        if self._resent:
            self.state.set_decode(slots, np.argsort(-lens, kind="stable"))
            self._resent = False
        bucket, kind = bucket_of(rows), self._kind(slots)
        splits = self._splits(bucket, rows, longest, int(lens.sum()))
        key = (bucket, splits, kind) if kind else (bucket, splits)
        self._graphs.replay(key, partial(self._run_decode, bucket, splits, kind))
        return rows

    def _splits(self, bucket: int, rows: int, longest: int, total: int) -> int:
        """Parts of a row.  Where one row is much longer than the others, four times as many keep it from being the last."""
        splits = self._parts(bucket, 1 << 20)
        return splits if longest * rows < 8 * total * splits else min(64, 4 * splits)

    def _parts(self, rows: int, longest: int) -> int:
        return splits_for(rows, self._kv_heads, longest, self._processors, min(2, self._heads.kv_dtype.itemsize))

    def _run_decode(self, bucket: int, splits: int, kind: int = PLAIN) -> None:
        state, attention = self.state, self._attention
        assert attention is not None
        slots, targets = state.decode_rows[0, :bucket], state.decode_rows[1, :bucket]
        ids, positions, kv_index, kv_lens = decode_inputs(slots, state, state.page_table, state.page_size)
        attention.plan(kv_index, None, DecodeRows(slots, kv_lens, splits))
        logits = self._model(ids, positions, None, attention)
        self._sample(kind, logits, slots, kv_lens, targets, advance=True)

    # ---------------- steps with prompt chunks
    def _mixed(self, plan: StepPlan, batch: StepBatch) -> int:
        """Chunks and decodes.  Returns how many tokens are sampled."""
        samples, tokens = len(batch.sample_slots), len(batch.ids)
        if tokens == 0:
            return 0
        n_chunks = len(batch.chunk_lens)
        row_slots = np.concatenate((plan.prefill["slot"].astype(np.int32), batch.decode_slots.astype(np.int32)))
        ids = batch.ids.astype(np.int32)
        ids[tokens - len(batch.decode_slots) :] = -1 - batch.decode_slots
        longest, kind = int(batch.kv_lens.max(initial=0)), self._kind(batch.sample_slots, batch)
        pooled = Pooling.needed(plan)
        short = longest <= SHORT_CONTEXT and not len(batch.targets) and not pooled
        bucket = next((t for t in SHORT_STEPS if t >= tokens), 0) if short else 0
        if not bucket or not self._short_graphs:
            sizes = Sizes(tokens, len(row_slots), samples, 0)
            buffer = self._inputs.send(self._pack(sizes, batch, ids, row_slots, None))
            chunks = Chunks(batch.chunk_lens, batch.kv_lens[:n_chunks], row_slots[:n_chunks], batch.pages[:n_chunks])
            self._run_mixed(buffer, sizes, chunks if n_chunks else None, batch, kind, pooled=plan if pooled else None)
        else:
            rows = FEW_ROWS if len(row_slots) <= FEW_ROWS else self._max_running
            sizes = self._short_sizes(bucket, rows)
            lens = np.concatenate((batch.chunk_lens, np.ones(len(batch.decode_slots), np.int32)))
            tiles = tiles_of(lens, row_slots, batch.kv_lens, self._heads.group, pad_to=sizes.tiles)
            buffer = self._inputs.send(self._pack(sizes, batch, ids, row_slots, tiles), into=self._short_input(sizes))
            key = (sizes, kind) if kind else sizes
            self._graphs.replay(key, partial(self._run_mixed, buffer, sizes, None, None, kind))
        self._inputs.turn()
        return samples

    def _pack(self, sizes: Sizes, batch: StepBatch, ids: I32, row_slots: I32, tiles: I32 | None) -> list[I32]:
        """The arrays of `_run_mixed` in order, padded to `sizes`: padding rows are the spare slot's, on the spare page."""
        arrays: list[np.ndarray] = [ids, batch.positions, batch.kv_index, row_slots, batch.kv_lens]
        sampling: list[np.ndarray] = [
            batch.sample_rows,
            batch.sample_slots,
            batch.sampling.positions,
            np.arange(len(batch.sample_slots)),
        ]
        return self._padded(sizes, [*arrays, *sampling], tiles)

    def _padded(self, sizes: Sizes, arrays: list[np.ndarray], tiles: I32 | None) -> list[I32]:
        assert self._attention is not None
        spare, page = self.state.spare, self._attention.cache.num_pages * self.state.page_size
        t, r, s = sizes.tokens, sizes.rows, sizes.samples
        paddings = ((t, 0), (t, 0), (t, page), (r, spare), (r, 0), (s, 0), (s, spare), (s, 1), (s, len(self.tokens) - 1))
        out = []
        for array, (size, value) in zip(arrays, paddings, strict=True):
            whole = np.full(size, value, np.int32)
            whole[: len(array)] = array
            out.append(whole)
        return out if tiles is None else [*out, tiles]

    def _short_sizes(self, tokens: int, rows: int) -> Sizes:
        return Sizes(tokens, rows, rows, tokens // block_q(self._heads.group) + rows)

    def _short_input(self, sizes: Sizes) -> torch.Tensor:
        """The fixed buffer of one kind of graph with prompt chunks."""
        if sizes not in self._short_inputs:
            self._short_inputs[sizes] = torch.zeros(sizes.words, dtype=torch.int32, device=self._device)
        return self._short_inputs[sizes]

    def _run_mixed(
        self,
        buffer: torch.Tensor,
        sizes: Sizes,
        chunks: Chunks | None,
        batch: StepBatch | None,
        kind: int = PLAIN,
        *,
        pooled: StepPlan | None = None,
    ) -> None:
        """A step from its arrays on the device.  In a graph there is no batch, and every row is a chunk with tiles.

        `pooled`: the plan, if it wants vectors.
        """
        attention, state = self._attention, self.state
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
                splits = self._parts(len(lens), int(lens.max()))
                rows = DecodeRows(row_slots[first:], row_lens[first:], splits, lens, batch.pages[first:])
            attention.plan(kv_index, chunks, rows)
        rows_of_logits = sample_rows.long()
        if batch is not None and len(batch.targets):
            rows_of_logits = torch.cat((rows_of_logits, self._upload(batch.score_rows).long()))
        if pooled is None or batch is None:
            logits = self._model(ids, positions, rows_of_logits, attention)
        else:
            x, delta = self._model.states(ids, positions, attention)
            self.vectors = self._pooling.take(
                pooled, batch, lambda rows: self._model.final(x, delta, self._upload(rows).long())
            )
            logits = self._model.logits(x, delta, rows_of_logits)
        if s:
            self._sample(kind, logits[:s], sample_slots, sample_lens, targets, advance=False)
        if batch is not None and len(batch.targets):
            self._score_prompts(logits[s:], batch)

    def _score_prompts(self, logits: torch.Tensor, batch: StepBatch) -> None:
        """The log probabilities of tokens of prompts, behind those of drawn tokens."""
        words = np.stack([batch.score_slots, batch.targets.astype(np.int64), np.arange(len(batch.targets))])
        slots, tokens, places = self._upload(words)
        score(logits, slots, tokens, places, self.state, self.scores[len(self.tokens) :])

    def _upload(self, values: npt.NDArray[Any]) -> torch.Tensor:
        """i32 on the device, without waiting: seldom, so a buffer of its own."""
        host = torch.from_numpy(values.astype(np.int32))
        return (host.pin_memory() if self._device.type == "cuda" else host).to(self._device, non_blocking=True)


def bucket_of(rows: int) -> int:
    """The padded batch size: powers of two up to 8, then multiples of 8 up to 64, of 16 up to 256, of 64 beyond."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 16 if rows <= 256 else 64
    return -(-rows // step) * step
