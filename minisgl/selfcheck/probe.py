"""Records the output of every layer of one rank, for `minisgl selfcheck`.  Runs in a process of its own, one per rank.

The real runner executes real plans; taps around the layers and the model keep their outputs.  Each sequence is computed in
three ways that must agree: token by token after its prompt ("decode"), in one step ("prefill"), and on the cached pages of its
first half ("cached").
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from minisgl.actors.spawn import make_runner
from minisgl.config import Config
from minisgl.model.common.activations import Product
from minisgl.plan import GRANT, JOIN, PREFILL, StepPlan

Tensors = dict[str, torch.Tensor]


def probe(folder: str, config: Config, prompts: Sequence[Sequence[int]], generate: int, rank: int) -> None:
    """`observe`; rank 0 writes the result to a file."""
    seen = observe(config, prompts, generate, rank, folder)
    if rank == 0:
        save_file(seen, os.path.join(folder, "probe.safetensors"))


def observe(config: Config, prompts: Sequence[Sequence[int]], generate: int, rank: int = 0, run_dir: str = "") -> Tensors:
    """The arrays "<prompt>.<way>.hidden" f32[L + 1, S, C], before the first layer and after each, and ".logits" f32[S, V].

    S counts the prompt and all generated tokens but the last; "cached" has only the rows behind the cached tokens.  With
    `generate` also "<prompt>.tokens" i64[generate].  The same on every rank.
    """
    runner = make_runner(config, rank, run_dir)
    try:
        probe = _Probe(runner, config)
        out: Tensors = {}
        for i, prompt in enumerate(prompts):
            out |= {f"{i}.{name}": t.contiguous() for name, t in probe.sequence(list(prompt), generate).items()}
        return out
    finally:
        runner.close()


class _Tap:
    """A layer that also keeps the residual stream after it: x, which is updated in place, plus the returned part."""

    def __init__(self, layer: Callable[..., Product], seen: list[torch.Tensor], first: bool) -> None:
        self._layer, self._seen, self._first = layer, seen, first

    def __call__(self, x: torch.Tensor, delta: Product | None, *rest: Any) -> Product:
        if self._first:
            self._seen.append(x.float().cpu().clone())
        out = self._layer(x, delta, *rest)
        self._seen.append((x.float() + out.float()).cpu())
        return out


def _tapped(model: Any, hidden: list[torch.Tensor], logits: list[torch.Tensor]) -> None:
    """Make `model` keep the outputs of its layers and the logits of all rows, in place: others may hold it, too."""
    base = type(model)

    class Tapped(base):  # type: ignore[misc, valid-type]
        def __call__(
            self, ids: torch.Tensor, positions: torch.Tensor, sample_rows: torch.Tensor | None, attend: Any
        ) -> torch.Tensor:
            out: torch.Tensor = base.__call__(self, ids, positions, None, attend)
            logits.append(out.float().cpu())
            return out if sample_rows is None else out[sample_rows]

    model.__class__ = Tapped
    model.layers = [_Tap(layer, hidden, i == 0) for i, layer in enumerate(model.layers)]


class _Probe:
    """Runs one request after the other; slot 0 computes, slot 1 continues on cached pages."""

    def __init__(self, runner: Any, config: Config) -> None:
        self._runner, self._size = runner, config.engine.page_size
        runner.max_pages()  # a GPU measures its largest step here, before the taps
        runner.allocate(config.engine.kv_tokens // self._size)
        # Pages out of order, so that a mistake in the page table shows.
        self._pages = np.random.default_rng(0).permutation(config.engine.kv_tokens // self._size).astype(np.int32)
        self._hidden: list[torch.Tensor] = []
        self._logits: list[torch.Tensor] = []
        _tapped(runner._model, self._hidden, self._logits)
        self._step = 0

    def sequence(self, prompt: list[int], generate: int) -> Tensors:
        per = -(-(len(prompt) + generate) // self._size)
        first, second, third = (self._pages[i * per : (i + 1) * per] for i in range(3))
        out: Tensors = {}
        ids = prompt
        if generate:
            tokens = self._run(new_slots=[0], pages={0: first}, prefill=(0, prompt))
            for _ in range(generate - 1):
                tokens += self._run(decode=[0])
            out |= self._take("decode") | {"tokens": torch.tensor(tokens)}
            ids = prompt + tokens[:-1]
        self._run(new_slots=[0], pages={0: second}, prefill=(0, ids))
        out |= self._take("prefill")
        cached = len(ids) // 2 // self._size * self._size
        if generate and cached:
            own = np.concatenate([second[: cached // self._size], third])[:per]
            self._run(new_slots=[1], pages={1: own}, prefill=(1, ids[cached:]), kv_len=cached)
            out |= self._take("cached")
        return out

    def _run(
        self,
        *,
        new_slots: Sequence[int] = (),
        pages: Mapping[int, Any] | None = None,
        prefill: tuple[int, list[int]] | None = None,
        decode: Sequence[int] = (),
        kv_len: int = 0,
    ) -> list[int]:
        """Run one step; returns its greedy tokens."""
        self._step += 1
        join = np.zeros(len(new_slots), JOIN)
        join["slot"], join["kv_len"], join["top_p"] = new_slots, kv_len, 1.0
        page_grants = [(slot, i, page) for slot, granted in (pages or {}).items() for i, page in enumerate(granted)]
        rows = [] if prefill is None else [(prefill[0], 1, len(prefill[1]))]
        plan = StepPlan(
            self._step,
            new_slots=join,
            page_grants=np.array(page_grants, GRANT),
            prefill=np.array(rows, PREFILL),
            decode=np.array(decode, np.int32),
            ids=np.array([] if prefill is None else prefill[1], np.int32),
        )
        pending = self._runner.launch(StepPlan.unpack(plan.pack()))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        tokens: list[int] = pending.result().tokens.tolist()
        return tokens

    def _take(self, way: str) -> Tensors:
        """The rows of all steps since the last call, concatenated."""
        per_step = len(self._hidden) // len(self._logits)
        steps = [self._hidden[i : i + per_step] for i in range(0, len(self._hidden), per_step)]
        hidden = torch.stack([torch.cat(layer) for layer in zip(*steps, strict=True)])
        out = {f"{way}.hidden": hidden, f"{way}.logits": torch.cat(self._logits)}
        self._hidden.clear()
        self._logits.clear()
        return out
