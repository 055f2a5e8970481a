"""Runs an actor in a process of its own: a ZMQ PULL socket is its mailbox, PUSH sockets are its addresses."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import setproctitle
import zmq

from minisgl.actors.messages import Failed, Hello, Stopped
from minisgl.actors.runtime.actor import Actor, Context, Unhandled
from minisgl.actors.runtime.status import Board
from minisgl.actors.wire import MAX_BYTES, BadMessage, decode, encode
from minisgl.errors import UserError
from minisgl.lifeline import die_with_parent

ROOT = "api"  # the process that supervises the others
LINGER_MS = 500  # long enough for a last message, short enough for ^C
BURST = 64  # messages handled between two calls of idle()
SETTLE_MS = 5  # see run()
BEAT_SECONDS = 1.0  # between two signs of life of an actor that has nothing to do
RECONNECT_MS = 10  # a peer that died comes back under the same address
_IPC_PATH_MAX = 107  # bytes; a limit of AF_UNIX


def address(run_dir: str, name: str) -> str:
    """The ZMQ address of a mailbox.  Raises UserError where the path is too long for a Unix socket."""
    path = f"{run_dir}/{name}"
    if len(path.encode()) > _IPC_PATH_MAX:
        raise UserError(
            f"the run directory {run_dir} is too long for a Unix socket ({_IPC_PATH_MAX} bytes): "
            "set XDG_RUNTIME_DIR or TMPDIR to a shorter path"
        )
    return f"ipc://{path}"


def peers() -> set[int]:
    """The users whose processes may connect to a socket of this one: its own, and root.  See also `make_run_dir`."""
    return {0, ctypes.c_int32(os.geteuid()).value}  # as libzmq takes it


class ZmqContext(Context):
    """The Context of an actor in a process of its own.

    Receivers bind, senders connect, and no queue has a mark that could block or drop: what may be in flight is bounded by
    admission in the api process.

    Frames that are not messages, and messages that are not for this actor, are counted and dropped, with one line in the log
    for each kind: whatever comes from a socket, it does not end an actor.
    """

    def __init__(self, run_dir: str, name: str) -> None:
        self.name = name
        self._run_dir = run_dir
        self._zmq = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        # Also where nobody calls it: a context that is collected as garbage with open sockets waits for them for ever.
        self.close = weakref.finalize(self, _close, self._zmq, self._sockets)
        self.close.atexit = False
        self.inbox = self.socket(zmq.PULL)
        self.inbox.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
        self.inbox.bind(address(run_dir, name))
        self._peers: dict[str, zmq.Socket[bytes]] = {}
        self.running = True
        self.board: Board | None = None  # where to give signs of life
        self._beat_at = 0.0
        self.bad_frames = self.bad_messages = 0
        self._reported: set[str] = set()  # kinds of what was dropped

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        """A socket of this process with the settings that all of them share."""
        sock = self._zmq.socket(kind)
        sock.linger, sock.sndhwm, sock.rcvhwm, sock.reconnect_ivl = LINGER_MS, 0, 0, RECONNECT_MS
        for uid in peers():
            sock.setsockopt(zmq.IPC_FILTER_UID, uid)  # SO_PEERCRED of whoever connects
        self._sockets.append(sock)
        return sock

    def peer(self, to: str) -> zmq.Socket[bytes]:
        """The socket to another actor's mailbox, which takes descriptors when it is asked for first."""
        if (sock := self._peers.get(to)) is None:
            sock = self._peers[to] = self.socket(zmq.PUSH)
            sock.connect(address(self._run_dir, to))
        return sock

    def send(self, to: str, msg: Any) -> None:
        self.peer(to).send(encode(msg), zmq.NOBLOCK)

    def forget(self, name: str) -> None:
        """A peer has died: drop what was sent to it and has not left.  The next message goes to its successor."""
        if (sock := self._peers.pop(name, None)) is not None:
            self._sockets.remove(sock)
            sock.close(linger=0)

    def beat(self) -> None:
        """Give a sign of life, unless the last one is fresh."""
        if self.board is not None and (now := time.monotonic()) >= self._beat_at:
            self._beat_at = now + BEAT_SECONDS / 4
            self.board.beat()

    def recv(self) -> Any | None:
        """The next message of the mailbox, or None if it is empty."""
        while True:
            try:
                return decode(self.inbox.recv(zmq.NOBLOCK))
            except zmq.Again:
                return None
            except BadMessage as e:
                self.bad_frames += 1
                self._report("frame", e)

    def dispatch(self, actor: Actor, msg: Any) -> None:
        """Have the actor receive a message, unless it has no handler for it or the handler refuses it with BadMessage."""
        try:
            actor.receive(msg)
        except (Unhandled, BadMessage) as e:
            self.bad_messages += 1
            self._report(type(msg).__name__, e)

    def _report(self, kind: str, why: Exception) -> None:
        if kind not in self._reported:
            self._reported.add(kind)
            logging.getLogger("minisgl").warning("%s dropped what came from a socket (%s): %.200s", self.name, kind, why)

    def now(self) -> float:
        return time.monotonic()

    def stop(self) -> None:
        self.running = False


def _close(context: zmq.Context[zmq.Socket[bytes]], sockets: Sequence[zmq.Socket[bytes]]) -> None:
    """Send what is queued (for at most LINGER_MS) and close every socket."""
    for sock in sockets:
        sock.close()
    context.term()


def run(actor: Actor, ctx: ZmqContext, began: float = 0.0, made: float = 0.0) -> None:
    """The life of an actor: mail first, then idle(), then block.  `began`, `made`: see Hello.

    Before it blocks for good, an actor that has just parked waits SETTLE_MS and looks once more.  "Raise my flag, then look
    at the ring" against "publish, then look at the flag" is a race that only a full memory fence closes; a store buffer
    drains in far less than that time, so the second look sees all that the first one missed, and every later writer sees the
    flag.  An idle actor wakes once in BEAT_SECONDS, to show that it is alive.
    """
    actor.started()
    gc.freeze()  # what was loaded stays: no collection looks through it in the middle of a step
    ctx.send(ROOT, Hello(ctx.name, os.getpid(), began, made, time.monotonic()))
    busy, settled = True, False
    while ctx.running:
        ctx.beat()
        limit = 0 if busy else BEAT_SECONDS * 1000 if settled else SETTLE_MS
        limit = min(limit, max(0.0, actor.wake_at - ctx.now()) * 1000)
        got_mail = bool(ctx.inbox.poll(int(limit)))  # within a millisecond it looks all the time
        if got_mail:
            for _ in range(BURST):
                if not ctx.running or (msg := ctx.recv()) is None:
                    break
                ctx.dispatch(actor, msg)
        settled = not busy and not got_mail
        busy = ctx.running and actor.idle()
        settled = settled and not busy


def main(run_dir: str, name: str, make: Callable[..., Actor], args: tuple[Any, ...], parent: int) -> None:
    """The main function of a child process.  `make(ctx, *args)` builds the actor; heavy imports belong inside it."""
    began = time.monotonic()
    die_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # may reach the process group; only the root acts on them
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    setproctitle.setproctitle(f"minisgl::{name}")
    ctx = ZmqContext(run_dir, name)
    code = 0
    try:
        actor = make(ctx, *args)
        try:
            run(actor, ctx, began, time.monotonic())
        finally:
            actor.stopping()
        ctx.send(ROOT, Stopped(name))
    except UserError as e:
        ctx.send(ROOT, Failed(name, str(e)))
        code = 1
    except Exception:
        logging.getLogger("minisgl").exception("%s failed", name)
        code = 70
    finally:
        ctx.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing is left to do: freeing a model, object by object, would take seconds, and exit handlers of GPU libraries could
    # wait for ranks that will never answer.
    os._exit(code)
