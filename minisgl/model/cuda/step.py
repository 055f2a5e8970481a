"""Runs the steps of plans on the GPU: apply the plan, replay a graph or launch kernel by kernel, sample, score.

Everything here is tensors and kernels; streams, events and the graphs themselves are the runner's.  Runs in the workers.

    decode rows only     a graph for each bucket of row counts; it finds its inputs on the device, so nothing is uploaded
    with prompt chunks   up to `_graph_tokens` tokens a graph for each bucket of tokens; its inputs are one upload (StepInputs)
    everything else      launched kernel by kernel, which takes the host about half a millisecond a layer
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minisgl.arrays import I32
from minisgl.config import Config
from minisgl.model.common.grammar import Grammars
from minisgl.model.common.interfaces import Model
from minisgl.model.common.pooling import Pooling
from minisgl.model.common.slots import SlotState, StepBatch
from minisgl.model.cuda.attention.base import AttentionSpec, Chunks, DecodeRows
from minisgl.model.cuda.attention.paged import PagedAttention
from minisgl.model.cuda.device_state import DeviceState
from minisgl.model.cuda.grammar import GrammarRows
from minisgl.model.cuda.graphs import Graphs
from minisgl.model.cuda.step_inputs import NOTHING, Sizes, StepInputs
from minisgl.model.kernels.apply_plan import decode_inputs, mixed_inputs
from minisgl.model.kernels.decode_attention import splits_for
from minisgl.model.kernels.grammar_mask import restrict
from minisgl.model.kernels.logprobs import SCORE_WORDS, DeviceLogprobs, score
from minisgl.model.kernels.penalties import adjust
from minisgl.model.kernels.prefill_attention import block_q, tiles_of
from minisgl.model.kernels.sampling import sample
from minisgl.model.kernels.uploads import Uploads, upload
from minisgl.plan import DRAW, PREFILL, SCORED_TOKENS, StepPlan

# Tokens of the steps with prompt chunks that are captured as graphs, where launches take longer than kernels
# (`launch_bound_tokens`): a prompt of 2,048 tokens of 0.6B took 17 to 25 ms, of which its kernels need 4.3.  Above that,
# padding costs more than launches: 560 tokens of 14B take 45 ms as 1,024.
SHORT_STEPS = (64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096)
LAUNCH_SECONDS = 0.5e-3  # of the kernels of one layer, one by one
FLOPS = 600e12  # of a GPU, in products of many rows
SHORT_CONTEXT = 4096  # tokens of any of their rows: one program walks over a row's context, which a long one would stall
FEW_ROWS = 16  # rows of such a graph; a second one takes as many as there are slots

# How the rows of a step are sampled, which is part of a graph's key.
PLAIN, EXTRAS, COUNTED = 0, 1, 2  # nothing special; biases or log probabilities; penalties, too
GRAMMAR_ROWS = 4  # added where a row has a grammar


class Steps:
    """Runs plans in order.

    After `run`, the sampled tokens are in `tokens`, in the order of StepResult; `scored` says which log probabilities are in
    `scores`; `vectors` f32[rows with POOL, C] are those of the plan.
    """

    _attention: PagedAttention  # this and the rest: see `use`
    _graphs: Graphs
    _decode_graphs: bool
    _graph_tokens: list[int]
    _padding: StepInputs

    def __init__(
        self, config: Config, model: Model, grammars: Grammars, heads: AttentionSpec, *, processors: int, device: torch.device
    ) -> None:
        engine, vocab = config.engine, config.model.vocab_size
        self._model, self._heads, self._processors, self._device = model, heads, processors, device
        self._launch_bound_tokens = launch_bound_tokens(config)
        self._kv_heads = -(-config.model.num_kv_heads // engine.tp)  # of the largest shard: ranks must choose the same graphs
        self._max_running, self._step_tokens = engine.max_running, engine.step_tokens
        self._max_context = config.max_context
        self.mirror = SlotState(engine.max_running, config.max_context, engine.page_size)
        self.state = DeviceState(engine.max_running, config.max_context, engine.page_size, engine.lag, device, vocab=vocab)
        # i32; the results of padding rows go behind the last row of a step.
        self.tokens = torch.zeros(engine.max_running + 64, dtype=torch.int32, device=device)
        # A line for each of `tokens`, then for tokens of prompts; made when it is first needed.
        self._scores: torch.Tensor | None = None
        self.scored: DeviceLogprobs | None = None
        self.vectors: torch.Tensor | None = None
        self._pooling = Pooling()
        self._inputs = Uploads(4 * (engine.step_tokens + 8 * engine.max_running + 64), engine.lag, device)
        self._buffers: dict[Sizes, torch.Tensor] = {}  # the inputs of the graphs with prompt chunks
        self._resent = True  # the decode rows have changed since they were last sent
        self.grammar_rows = GrammarRows(grammars, engine.max_running + 1, vocab, engine.lag, device)

    def use(self, attention: PagedAttention, graphs: Graphs, *, decode_graphs: bool, short_graphs: bool) -> None:
        """Run on this cache from now on; `decode_graphs`, `short_graphs`: which kinds of steps may be graphs."""
        self._attention, self._graphs = attention, graphs
        self._decode_graphs = decode_graphs
        self._graph_tokens = [tokens for tokens in SHORT_STEPS if tokens <= self._launch_bound_tokens] if short_graphs else []
        spare, spare_page = self.state.spare, attention.cache.num_pages
        self.state.spare_page(spare_page)
        self._padding = StepInputs(
            ids=0,
            positions=0,
            kv_index=spare_page * self.state.page_size,
            row_slots=spare,
            row_lens=0,
            sample_rows=0,
            sample_slots=spare,
            sample_positions=1,
            targets=len(self.tokens) - 1,
            tiles=0,
        )

    def run(self, plan: StepPlan) -> int:
        """Launch one plan; returns how many tokens it samples."""
        self._resent |= plan.decode is not None
        self.state.apply(plan)
        self.grammar_rows.begin(plan)
        self.scored = self.vectors = None
        if len(plan.prefill) == 0 and self._decode_graphs:
            return self._replay_decodes(self.mirror.advance_decode(plan))
        batch = self.mirror.apply(plan)
        if len(batch.ids) == 0:
            return 0
        kind, sizes = self._kind(batch.sample_slots, batch), self._graph_sizes(plan, batch)
        if sizes is None:
            self._launch(plan, batch, kind)
        else:
            self._replay_chunks(plan, batch, sizes, kind)
        self._inputs.turn()
        return len(batch.sample_slots)

    def run_largest(self) -> None:
        """A step of as many tokens as one may have, as many rows as possible sampling: to see what memory that takes.

        It needs a cache of one page, and leaves the slots as they were when nothing has run yet.
        """
        rows = min(self._max_running, self._step_tokens)
        prefill = np.zeros(rows, PREFILL)
        prefill["slot"], prefill["sample"], prefill["n_ids"] = np.arange(rows), DRAW, self._step_tokens // rows
        prefill["n_ids"][0] += self._step_tokens % rows
        prefill["n_ids"] = np.minimum(prefill["n_ids"], self._max_context)
        plan = StepPlan(0, prefill=prefill, ids=np.zeros(int(prefill["n_ids"].sum()), np.int32))
        mirror = SlotState(self._max_running, self._max_context, self.state.page_size)
        self._launch(plan, mirror.apply(plan), PLAIN)
        self.state.kv_len.zero_()

    def capture_ahead(self) -> bool:
        """Capture one graph that is likely to be needed; False if there is none left.

        The rows are all the spare slot's: those of former requests would write to pages that others own by now.
        """
        for key in self._expected_graphs():
            if key in self._graphs:
                continue
            if isinstance(key, Sizes):
                self._buffer(key).copy_(torch.from_numpy(NOTHING.pack(key, self._padding)))
                self._graphs.capture(key, partial(self._chunk_step, key))
            else:
                self.state.decode_rows.fill_(self.state.spare)
                self._resent = True
                self._graphs.capture(key, partial(self._decode_step, *key))
            return True
        return False

    def _expected_graphs(self) -> Iterator[tuple[int, int] | Sizes]:
        """Keys of all graphs of plain rows, those that are needed first first."""
        buckets = sorted({bucket_of(rows) for rows in range(1, self._max_running + 1)}) if self._decode_graphs else []
        yield from ((bucket, self._parts(bucket)) for bucket in buckets)
        for rows in (FEW_ROWS, self._max_running):
            # Largest first: the smaller ones then find all their temporaries in the memory of the graphs.
            yield from (self._sizes(tokens, rows) for tokens in reversed(self._graph_tokens))
        yield from ((bucket, self._more_parts(bucket)) for bucket in buckets)

    # ---------------- decode rows only
    def _replay_decodes(self, slots: I32) -> int:
        """Replay the graph of the next larger bucket of rows; returns the number of rows."""
        rows = len(slots)
        if rows == 0:
            return 0
        lens = self.mirror.kv_len[slots]
        if self._resent:
            self.state.set_decode(slots, np.argsort(-lens, kind="stable"))
            self._resent = False
        bucket, kind = bucket_of(rows), self._kind(slots)
        splits = self._splits(bucket, rows, int(lens.max()), int(lens.sum()))
        key = (bucket, splits, kind) if kind else (bucket, splits)
        self._graphs.replay(key, partial(self._decode_step, bucket, splits, kind))
        return rows

    def _decode_step(self, bucket: int, splits: int, kind: int = PLAIN) -> None:
        state = self.state
        slots, targets = state.decode_rows[0, :bucket], state.decode_rows[1, :bucket]
        ids, positions, kv_index, kv_lens = decode_inputs(slots, state, state.page_table, state.page_size)
        self._attention.plan(kv_index, None, DecodeRows(slots, kv_lens, splits))
        logits = self._model(ids, positions, None, self._attention)
        self._sample(kind, logits, slots, kv_lens, targets, advance=True)

    def _splits(self, bucket: int, rows: int, longest: int, total: int) -> int:
        """Parts of a row.  Where one row is much longer than the others, four times as many keep it from being the last."""
        splits = self._parts(bucket)
        return splits if longest * rows < 8 * total * splits else self._more_parts(bucket)

    def _more_parts(self, bucket: int) -> int:
        return min(64, 4 * self._parts(bucket))

    def _parts(self, bucket: int) -> int:
        kv_bytes = min(2, self._heads.kv_dtype.itemsize)
        return splits_for(bucket, self._kv_heads, 1 << 20, self._processors, kv_bytes)

    # ---------------- steps with prompt chunks, in graphs
    def _graph_sizes(self, plan: StepPlan, batch: StepBatch) -> Sizes | None:
        """The sizes of the graph that the step fits; None: there is no such graph."""
        bucket = next((tokens for tokens in self._graph_tokens if tokens >= len(batch.ids)), None)
        if bucket is None or batch.kv_lens.max() > SHORT_CONTEXT or len(batch.targets) or Pooling.needed(plan):
            return None
        return self._sizes(bucket, FEW_ROWS if len(batch.kv_lens) <= FEW_ROWS else self._max_running)

    def _sizes(self, tokens: int, rows: int) -> Sizes:
        return Sizes(tokens, rows, rows, tokens // block_q(self._heads.group) + rows)

    def _buffer(self, sizes: Sizes) -> torch.Tensor:
        """The inputs of a graph, at their fixed address."""
        if sizes not in self._buffers:
            self._buffers[sizes] = torch.zeros(sum(sizes.lengths), dtype=torch.int32, device=self._device)
        return self._buffers[sizes]

    def _replay_chunks(self, plan: StepPlan, batch: StepBatch, sizes: Sizes, kind: int) -> None:
        """Replay the graph of `sizes`.  In it every row is a chunk with tiles, a decode row one of a single token."""
        inputs = StepInputs.of(plan, batch)
        lens = np.concatenate((batch.chunk_lens, np.ones(len(batch.decode_slots), np.int32)))
        tiles = tiles_of(lens, inputs.row_slots, batch.kv_lens, self._heads.group, pad_to=sizes.tiles)
        self._inputs.send([inputs._replace(tiles=tiles.ravel()).pack(sizes, self._padding)], into=self._buffer(sizes))
        self._graphs.replay((sizes, kind) if kind else sizes, partial(self._chunk_step, sizes, kind))

    def _chunk_step(self, sizes: Sizes, kind: int = PLAIN) -> None:
        inputs = StepInputs.views(self._buffer(sizes), sizes)
        ids, positions, kv_index = self._enter(inputs)
        self._attention.plan(kv_index, Chunks(tiles=inputs.tiles.view(-1, 4)), None, short=True)
        logits = self._model(ids, positions, inputs.sample_rows.long(), self._attention)
        self._sample(kind, logits, inputs.sample_slots, inputs.sample_positions, inputs.targets, advance=False)

    # ---------------- steps of any kind, kernel by kernel
    def _launch(self, plan: StepPlan, batch: StepBatch, kind: int) -> None:
        packed = StepInputs.of(plan, batch)
        sizes = packed.sizes
        inputs = StepInputs.views(self._inputs.send([packed.pack(sizes, self._padding)]), sizes)
        ids, positions, kv_index = self._enter(inputs)
        self._attention.plan(kv_index, *self._attention_rows(plan, batch, inputs))
        rows = inputs.sample_rows.long()
        if len(batch.targets):
            rows = torch.cat((rows, self._send(batch.score_rows)))
        if Pooling.needed(plan):
            x, delta = self._model.states(ids, positions, self._attention)
            self.vectors = self._pooling.take(plan, batch, lambda at: self._model.final(x, delta, self._send(at)))
            logits = self._model.logits(x, delta, rows)
        else:
            logits = self._model(ids, positions, rows, self._attention)
        if sizes.samples:
            drawn = logits[: sizes.samples]
            self._sample(kind, drawn, inputs.sample_slots, inputs.sample_positions, inputs.targets, advance=False)
        if len(batch.targets):
            self._score_prompts(logits[sizes.samples :], batch)

    def _attention_rows(self, plan: StepPlan, batch: StepBatch, inputs: StepInputs) -> tuple[Chunks | None, DecodeRows | None]:
        """The step's prompt chunks and decode rows, as attention plans them."""
        n, rows = len(batch.chunk_lens), len(batch.decode_slots)
        chunks = decodes = None
        if n:
            slots = plan.prefill["slot"].astype(np.int32)
            chunks = Chunks(batch.chunk_lens, batch.kv_lens[:n], slots, batch.pages[:n])
        if rows:
            lens = batch.kv_lens[n:]
            splits = self._splits(bucket_of(rows), rows, int(lens.max()), int(lens.sum()))
            decodes = DecodeRows(inputs.row_slots[n:], inputs.row_lens[n:], splits, lens, batch.pages[n:])
        return chunks, decodes

    def _enter(self, inputs: StepInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Enter the rows' lengths into the slots -> (token ids, positions, kv_index), i64[T] each."""
        i = inputs
        return mixed_inputs(i.ids, i.positions, i.kv_index, i.row_slots, i.row_lens, self.state)

    def _send(self, rows: npt.NDArray[Any]) -> torch.Tensor:
        """Indices of rows as i64 on the device."""
        return upload(rows, self._device).long()

    # ---------------- sampling and log probabilities
    @property
    def scores(self) -> torch.Tensor:
        """i32[*, SCORE_WORDS] on the device, see minisgl.model.kernels.logprobs."""
        if self._scores is None:
            lines = len(self.tokens) + SCORED_TOKENS
            self._scores = torch.zeros(lines, SCORE_WORDS, dtype=torch.int32, device=self._device)
        return self._scores

    def _kind(self, slots: npt.NDArray[Any], batch: StepBatch | None = None) -> int:
        """How the sampling rows are sampled; notes what will be scored, and sends the masks of grammars."""
        return self._extras_kind(slots, batch) | (GRAMMAR_ROWS if self.grammar_rows.bind(slots) else 0)

    def _extras_kind(self, slots: npt.NDArray[Any], batch: StepBatch | None) -> int:
        mirror = self.mirror
        if not mirror.extras:
            return PLAIN
        alternatives = mirror.logprobs[slots]
        drawn = np.flatnonzero(alternatives >= 0)
        targets = 0 if batch is None else len(batch.targets)
        if len(drawn) or targets:
            prompts = 0 if batch is None else int(mirror.logprobs[batch.score_slots].max(initial=0))
            width = max(int(alternatives.max(initial=0)), prompts)
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
        """The end of a step: adjust and mask the logits, draw, and score what was drawn, as `kind` says."""
        state, extras = self.state, kind & ~GRAMMAR_ROWS
        counted = extras == COUNTED
        adjusted = logits if extras == PLAIN else adjust(logits, slots, kv_lens, state, counted=counted)
        if kind & GRAMMAR_ROWS:
            adjusted = restrict(adjusted, slots, self.grammar_rows.has_grammar, self.grammar_rows.masks)
        sample(adjusted, slots, kv_lens, targets, state, self.tokens, advance=advance, counted=counted)
        if extras != PLAIN:
            score(logits, slots, self.tokens, targets, state, self.scores)

    def _score_prompts(self, logits: torch.Tensor, batch: StepBatch) -> None:
        """The log probabilities of tokens of prompts, behind those of drawn tokens."""
        words = np.stack([batch.score_slots, batch.targets.astype(np.int64), np.arange(len(batch.targets))])
        slots, tokens, lines = upload(words, self._device)
        score(logits, slots, tokens, lines, self.state, self.scores[len(self.tokens) :])


def launch_bound_tokens(config: Config) -> int:
    """Tokens up to which the kernels of a step take less time than their launches, the same number on all ranks."""
    spec = config.model
    heads = 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim
    inner = 3 * (spec.experts_per_token * spec.expert_size if spec.num_experts else spec.intermediate_size)
    weights = spec.hidden_size * (heads + inner) / config.engine.tp  # of a layer, that a token meets
    return int(LAUNCH_SECONDS * FLOPS / (2 * weights))


def bucket_of(rows: int) -> int:
    """The padded batch size: powers of two up to 8, then multiples of 8 up to 64, of 16 up to 256, of 64 beyond."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 16 if rows <= 256 else 64
    return -(-rows // step) * step
