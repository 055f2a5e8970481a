"""Publishes KV events on ZMQ sockets, as a Watcher of the scheduler: see scheduler/interface.py.

    XPUB    [topic, sequence number, payload]: one message after each call of the machine that changed the tree
    ROUTER  [identity, "", number] asks for all messages from that number on; they come as [identity, "", topic, sequence
            number, payload], and [identity, "", "", -1, ""] at the end

An XPUB is a PUB that hears of subscriptions.  Whoever subscribes, or comes back, is told the whole tree once, in the stream: a
router that starts late, or whose scheduler has been started again, is right without asking.  No call waits: a subscriber that
reads too slowly loses messages, notices it by the number, and asks for them.  Runs in the scheduler process, in its thread.
"""

from __future__ import annotations

import errno
import logging
import time

import zmq

import minisgl.actors.messages as msg
from minisgl.actors.runtime.process import ZmqContext
from minisgl.actors.scheduler.actor import Watching
from minisgl.actors.scheduler.interface import Event, Output, Watcher
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.config import ServerConfig
from minisgl.errors import UserError
from minisgl.events.blocks import Blocks
from minisgl.events.feed import Feed
from minisgl.events.wire import END, FORMS, number, packed

LOOK_SECONDS = 0.05  # between two looks for subscribers and for requests
RENEW_SECONDS = 0.5  # between two messages of the whole tree in the stream, and between two that are written for replays
HIGH_WATER = 100_000  # messages that may wait for one subscriber, as vLLM has it
MAX_NEWS = 256  # subscriptions that are read at one look
MAX_REQUESTS = 8  # for a replay, answered at one look
MAX_HEARD = 4096  # bytes of what comes from outside


class Publisher:
    """The Watcher of one machine."""

    def __init__(self, ctx: ZmqContext, server: ServerConfig) -> None:
        """Binds the sockets.  Raises UserError naming the flag."""
        self._server = server
        self._topic = server.kv_events_topic.encode()
        self._stream = _bound(ctx, zmq.XPUB, "--kv-events", server.kv_events)
        self._replay: zmq.Socket[bytes] | None = None
        if server.kv_events_replay:
            self._replay = _bound(ctx, zmq.ROUTER, "--kv-events-replay", server.kv_events_replay)
        self._blocks: Blocks | None = None
        self._look = self._renew = self._whole = 0.0  # when to do so next
        self._joined = False  # somebody has subscribed, and not been told the tree
        self._later: list[bytes] | None = None  # a request for a replay of the whole tree, too soon after another one
        self._odd = 0  # requests that were none

    def begin(self, machine: StepMachine) -> None:
        """Watch this machine, which has decided nothing yet."""
        server = self._server
        self._blocks = blocks = Blocks(
            machine, FORMS[server.kv_events_format](machine.limits.page_size), server.kv_events_salted
        )
        self._feed = Feed(int(time.time() * 1e6), lambda: packed(blocks.all(), time.time()), packed([], time.time()))

    # ---------------- the Watcher
    def saw(self, inbox: list[Event], now: float, output: Output) -> None:
        if self._blocks is not None and self._blocks.changes:
            self._send(*self._feed.add(packed(self._blocks.take(), time.time())))
        if now >= self._look:
            self._hear(now)

    def rest(self, now: float) -> float:
        if now >= self._look:
            self._hear(now)
        return self._look

    def close(self) -> None:
        """The context closes the sockets."""

    # ---------------- sockets
    def _send(self, seq: int, payload: bytes) -> None:
        send, more = self._stream.send, zmq.NOBLOCK | zmq.SNDMORE  # a third of what send_multipart takes
        send(self._topic, more)
        send(number(seq), more)
        send(payload, zmq.NOBLOCK)

    def _hear(self, now: float) -> None:
        """Look who has subscribed, and who asks."""
        self._look = now + LOOK_SECONDS
        for _ in range(MAX_NEWS):
            if not self._stream.poll(0):
                break
            heard = self._stream.recv(zmq.NOBLOCK)
            self._joined |= heard[:1] == b"\x01" and self._topic.startswith(heard[1:])
        if self._joined and now >= self._renew:
            self._joined, self._renew = False, now + RENEW_SECONDS
            self._send(*self._feed.renew())
        for _ in range(MAX_REQUESTS):
            if self._later is None and (self._replay is None or not self._replay.poll(0)):
                return
            assert self._replay is not None
            frames, self._later = self._later or self._replay.recv_multipart(zmq.NOBLOCK), None
            if not self._answer(self._replay, frames, now):
                self._later = frames
                return

    def _answer(self, replay: zmq.Socket[bytes], frames: list[bytes], now: float) -> bool:
        """Answer a request for a replay; False where it has to wait, so that whole trees leave time for steps."""
        if len(frames) != 3 or frames[1] or len(frames[2]) != 8:
            self._odd += 1
            if self._odd == 1:
                logging.getLogger("minisgl").warning("--kv-events-replay: dropped what is no request for a replay")
            return True
        start, feed = int.from_bytes(frames[2], "big"), self._feed
        if not feed.has(start):
            if now < self._whole:
                return False
            self._whole = now + RENEW_SECONDS
        self._joined |= not feed.keeps(start)  # in the stream, too: some take no replay that leaves numbers out
        for seq, payload in feed.since(start):
            replay.send_multipart((frames[0], b"", self._topic, number(seq), payload), zmq.NOBLOCK)
        replay.send_multipart((frames[0], b"", b"", *END), zmq.NOBLOCK)
        return True


class Beside:
    """A `Watching` of the scheduler: the publisher, and beside it the journals of another."""

    def __init__(self, publisher: Publisher, journals: Watching) -> None:
        self._publisher, self._journals = publisher, journals
        self._journal: Watcher | None = None

    def __call__(self, machine: StepMachine, m: msg.Journal | None) -> Watcher:
        if m is None:
            self._publisher.begin(machine)
        self._journal = self._journals(machine, m)
        return self if self._journal is not None else self._publisher

    def saw(self, inbox: list[Event], now: float, output: Output) -> None:
        self._publisher.saw(inbox, now, output)
        if self._journal is not None:
            self._journal.saw(inbox, now, output)

    def rest(self, now: float) -> float:
        again = self._publisher.rest(now)
        return again if self._journal is None else min(again, self._journal.rest(now))

    def close(self) -> None:
        self._publisher.close()
        if self._journal is not None:
            self._journal.close()


def _bound(ctx: ZmqContext, kind: int, flag: str, address: str) -> zmq.Socket[bytes]:
    """A socket that listens there, never waits, and takes little from whoever connects.  Raises UserError."""
    sock = ctx.socket(kind)
    sock.linger, sock.sndhwm, sock.rcvhwm, sock.ipv6 = 0, HIGH_WATER, 1000, "[" in address
    sock.setsockopt(zmq.MAXMSGSIZE, MAX_HEARD)
    if kind == zmq.XPUB:
        sock.setsockopt(zmq.XPUB_VERBOSE, 1)  # every subscription is heard, not only the first to a topic
    try:
        sock.bind(address)
    except zmq.ZMQError as e:
        why = {zmq.EADDRINUSE: "another program listens there", errno.ENODEV: "this machine has no such address"}
        raise UserError(f"{flag} {address}: {why.get(e.errno or 0, e.strerror)}: choose another address") from e
    return sock
