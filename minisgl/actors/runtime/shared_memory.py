"""Allocates the shared memory of a run.  Each word of it has one writer; docs/structures.md has the same table.

arena     writer      readers       holds
plans     scheduler   worker 0..N-1 StepPlan records
results   worker 0    scheduler     StepResult records
prompts   tokenizer   api           token ids of prompts, i32, announced by Tokenized; one ring for each tokenizer
requests  api         scheduler     token ids to continue, i32, announced by Generate
pages     scheduler   the next    what each cached KV page holds (cache/kept.py)
board     every one   api         one line per process: its heartbeat and state
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from minisgl.actors.runtime.ring import Arena, RingSpec, create_arena, create_ring
from minisgl.actors.runtime.status import BoardSpec, create_board
from minisgl.config import Config
from minisgl.plan import POOLED_ROWS, SCORED_TOKENS
from minisgl.sampling_params import MAX_LOGPROBS

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Arenas:
    """Addresses of all shared memory of one run; travels in the spawn arguments."""

    plans: RingSpec
    results: RingSpec
    prompts: tuple[RingSpec, ...]  # of each tokenizer
    requests: RingSpec
    pages: Arena  # as large as its users find right
    board: BoardSpec


def tokenizer_names(n: int) -> tuple[str, ...]:
    """The names of `n` tokenizer processes.  The first has no number: usually it is the only one."""
    return ("tokenizer", *(f"tokenizer{i}" for i in range(1, n)))


def actor_names(tp: int, tokenizers: int = 1) -> tuple[str, ...]:
    """The processes of a run besides api, in the order in which they are started."""
    return (*tokenizer_names(tokenizers), "checker", "detokenizer", "scheduler", *(f"worker{rank}" for rank in range(tp)))


class Memory:
    """The shared memory of a run; every part lives as long as the descriptor that is kept here.  Runs in the api process.

    The memory is sparse: a page of it exists once it has been written to.
    """

    def __init__(self, config: Config) -> None:
        engine, tokenizers = config.engine, tokenizer_names(config.server.num_tokenizers)
        longest = 4 * 4 * config.max_context  # a prompt may reach the api four times too long, to be refused with its number
        table = 12 * engine.max_running * -(-config.max_context // engine.page_size)  # grants every page of every slot
        plan = min(32 * _MIB, table) + 4 * engine.step_tokens + 8 * config.max_context + 2 * _MIB
        result = 8 * (1 + MAX_LOGPROBS) * (engine.max_running + SCORED_TOKENS)  # with every log probability
        result += 4 * config.model.hidden_size * POOLED_ROWS
        prompts = max(16 * _MIB, 3 * longest)
        # name -> (readers, or 0 where there is no ring; bytes)
        self._shapes = {
            "plans": (engine.tp, 4 * plan),
            "results": (1, _MIB + 2 * engine.lag * result),
            "requests": (1, prompts),
            "pages": (0, 0),
        }
        self._fds: dict[str, int] = {}
        made = {name: self._make(name, 1, prompts) for name in tokenizers}
        shared = {name: self._make(name, *shape) for name, shape in self._shapes.items()}
        board, self._fds["board"] = create_board(("api", *actor_names(engine.tp, config.server.num_tokenizers)))
        self.arenas = Arenas(**shared, prompts=tuple(made.values()), board=board)

    def _make(self, name: str, readers: int, size: int) -> Any:
        made, self._fds[name] = create_ring(name, readers, size) if readers else create_arena(name, size)
        return made

    def renew(self, *names: str) -> None:
        """Replace arenas by empty ones.  Raises OSError.  Processes that have mapped the old ones keep those."""
        for name in names:
            old = self._fds[name]
            made: dict[str, Any] = {name: self._make(name, *self._shapes[name])}
            os.close(old)
            self.arenas = replace(self.arenas, **made)

    def close(self) -> None:
        """Free the memory; parts that a process has mapped stay until it ends.  Idempotent."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}
