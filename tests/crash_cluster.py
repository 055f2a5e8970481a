"""All actors in one thread, as processes that die: mail is lost as ZMQ loses it, shared memory stays, others come later.

Beside LocalSystem, whose rules it keeps: every message is encoded, delivery is FIFO per connection, everything else is as
adversarial as the seed makes it, and time is virtual.  Added here:

death       after any event of an actor, or in the middle of one: before a message is sent, or after a record has been published
its mail    of what it has sent, the end may be lost; what others sent to it is lost from the beginning, the rest waits for the
            next one under its name; what was read by a process is never read again
late mail   what a dead process has sent arrives at any time, beside the messages of the next one
notice      Recovery learns of a death some events later, perhaps of several at once
birth       another process comes up some events later, with the shared memory that was current when it was started
torn words  a scheduler may be killed in each write of the memory that keeps its cache, with any part of it done
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from minisgl import logs
from minisgl.actors import worker
from minisgl.actors.messages import ActorDied, EngineReady, Hello
from minisgl.actors.runtime import shared_memory
from minisgl.actors.runtime.actor import Actor, Context
from minisgl.actors.runtime.ring import RingSpec, RingWriter, create_ring
from minisgl.actors.runtime.shared_memory import Arenas, Memory, actor_names
from minisgl.actors.wire import decode, encode
from minisgl.api.gateway import Gateway
from minisgl.api.recovery import Recovery
from minisgl.cache.kept import KeptPages
from minisgl.cache.radix import Node, RadixCache
from minisgl.config import Config

KILLED, CRASHED = -9, -11
MakeActor = Callable[[Context, Config, Arenas, int], Actor]  # the last: what a scheduler takes over


def _narrow(name: str, readers: int, size: int) -> tuple[RingSpec, int]:
    """Rings that are always full, but for that of the results, which is as large as it must be."""
    return create_ring(name, readers, size if name == "results" else 4096)


class Killed(BaseException):
    """The running actor is no more."""


class Crashed(Killed):
    """It has ended itself."""


class Torn(np.ndarray):
    """A column of KeptPages.  `write(store, n)`: store the n parts of one assignment: words of 8 bytes, or else bytes."""

    write: Callable[[Callable[[int], None], int], None] | None = None

    def __setitem__(self, index: Any, value: Any) -> None:
        if self.write is None:
            return super().__setitem__(index, value)
        places = np.arange(self.size).reshape(self.shape)[index].reshape(-1)
        values = np.broadcast_to(value, np.asarray(self)[index].shape).reshape(-1).astype(self.dtype)
        flat, width = np.asarray(self).reshape(-1), self.itemsize
        if width < 8:
            flat, values = flat.view(np.uint8), values.view(np.uint8)
            places = (places[:, None] * width + np.arange(width)).reshape(-1)
        self.write(lambda i: flat.__setitem__(places[i], values[i]), len(places))


def torn(kept: KeptPages, write: Callable[[Callable[[int], None], int], None]) -> None:
    """Have `write` do what is assigned to the columns."""
    for name in ("published", "mark", "before", "salt", "ids"):
        setattr(kept, name, getattr(kept, name).view(Torn))
        getattr(kept, name).write = write


def prefix(node: Node) -> bytes:
    """The tokens of all pages from the root to the end of a node."""
    return b"" if node.parent is None else prefix(node.parent) + node.key


@dataclass(eq=False)
class Process(Context):
    """One life of an actor, and its Context."""

    cluster: Cluster
    name: str
    pid: int
    lanes: dict[str, Lane] = field(default_factory=dict)  # its open connections, by receiver

    def send(self, to: str, msg: Any) -> None:
        raw = encode(replace(msg, pid=self.pid) if isinstance(msg, EngineReady) else msg)
        self.cluster.point(self)
        self.cluster.post(self, to, raw)

    def now(self) -> float:
        return self.cluster.clock

    def forget(self, name: str) -> None:
        self.cluster.hang_up(self, name)

    def stop(self) -> None:
        raise AssertionError(f"{self.name} has stopped by itself")


@dataclass(eq=False)
class Lane:
    """A connection: messages that have been sent and not been read."""

    src: Process
    dst: str
    mail: deque[bytes] = field(default_factory=deque)
    lose: int = 0  # of the next messages, while nobody is there


class Cluster:
    """The engine under its real Recovery, whose Processes it is.

    `doom`: in which of its lives, and at which point of it, an actor is killed.  `narrow`: rings have little room.
    """

    def __init__(
        self,
        config: Config,
        seed: int,
        make: dict[str, MakeActor],
        doom: dict[str, tuple[int, int]] | None = None,
        narrow: bool = False,
    ) -> None:
        self.config, self._make = config, make
        self.rng = rng = random.Random(seed)
        self.doom = dict(doom or {})
        self.points: Counter[str] = Counter()  # how often each actor could have been killed in its present life
        self.lives: Counter[str] = Counter()
        self.deaths: Counter[str] = Counter()
        self.clock, self.events = 0.0, 0
        self.held: dict[int, tuple[str, bytes]] = {}  # of each page: the salt and the prefix under which it was last cached
        self.kept = 0  # pages that schedulers have taken over
        self.actors: dict[str, Actor] = {}
        self._alive: dict[str, Process] = {}
        self._awake: set[str] = set()
        self._lanes: list[Lane] = []
        self._births: dict[str, tuple[int, Callable[[], None]]] = {}  # by name: when, and what happens then
        self._dead: list[ActorDied] = []  # without notice
        self._notice_at = 0
        self._pids = 100
        self._current: Process | None = None
        self._speed = {n: rng.choice((1.0, 1.0, 0.3, 0.05)) for n in ("api", *actor_names(8, 8))}
        self._rings = mock.patch.object(shared_memory, "create_ring", _narrow if narrow else create_ring)
        with self._rings:
            self.memory = Memory(config)
        api = self._alive["api"] = Process(self, "api", 1)
        self.gateway = Gateway(api, config, self.memory.arenas)
        self.actors["api"] = self.gateway
        self.recovery = Recovery(config, self.gateway, api, self.memory, self)
        for name in actor_names(config.engine.tp, config.server.num_tokenizers):
            self.gateway.pids[name] = self.start(name)

    # ---------------- Processes
    def start(self, name: str, takes_over: int = 0) -> int:
        self._pids += 1
        pid, arenas = self._pids, self.memory.arenas
        self._births[name] = self.events + self.rng.randrange(60), lambda: self._bear(name, pid, arenas, takes_over)
        return pid

    def end(self, names: Iterable[str]) -> None:
        for name in names:
            self._bury(name)
        self._dead = [d for d in self._dead if d.name not in names]

    # ---------------- life and death
    def _bear(self, name: str, pid: int, arenas: Arenas, takes_over: int) -> None:
        del self._births[name]
        process = self._alive[name] = Process(self, name, pid)
        self.points[name], self.lives[name] = 0, self.lives[name] + 1
        for lane in self._lanes:
            if lane.dst == name:
                lane.lose = 0

        def begin() -> None:
            actor = self._make[name.rstrip("0123456789")](process, self.config, arenas, takes_over)
            self.actors[name] = actor
            actor.started()
            process.send("api", Hello(name, pid))
            self._awake.add(name)

        self._run(process, begin)

    def kill(self, name: str, exitcode: int = 0) -> None:
        """End it, from outside or as if by itself, where `exitcode` does not say."""
        exitcode = exitcode or self.rng.choice((KILLED, CRASHED))
        self._bury(name)
        self.deaths[name] += 1
        if not self._dead:
            self._notice_at = self.events + self.rng.choice((0, self.rng.randrange(40)))
        self._dead.append(ActorDied(name, exitcode))

    def _bury(self, name: str) -> None:
        self._births.pop(name, None)
        if (process := self._alive.pop(name, None)) is None:
            return
        self.actors.pop(name, None)
        self._awake.discard(name)
        for lane in self._lanes:
            if lane.src is process:
                self._cut(lane)
            elif lane.dst == name and self._alive.get(lane.src.name) is not lane.src:
                lane.mail.clear()
            elif lane.dst == name:
                lane.lose = self.rng.randrange(len(lane.mail) + 3)
                while lane.lose and lane.mail:
                    lane.mail.popleft()
                    lane.lose -= 1

    def _cut(self, lane: Lane) -> None:
        """Its sender is gone, or has closed it: what has not left is lost."""
        keep = self.rng.randrange(len(lane.mail) + 1) if lane.dst in self._alive else 0
        while len(lane.mail) > keep:
            lane.mail.pop()

    def hang_up(self, process: Process, dst: str) -> None:
        if (lane := process.lanes.pop(dst, None)) is not None:
            self._cut(lane)

    def point(self, process: Process | None) -> None:
        """Here a process can be killed."""
        if process is None or process.name == "api":
            return
        if self._alive.get(process.name) is not process:
            raise Killed
        self.points[process.name] += 1
        if self.doom.get(process.name) == (self.lives[process.name], self.points[process.name]):
            raise Killed

    # ---------------- events
    def post(self, process: Process, dst: str, raw: bytes) -> None:
        if (lane := process.lanes.get(dst)) is None:
            lane = process.lanes[dst] = Lane(process, dst)
            self._lanes.append(lane)
        if dst not in self._alive and lane.lose:
            lane.lose -= 1
        else:
            lane.mail.append(raw)

    def _run(self, process: Process, what: Callable[[], Any]) -> Any:
        self._current = process
        try:
            result = what()
            self.point(process)
            return result
        except Killed as e:
            if self._alive.get(process.name) is process:
                self.kill(process.name, CRASHED if isinstance(e, Crashed) else 0)
            return True
        finally:
            self._current = None

    def step(self) -> bool:
        """One event; False: nothing can happen."""
        self.events += 1
        self.clock += self.rng.random() * 0.002
        for at, bear in list(self._births.values()):
            if at <= self.events:
                bear()
        if self._dead and self._notice_at <= self.events:
            return self._notice()
        for name, actor in self.actors.items():
            if actor.wake_at <= self.clock:
                self._awake.add(name)
        return self._one_event() or self._skip()

    def _notice(self) -> bool:
        dead, self._dead = self._dead, []
        self.recovery.died(dead)
        return True

    def _one_event(self) -> bool:
        self._lanes = [x for x in self._lanes if x.mail or self._alive.get(x.src.name) is x.src]
        choices: list[Any] = [x for x in self._lanes if x.mail and x.dst in self.actors]
        choices += sorted(self._awake)
        self.rng.shuffle(choices)
        slow = []
        for choice in choices:
            name = choice if isinstance(choice, str) else choice.dst
            if self.rng.random() > self._speed[name]:
                slow.append(choice)
            elif self._do(choice):
                return True
        return any(map(self._do, slow))

    def _do(self, choice: Lane | str) -> bool:
        if isinstance(choice, Lane):
            if not choice.mail or choice.dst not in self.actors:
                return False
            self._awake.add(choice.dst)
            message, actor = decode(choice.mail.popleft()), self.actors[choice.dst]
            self._run(self._alive[choice.dst], lambda: actor.receive(message))
            return True
        if choice not in self.actors:
            return False
        if self._run(self._alive[choice], self.actors[choice].idle):
            return True
        self._awake.discard(choice)
        return False

    def _skip(self) -> bool:
        """Nothing happens before the next birth, notice or alarm."""
        if any(x.mail and x.dst in self.actors for x in self._lanes):
            return True
        if self._births:
            self.events = max(self.events, min(at for at, _ in self._births.values()))
        elif self._dead:
            self._notice_at = self.events
        else:
            due = min((actor.wake_at for actor in self.actors.values()), default=math.inf)
            if due == math.inf:
                return False
            self.clock = max(self.clock, due)
        return True

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Have the rings of this process report what is published, and nobody sleep or print."""
        publish = RingWriter.publish

        def reported(ring: RingWriter, payload: bytes) -> int:
            at = publish(ring, payload)
            self.point(self._current)
            return at

        make, add = KeptPages.__init__, RadixCache._add

        def write(store: Callable[[int], None], n: int) -> None:
            order = random.Random(self.events).sample(range(n), n)
            try:
                self.point(self._current)
            except Killed:
                order = order[: self.events % (n + 1)]
                raise
            finally:
                for i in order:
                    store(i)

        def make_torn(kept: KeptPages, *args: Any) -> None:
            make(kept, *args)
            torn(kept, write)

        def added(cache: RadixCache, parent: Node, key: bytes, pages: Any) -> Node:
            size = len(key) // len(pages)
            for i, page in enumerate(pages.tolist(), 1):
                here = parent.salt, prefix(parent) + key[: i * size]
                if cache._kept is None:
                    assert self.held.get(page) == here, "a scheduler has taken over what no page holds"
                    self.kept += 1
                self.held[page] = here
            return add(cache, parent, key, pages)

        patches = (
            mock.patch.object(KeptPages, "__init__", make_torn),
            mock.patch.object(RadixCache, "_add", added),
            mock.patch.object(RingWriter, "publish", reported),
            mock.patch.object(logs, "say", mock.Mock()),
            mock.patch.object(worker, "time", SimpleNamespace(sleep=lambda seconds: None)),
        )
        with self._rings, ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield

    def close(self) -> None:
        self.memory.close()
