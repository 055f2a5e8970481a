"""The viewer process, as the api process has it: a plain child that is there while somebody looks on.

Messages are msgpack, each behind its length, on a pair of sockets.  The child is nicer than the engine (`nice` 19), so that
where processors are short it falls behind, and not the engine.  Whoever opens a journal has a child of their own, with a bound
on its memory: whatever is in the file, it harms nobody else.  Runs in the api process; `_main` in the child.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing as mp
import os
import resource
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait as ready
from multiprocessing.process import BaseProcess
from typing import Any

import msgpack

from minisgl.actors.runtime.supervisor import quiet_spawn
from minisgl.config import ModelSpec
from minisgl.lifeline import die_with_parent

MAX_BEHIND = 32 << 20  # bytes that wait for the child
_HEAD = struct.Struct("<I")
_NICE, _JOURNAL_NICE = 19, 10  # somebody waits for the step of a journal
JOURNAL_BYTES = 4 << 30  # of memory, for a child that opens journals

OnMessage = Callable[[list[Any]], None]


class ViewerProcess:
    """The child, and the way to it.  `on_message` is called with what it says, `on_end` when it has ended by itself."""

    def __init__(self, model: ModelSpec, on_message: OnMessage, on_end: Callable[[], None], memory: int = 0) -> None:
        """Start it; on the main thread, with which it ends.  `memory`: bytes that it may take, 0: any.  Raises OSError."""
        ours, theirs = socket.socketpair()
        context = mp.get_context("spawn")
        self._process: BaseProcess = context.Process(
            target=_main, args=(theirs, model, os.getpid(), memory), name="viewer", daemon=True
        )
        with quiet_spawn():
            self._process.start()
        theirs.close()
        ours.setblocking(False)
        self._socket = ours
        self._writer: asyncio.StreamWriter | None = None
        self._unsent: list[bytes] = []
        self._behind = 0
        self._on_message, self._on_end = on_message, on_end
        self._task = asyncio.ensure_future(self._run())

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def behind(self) -> int:
        """Bytes that it has not read."""
        return self._behind + (self._writer.transport.get_write_buffer_size() if self._writer is not None else 0)

    def send(self, *message: Any) -> None:
        """Never blocks."""
        raw = msgpack.packb(message)
        data = _HEAD.pack(len(raw)) + raw
        if self._writer is None:
            self._unsent.append(data)
            self._behind += len(data)
        else:
            self._writer.write(data)

    async def _run(self) -> None:
        reader, self._writer = await asyncio.open_connection(sock=self._socket)
        self._writer.write(b"".join(self._unsent))
        self._unsent, self._behind = [], 0
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                (size,) = _HEAD.unpack(await reader.readexactly(_HEAD.size))
                self._on_message(msgpack.unpackb(await reader.readexactly(size)))
        self._on_end()

    def close(self) -> None:
        """End it.  Idempotent."""
        self._task.cancel()
        if self._writer is not None:
            self._writer.close()
        self._socket.close()
        self._process.kill()
        self._process.join()


# ---------------- in the child
def _main(connection: socket.socket, model: ModelSpec, parent: int, memory: int) -> None:
    import setproctitle

    die_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    setproctitle.setproctitle("minisgl::viewer")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from minisgl.view.viewer import Viewer

    os.nice(_JOURNAL_NICE if memory else _NICE)  # from now on: a reader waits for the imports
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    pieces = _Pieces(model)
    viewer = Viewer(pieces, loaded=pieces.loaded, model=model.name)
    data = bytearray()
    wait = 60.0
    with contextlib.suppress(OSError):
        while True:
            if ready([connection], wait):  # not select, which knows no descriptor above 1023
                more = connection.recv(1 << 20)
                if not more:
                    break
                data += more
                for message in _messages(data):
                    viewer.take(*message)
            wait = viewer.due()
            out, viewer.out = viewer.out, []
            for answer in out:
                raw = msgpack.packb(answer)
                connection.sendall(_HEAD.pack(len(raw)) + raw)
    os._exit(0)


def _messages(data: bytearray) -> Iterable[list[Any]]:
    """Take whole messages from the front of `data`."""
    at = 0
    while len(data) >= at + _HEAD.size:
        (size,) = _HEAD.unpack_from(data, at)
        if len(data) < at + _HEAD.size + size:
            break
        yield msgpack.unpackb(bytes(data[at + _HEAD.size : at + _HEAD.size + size]))
        at += _HEAD.size + size
    del data[:at]


class _Pieces:
    """The texts of tokens.  The tokenizer is loaded beside everything else, from when somebody first asks for it."""

    def __init__(self, model: ModelSpec) -> None:
        self._model = model
        self._tokenizer: Any = None
        self._loading: threading.Thread | None = None

    def loaded(self) -> bool:
        """Whether a call will not wait."""
        if self._loading is None:
            self._loading = threading.Thread(target=self._load, daemon=True)
            self._loading.start()
        return self._tokenizer is not None

    def _load(self) -> None:
        from minisgl.model.text.tokenizer import load_tokenizer

        self._tokenizer = load_tokenizer(self._model)

    def __call__(self, ids: Iterable[int]) -> list[str]:
        if not self.loaded() and self._loading is not None:
            self._loading.join()
        if self._tokenizer is None:  # it cannot be loaded: there is no text
            return []
        stream = self._tokenizer.stream(skip_special=False)
        out = [stream.push(token) for token in ids]
        if out:
            out[-1] += stream.flush()
        return out
