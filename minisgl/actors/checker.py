"""Tries grammars out before they are served: each in a child process of its own, whose time and memory are limited.

Owns      the vocabulary as grammars need it, read for the first of them; what was found about the latest grammars.
Receives  CheckGrammar (api).
Sends     GrammarChecked, Rejected (api).

A text of 20 characters can describe a grammar that takes minutes and gigabytes to compile, and the library that compiles it
cannot be interrupted.  So a child compiles it, under the limits that the workers have, and computes the first masks.  If the
child comes back with less than `MAX_SECONDS` and `MAX_BYTES` spent, the grammar fits; what ends the child ends nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import signal
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

import numpy as np

from minisgl import grammar as grammars
from minisgl.actors.messages import CheckGrammar, GrammarChecked, Rejected
from minisgl.actors.runtime.actor import Actor, Context, on
from minisgl.errors import RequestError
from minisgl.lifeline import die_with_parent

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_SECONDS = 0.5  # of one core, to compile a grammar and compute its first masks
MAX_BYTES = 8 << 20  # that stay, of a grammar in the workers
MASKS = 4  # that are tried: what a lexer spends on its states shows in the first ones
_SPIKE_BYTES = 256 << 20  # of address space, also for what does not stay
_READING_SECONDS = 3  # of one core, with the conversion of the longest GBNF
_WALL_SECONDS = 30.0  # on a machine whose cores are all busy
_CHILDREN = 2  # at a time
_KNOWN, _KNOWN_CHARS = 512, 1 << 14  # verdicts that are kept, and the longest converted text among them
_LIMIT = f"{MAX_SECONDS:g} s of computation or {MAX_BYTES >> 20} MiB of memory"


@dataclass(slots=True)
class _Child:
    """A running trial, whose answer comes through the pipe."""

    pid: int
    request: CheckGrammar
    began: float
    answer: list[bytes] = field(default_factory=list)


class CheckerActor(Actor):
    """Answers every CheckGrammar with GrammarChecked or Rejected, in any order."""

    def __init__(self, ctx: Context, make_tokenizer: Callable[[], LLTokenizer]) -> None:
        super().__init__(ctx)
        self._make_tokenizer = make_tokenizer
        self._tokenizer: LLTokenizer | None = None
        self._waiting: deque[CheckGrammar] = deque()
        self._running: dict[int, _Child] = {}  # by the descriptor of its pipe
        self._known: OrderedDict[bytes, bytes] = OrderedDict()  # digest of field and grammar -> the child's answer
        self.trials = 0

    @on(CheckGrammar)
    def check_grammar(self, m: CheckGrammar) -> None:
        if (answer := self._known.get(_digest(m))) is not None:
            self._known.move_to_end(_digest(m))
            self._tell(m, answer)
        else:
            self._waiting.append(m)

    def idle(self) -> bool:
        """Start trials, and wait a little for the running ones."""
        while self._waiting and len(self._running) < _CHILDREN:
            request = self._waiting.popleft()
            if (answer := self._known.get(_digest(request))) is not None:  # found out meanwhile
                self._tell(request, answer)
            else:
                self._start(request)
        if not self._running:
            return False
        for fd in wait(list(self._running), 0.005):
            assert isinstance(fd, int)
            if piece := os.read(fd, 1 << 16):
                self._running[fd].answer.append(piece)
            else:
                self._end(fd)
        for child in self._running.values():
            if time.monotonic() - child.began > _WALL_SECONDS:
                os.kill(child.pid, signal.SIGKILL)  # its pipe ends
        return True

    def stopping(self) -> None:
        for child in self._running.values():
            os.kill(child.pid, signal.SIGKILL)

    def _start(self, request: CheckGrammar) -> None:
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer()
        read, write = os.pipe()
        self.trials += 1
        parent = os.getpid()
        if pid := os.fork():
            os.close(write)
            self._running[read] = _Child(pid, request, time.monotonic())
            return
        try:  # the child: no sockets, no destructors, no exit handlers
            die_with_parent(parent)
            _be_quiet()
            _write(write, _try_out(self._tokenizer, request))
        finally:
            os._exit(0)

    def _end(self, fd: int) -> None:
        child = self._running.pop(fd)
        os.close(fd)
        os.waitpid(child.pid, 0)
        answer = b"".join(child.answer)
        if not answer.endswith(b"\n"):  # it was ended by a limit
            answer = _refusal(grammars.too_large(child.request.field, _LIMIT))
        if len(answer) <= _KNOWN_CHARS:
            self._known[_digest(child.request)] = answer
            if len(self._known) > _KNOWN:
                self._known.popitem(last=False)
        self._tell(child.request, answer)

    def _tell(self, m: CheckGrammar, answer: bytes) -> None:
        found = json.loads(answer)
        if "text" in found:
            self.ctx.send("api", Rejected(m.uid, 400, found["text"], found["param"], found["code"], None))
        else:
            self.ctx.send("api", GrammarChecked(m.uid, found["converted"] or m.grammar))


def _digest(m: CheckGrammar) -> bytes:
    return hashlib.sha256(f"{m.field}\n{m.grammar}".encode()).digest()


# ---------------- in the child
def _be_quiet() -> None:
    """A child that is ended by a limit writes no trace and no core."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for number in (signal.SIGPROF, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _try_out(tokenizer: LLTokenizer, m: CheckGrammar) -> bytes:
    """What is found about a grammar, as a line of JSON: its text, if it had to be converted, or why it is refused."""
    for kind, limit in ((resource.RLIMIT_AS, _memory()[0] + _SPIKE_BYTES), (resource.RLIMIT_CPU, _READING_SECONDS)):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    with contextlib.suppress(MemoryError):
        try:
            text = grammars.resolved(m.grammar)
            grammars.check_size(m.field, len(text))
            try_masks(tokenizer, text, m.field)
            return json.dumps({"converted": text if text != m.grammar else ""}).encode() + b"\n"
        except RequestError as e:
            return _refusal(e, m.field)
    return b""


def try_masks(tokenizer: LLTokenizer, text: str, field: str) -> None:
    """Compile a grammar and compute its first masks.  Raises InvalidParam naming `field`."""
    from llguidance import LLMatcher

    _, before = _memory()
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=grammars.limits())
    if matcher.is_error():
        raise grammars.unusable(field, matcher.get_error())
    for _ in range(MASKS):
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))
        if matcher.is_stopped() or not matcher.consume_token(int(allowed[-1])):
            break
    # Whether the items of the parser become too many depends on the answer; what its lexer cannot do, it never can.
    if matcher.is_error() and " items" not in matcher.get_error():
        raise grammars.too_large(field, "the limits on its states and expressions allow")
    signal.setitimer(signal.ITIMER_PROF, 0)
    if _memory()[1] - before > MAX_BYTES:
        raise grammars.too_large(field, _LIMIT)


def _memory() -> tuple[int, int]:
    """Bytes of this process: of its address space, and of memory that is no file's."""
    with open("/proc/self/statm", "rb") as f:
        mapped, resident, shared, *_ = map(int, f.read().split())
    return mapped * resource.getpagesize(), (resident - shared) * resource.getpagesize()


def _refusal(e: RequestError, field: str = "") -> bytes:
    return json.dumps({"text": e.message, "param": field or e.param, "code": e.code}).encode() + b"\n"


def _write(fd: int, answer: bytes) -> None:
    while answer:
        answer = answer[os.write(fd, answer) :]
