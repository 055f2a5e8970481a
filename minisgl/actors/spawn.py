"""Builds each actor in its own process.  Importing this is cheap: the heavy imports are inside the functions."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from minisgl import logs
from minisgl.actors.loading import show_loading
from minisgl.actors.runtime.actor import Actor, Context
from minisgl.actors.runtime.process import ZmqContext
from minisgl.actors.runtime.shared_memory import Arenas
from minisgl.actors.runtime.status import Board, BoardSpec
from minisgl.config import Config, ModelSpec
from minisgl.tracing.observe import observe

MakeWorker = Callable[[Context, Config, Arenas, int, str], Actor]
MakeScheduler = Callable[[Context, Config, Arenas, int], Actor]


def find_model(model: str | ModelSpec | None, revision: str | None, tp: int) -> ModelSpec:
    """The spec of a model by its name, see `resolve`.  Raises UserError also where `tp` ranks cannot share the model."""
    from minisgl.model.checkpoint.resolve import resolve
    from minisgl.model.common.shard import check_tp

    spec = model if isinstance(model, ModelSpec) else resolve(model, revision)
    check_tp(spec, tp)
    return spec


def in_process(ctx: ZmqContext, board: BoardSpec, log_format: str, make: Callable[..., Actor], *args: Any) -> Actor:
    """`make(ctx, *args)`, in a process that shows on the `board` that it lives, and prints its log in `log_format`."""
    logs.setup(log_format)
    ctx.board = Board(board, ctx.name)
    actor = make(ctx, *args)
    actor.observer = observe(ctx, actor)
    return actor


def make_tokenizer(ctx: Context, config: Config, arenas: Arenas, index: int = 0) -> Actor:
    """Runs in tokenizer process `index`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one prompt at a time: threads would only contend with the workers
    from minisgl.actors.runtime.ring import RingWriter
    from minisgl.actors.tokenizer import TokenizerActor

    return TokenizerActor(ctx, config, RingWriter(arenas.prompts[index]))


def make_checker(ctx: Context, config: Config) -> Actor:
    """Runs in the checker process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it forks: a child has only the thread that forked it
    from minisgl.actors.checker import CheckerActor
    from minisgl.model.common.grammar import tokenizer_of
    from minisgl.model.text.vocabulary import vocabulary_of

    return CheckerActor(ctx, lambda: tokenizer_of(vocabulary_of(config.model)))


def make_detokenizer(ctx: Context, config: Config) -> Actor:
    """Runs in the detokenizer process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from minisgl.actors.detokenizer import DetokenizerActor

    return DetokenizerActor(ctx, config)


def make_scheduler(ctx: Context, config: Config, arenas: Arenas, takes_over: int = 0) -> Actor:
    """Runs in the scheduler process, which never imports torch.  `takes_over`: see SchedulerActor."""
    from minisgl.actors.scheduler.actor import SchedulerActor, Watching
    from minisgl.journal.desk import Desk

    watching: Watching = Desk(ctx, config)
    if config.server.kv_events and isinstance(ctx, ZmqContext):
        from minisgl.events.publisher import Beside, Publisher

        watching = Beside(Publisher(ctx, config.server), watching)
    return SchedulerActor(ctx, config, arenas, takes_over, watching)


def make_worker(ctx: Context, config: Config, arenas: Arenas, rank: int, run_dir: str) -> Actor:
    """Runs in worker `rank`.  Prepares the environment before the first import of torch."""
    from minisgl.actors.worker import WorkerActor
    from minisgl.model.common.host import prepare_environment, threads_per_rank

    prepare_environment(threads_per_rank(config.engine))

    return WorkerActor(ctx, rank, arenas, lambda: make_runner(config, rank, run_dir))


def make_runner(config: Config, rank: int, run_dir: str) -> Any:
    """The runner of one rank, with the readers of its model's files: it knows neither file formats nor tokenizers."""
    from minisgl.model.common.grammar import Grammars
    from minisgl.model.text.vocabulary import vocabulary_of

    grammars = Grammars(lambda: vocabulary_of(config.model))
    if config.model.format == "fake":  # without torch
        from minisgl.model.fake_runner import FakeRunner

        return FakeRunner(config, grammars=grammars)
    from minisgl.model.checkpoint.loader import open_weights
    from minisgl.model.checkpoint.progress import observed

    opened = open_weights
    if rank == 0:
        show = show_loading(config.model.name, config.model.num_layers, config.server.log_format)
        opened = observed(open_weights, show)
    if config.engine.device == "cuda":
        from minisgl.model.cuda.runner import CudaRunner

        return CudaRunner(config, rank, run_dir, opened, grammars)
    from minisgl.model.cpu.runner import Runner

    return Runner(config, rank, run_dir, opened, grammars)
