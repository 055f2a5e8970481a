"""Run the whole engine in one thread, under virtual time, so that a debugger or a tracer can step through all actors.

The same gateway, tokenizer, scheduler, worker and detokenizer as in a real system, on the deterministic runtime of
minisgl.actors.runtime.local: `LLM(model, processes=False)` uses it.  Runs in the process of its caller.
"""

from __future__ import annotations

import os

from minisgl.actors import spawn
from minisgl.actors.messages import Hello
from minisgl.actors.runtime.local import LocalSystem
from minisgl.actors.runtime.shared_memory import Memory, tokenizer_names
from minisgl.api.gateway import Gateway
from minisgl.config import Config
from minisgl.errors import UserError


class InProcessSystem:
    """A System without processes.  One rank only: ranks wait for each other in collectives, which takes a thread each."""

    def __init__(
        self,
        config: Config,
        make_worker: spawn.MakeWorker = spawn.make_worker,
        make_scheduler: spawn.MakeScheduler = spawn.make_scheduler,
        seed: int | None = None,
    ) -> None:
        """`seed` picks an interleaving of messages; None: a fixed order.  Raises UserError for more than one rank."""
        if config.engine.tp != 1:
            raise UserError(f"--tp {config.engine.tp}: an engine in one thread has one rank. Use --tp 1, or processes.")
        self.config = config
        self.actors = LocalSystem(seed)
        self._memory = Memory(config)
        arenas = self._memory.arenas
        start = self.actors.spawn
        self.gateway = start("api", lambda ctx: Gateway(ctx, config, arenas))
        for i, name in enumerate(tokenizer_names(config.server.num_tokenizers)):
            start(name, lambda ctx, i=i: spawn.make_tokenizer(ctx, config, arenas, i))  # type: ignore[misc]
        start("detokenizer", lambda ctx: spawn.make_detokenizer(ctx, config))
        start("checker", lambda ctx: spawn.make_checker(ctx, config))
        start("scheduler", lambda ctx: make_scheduler(ctx, config, arenas, 0))
        start("worker0", lambda ctx: make_worker(ctx, config, arenas, 0, ""))
        for name in [name for name in self.actors.actors if name != "api"]:
            self.actors.post(name, "api", Hello(name, os.getpid()))

    def pump(self, seconds: float) -> bool:
        """Handle one event; nothing is ever waited for.  False: nothing can happen until a request comes."""
        return self.actors.step()

    def wait_ready(self) -> None:
        """Run until requests can be served.  Raises UserError with the reason if that cannot happen."""
        self.actors.run()
        if self.gateway.state != "ready":
            raise UserError(self.gateway.failure or "the engine could not start")

    def close(self) -> None:
        """Stop every actor and free the shared memory.  Idempotent."""
        for name in list(self.actors.actors):
            self.actors.stop(name)
        self._memory.close()
