"""Runs a worker without a model, to measure everything else: it writes an English text at a set pace.

The fake engine (`--model fake`) computes its tokens from the context; this worker costs nothing.
"""

from __future__ import annotations

import time

import numpy as np

from minisgl.actors.runtime.actor import Actor, Context
from minisgl.actors.runtime.shared_memory import Arenas
from minisgl.actors.worker import GrammarsLike, WorkerActor
from minisgl.config import Config
from minisgl.model.text.tokenizer import load_tokenizer
from minisgl.plan import DRAW, StepPlan, StepResult

TEXT = """The lighthouse keeper counted ships by their lamps: "two reds, one green", he wrote, and beneath it the hour.
In winter the sea threw pebbles at the windows; by morning the glass was dull with salt, and he polished it again.
Nobody had asked him to keep a diary. Still, page after page, he noted wind, cloud, and what the gulls were quarrelling over."""


class _Step:
    """A step that is over at a set time."""

    def __init__(self, result: StepResult, due: float) -> None:
        self._result, self._due = result, due

    def done(self) -> bool:
        """Sleeps until the step is over: polling would take processor time from what is measured."""
        time.sleep(max(0.0, self._due - time.monotonic()))
        return True

    def result(self) -> StepResult:
        return self._result


class FastRunner:
    """A RunnerLike.  `rate`: steps a second; 0: no limit."""

    grammars: GrammarsLike | None = None

    def __init__(self, config: Config, rate: float) -> None:
        self._pages = -(-config.engine.kv_tokens // config.engine.page_size)
        self._text = load_tokenizer(config.model).encode(TEXT, add_special=False)
        self._pause = 1 / rate if rate else 0.0
        self._due = 0.0
        self._rows = 0

    def max_pages(self) -> int:
        return self._pages

    def allocate(self, num_pages: int) -> None:
        """There is no KV cache."""

    def capture_ahead(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to free."""

    def launch(self, plan: StepPlan) -> _Step:
        if plan.decode is not None:
            self._rows = len(plan.decode)
        n = len([f for _, f, _ in plan.prefill.tolist() if f & DRAW]) + self._rows
        self._due = max(self._due, time.monotonic()) + self._pause
        tokens = self._text[(plan.step + 7 * np.arange(n)) % len(self._text)]
        return _Step(StepResult(plan.step, tokens.astype(np.int32)), self._due)


def make_worker(ctx: Context, config: Config, arenas: Arenas, rank: int, run_dir: str, *, rate: float) -> Actor:
    """Runs in the worker process; bind `rate` with functools.partial."""
    return WorkerActor(ctx, rank, arenas, lambda: FastRunner(config, rate))
