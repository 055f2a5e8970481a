"""Faults that could be in the code of recovery, to be planted one at a time: the crash tests must notice each."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from minisgl.actors.detokenizer import DetokenizerActor
from minisgl.actors.scheduler.actor import SchedulerActor
from minisgl.actors.scheduler.running_batch import RunningBatch
from minisgl.actors.scheduler.slot_table import SlotTable
from minisgl.actors.worker import WorkerActor
from minisgl.api.dispatcher import Dispatcher
from minisgl.api.grammar_checks import GrammarChecks
from minisgl.api.recovery import Recovery
from minisgl.api.tokenizer_pool import Tokenizers
from minisgl.cache.kept import KeptPages
from minisgl.cache.radix import RadixCache

Edit = tuple[type, str, str, str]  # class, method, what its source says, what it says instead
_ENGINE = "scheduler worker detokenizer"
# name -> (edits, how the names of the requests and of the victims begin that show it, "" for any)
FAULTS: dict[str, tuple[list[Edit], str, str]] = {
    "a replay has the name of the first try": ([(Dispatcher, "_send", "else self._new_name()", "else entry.uid")], "", ""),
    "a new detokenizer is told the old names": ([(Dispatcher, "_send", "entry.fresh and", "entry.fresh or")], "", ""),
    "log probabilities of lost tokens stay": ([(Dispatcher, "recall", "entry.logprobs.clear()", "pass")], "echo", _ENGINE),
    "delivered tokens are not in the replay": (
        [(Dispatcher, "_send", "if entry.delivered else prompt", "if 0 else prompt")],
        "",
        "",
    ),
    "the answer so far counts as prompt": (
        [(Dispatcher, "_send", "len(ids), len(prompt), e", "len(ids), len(ids), e")],
        "",
        "",
    ),
    "a replay draws another seed": ([(Dispatcher, "_send", "entry.seed,", "entry.seed + (entry.name != entry.uid),")], "", ""),
    "requests that wait for the engine are forgotten": ([(Dispatcher, "replay", "idle if not", "() if not")], "", ""),
    "questions of the checker are not asked again": (
        [(GrammarChecks, "resend", "in self._open.values()", "in ()")],
        "check",
        "ch",
    ),
    "an engine that has died is up": (
        [(Dispatcher, "engine_lost", "self.engine_up, self._ring = False", "_, self._ring = 0")],
        "",
        "",
    ),
    "the text of what was said is lost": ([(DetokenizerActor, "track", "in m.said.tolist()", "in ()")], "", ""),
    "the requests of a dead scheduler stay": ([(DetokenizerActor, "forget", "self._oldest = m.below", "return")], "", ""),
    "the requests of a dead detokenizer stay": (
        [
            (
                Dispatcher,
                "recall",
                'self._ctx.send("detokenizer", msg.F',
                'self.engine_up or self._ctx.send("detokenizer", msg.F',
            )
        ],
        *("echo alone", "detokenizer"),
    ),
    "prompts of a dead tokenizer are not read again": (
        [(Tokenizers, "resend", "self._give(job, self._new_name())", "pass")],
        *("t", "tokenizer"),
    ),
    "late answers of a dead tokenizer count": ([(Tokenizers, "resend", "self._new_name())", "old)")], "t", "tokenizer"),
    "records of a dead tokenizer are taken for others": (
        [
            (Tokenizers, "take", 'int.from_bytes(record[:8], "little")', "name"),
            (Tokenizers, "resend", "by.ring.take() is not None", "0"),
        ],
        *("t", "tokenizer"),
    ),
    "results of the dead scheduler are read": ([(SchedulerActor, "idle", ">= self._first_step", ">= 0")], "", "scheduler"),
    "steps in flight are not waited for": ([(WorkerActor, "idle", "and not self._running:", "and 0:")], "", "scheduler"),
    "extras of former owners stay in their slots": (
        [(SlotTable, "take_over", "= True", "= False")],
        *("", "scheduler"),
    ),
    "requests in the ring of a dead scheduler stay": (
        [(Recovery, "_start", 'memory.renew("requests", ', "memory.renew(")],
        *("", "scheduler"),
    ),
    "pages of plans that were not run are kept": ([(KeptPages, "runs", "& (mark <= self.published[0])", "")], "n", "scheduler"),
    "evicted pages are kept": ([(RadixCache, "evict", "self._kept.drop(found)", "pass")], "", "scheduler"),
    "pages are kept without their salt": ([(KeptPages, "add", "before = SALTED", "pass")], "salted", "scheduler"),
    "pages that are taken over are free, too": (
        [(RunningBatch, "__init__", "self.pool.claim(self.cache.restore(self.kept))", "self.cache.restore(self.kept)")],
        *("", "scheduler"),
    ),
    "a scheduler takes over from dead workers": ([(Recovery, "_start", "0 if self._workers[0] in names else ", "")], "", ""),
    "a scheduler dies alone while workers load": ([(Recovery, "_group", "not self._loaded", "0")], "", "s worker"),
    "who is acquitted does not go on": ([(Dispatcher, "go_on", "self._backlog.append(entry)", "pass")], "n", _ENGINE),
}


def planted(name: str) -> AbstractContextManager[None]:
    """Have methods with the fault in them."""
    return edited(FAULTS[name][0])


@contextmanager
def edited(edits: list[Edit]) -> Iterator[None]:
    """Have methods that say something else."""
    sound = []
    for owner, method, right, wrong in edits:
        sound.append((owner, method, vars(owner)[method]))
        source = textwrap.dedent(inspect.getsource(vars(owner)[method]))
        assert source.count(right) == 1, f"{owner.__name__}.{method} does not say {right!r} once"
        scope = dict(vars(sys.modules[owner.__module__]))
        exec(source.replace(right, wrong).replace("super()", f"super({owner.__name__}, self)"), scope)
        setattr(owner, method, scope[method])
    try:
        yield
    finally:
        for owner, method, function in sound:
            setattr(owner, method, function)
