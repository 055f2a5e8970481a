"""Runs `minisgl [serve] [MODEL] ...`: the server, from its flags to its exit code.

Everything that can be refused is refused before a process starts: flags, model files, tensor-parallel degree, port.  Then the
port answers 503 while the engine loads; then requests are served until a signal or the death of a process; then everything is
closed.  SIGHUP has keys and certificate read again (access.py).
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from minisgl import logs
from minisgl.actors import spawn
from minisgl.actors.spawn import MakeWorker
from minisgl.commands.access import Access, counted
from minisgl.commands.announcement import announce
from minisgl.commands.batch_keys import address_of
from minisgl.commands.flags import add_engine_flags, add_server_flags, config_from, given_of, hide_keys, model_of
from minisgl.commands.parser import Parser
from minisgl.config import Config
from minisgl.errors import UserError
from minisgl.events.addresses import address_of as events_address
from minisgl.version import __version__

if TYPE_CHECKING:
    from minisgl.api.batches.curve import ClientKeys
    from minisgl.api.http.auth import Keys
    from minisgl.api.http.connection_limits import Connections

EXIT_DIED = 70  # a process of the engine died; EX_SOFTWARE
EXIT_REFUSED = 2  # as __main__ has it for a UserError
_BACKLOG = 1024  # connections that wait until the server is made (see http/acceptor.py)
_TICK_SECONDS = 0.5  # after a tick that has failed
_FLUSH_SECONDS = 0.2  # for the last error events to reach their clients


def parser() -> Parser:
    """The parser of the server's flags."""
    p = Parser(
        prog="minisgl",
        description="Serve a language model over an OpenAI-compatible API: `minisgl serve MODEL`, or `minisgl` for the "
        "embedded one.  Other commands, each with --help: chat, batch, batch-keys, top, bench, doctor, fit, explain, journal, "
        "selfcheck, prebuild, simulate, cluster.",
        epilog="Flags of vLLM, SGLang and llama.cpp are understood where minisgl has the same.",
        engine=True,
    )
    p.add_argument("--version", action="version", version=f"minisgl {__version__}")
    add_engine_flags(p)
    add_server_flags(p)
    return p


def run(argv: list[str]) -> int:
    """Serve until a signal.  Returns 0 after ^C or SIGTERM, EXIT_DIED if the engine died.  Raises UserError."""
    start = time.monotonic()
    args = parser().parse_args(argv)
    hide_keys([*args.given_keys, *args.given_admin_keys])
    logs.setup(args.log_format)
    if args.log_format == "json":
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return _serve(args, start)
    except UserError as e:
        if args.log_format != "json":
            raise
        logs.say("failed", f"minisgl: {e}", logging.ERROR)
        return EXIT_REFUSED


def _serve(args: argparse.Namespace, start: float) -> int:
    """Raises UserError."""
    from minisgl.model.checkpoint.resolve import resolve
    from minisgl.model.common.shard import check_tp
    from minisgl.model.text.chat_format import styles_of

    with ExitStack() as stack:
        sock = stack.enter_context(bind(args.host, args.port))
        spec = resolve(model_of(args), args.revision)
        config = config_from(args, spec, styles_of(spec, args.chat_template or ""))
        check_tp(spec, config.engine.tp)
        check_journal(config.server.journal)
        from minisgl.api.http.fair_loop import run as run_fair

        access = Access(config, args)
        if address := config.server.batch_socket:
            access.batch_listener = stack.enter_context(bind(*address_of(address), f"--batch-socket {address}"))
        for name, given in (("--kv-events", config.server.kv_events), ("--kv-events-replay", config.server.kv_events_replay)):
            if given:  # the scheduler listens there, when the model has been looked at
                host, port = events_address(name, given)
                bind("0.0.0.0" if host == "*" else host, port, f"{name} {given}").close()
        return run_fair(_Server(config, sock, start, given=given_of(args), access=access).main())


def check_journal(path: str) -> None:
    """Raises UserError if a journal could not be kept there."""
    folder = os.path.dirname(os.path.abspath(path))
    if path and (not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK) or os.path.isdir(path)):
        raise UserError(f"--journal {path}: a file in a folder that exists and can be written to is expected")


def bind(host: str, port: int, flag: str = "") -> socket.socket:
    """A listening socket.  Raises UserError where the port is taken or the address is not of this host.

    `flag`: by which the address was given, where it is not by --host and --port.
    """
    if not 0 <= port <= 65535:
        raise UserError((f"{flag}: the port must" if flag else "--port must") + f" be between 0 and 65535, got {port}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as e:
        raise UserError(f"{flag or f'--host {host}'}: {getattr(e, 'strerror', None) or 'it is no name of a host'}") from e
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # "::" also takes IPv4
    try:
        return socket.create_server(address, family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            taken = f"{flag} is already in use" if flag else f"--port {port} is already in use on {host}"
            raise UserError(f"{taken}: stop what listens there, or choose another port") from e
        raise UserError(f"cannot listen on {flag or f'--host {host} --port {port}'}: {os.strerror(e.errno or 0)}") from e


class _Server:
    """One run of the server on one event loop."""

    def __init__(
        self,
        config: Config,
        sock: socket.socket,
        start: float,
        make_worker: MakeWorker = spawn.make_worker,
        *,
        given: Mapping[str, Any] = MappingProxyType({}),
        access: Access | None = None,
    ) -> None:
        """`start`: when the program was started.  `given`: what its user has set, see minisgl.commands.adjusted."""
        self.given = given
        self.access = access or Access(config)
        self.make_worker = make_worker
        self.config = config
        self.sock = sock
        self.start = start
        self.done = asyncio.Event()
        self.watched: set[int] = set()
        self.spawned = 0
        self.clock: asyncio.TimerHandle | None = None  # of the next `tick`
        self.announced = self.closed = False
        self.connections: Connections | None = None

    async def main(self) -> int:
        import setproctitle
        from aiohttp import web

        from minisgl.api.batches.curve import CONNECTIONS, ClientKeys, CurveServer
        from minisgl.api.batches.socket import BatchServer, local_socket
        from minisgl.api.batches.store import Store
        from minisgl.api.http.acceptor import Acceptor
        from minisgl.api.http.app import BATCHES, RUN_KWARGS, WATCHERS, build_app, keys_of
        from minisgl.api.http.connection import HEADER_SECONDS, Connection
        from minisgl.api.http.connection_limits import Connections, connections_within, raise_descriptors
        from minisgl.api.http.door import DOOR
        from minisgl.api.http.load import LoadLines
        from minisgl.api.http.metrics import Metered
        from minisgl.api.request_log import RequestLog
        from minisgl.api.system import System
        from minisgl.api.telemetry import telemetry

        setproctitle.setproctitle("minisgl::api")
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
        kept = self.config.server
        spans = telemetry(kept.otel_endpoint, (*kept.served_names, self.config.model.name)[0])
        store = Store(kept.data_dir, int(kept.data_dir_gb * (1 << 30))) if kept.data_dir else None
        keys = keys_of(self.config, store)
        clients = ClientKeys(self.access.batch_clients, keys.name) if self.access.batch_listener else None
        loop.add_signal_handler(signal.SIGHUP, self.hang_up, keys, clients)
        stored = self.config.model.weight_format
        packed = stored and stored.bits in (4, 8) and self.config.engine.device == "cuda" and self.config.engine.packed
        how = f" ({stored.method} weights, {'packed' if packed else 'dequantised as they load'})" if stored else ""
        if self.config.model.format == "fake":
            how = " engine (no model: tokens are hashes of their context)"
        text = f"minisgl {__version__}: loading {self.config.model.name}{how}"
        logs.say("start", text, version=__version__, model=self.config.model.name, pid=os.getpid())
        descriptors = raise_descriptors()
        self.access.warn(self.sock.getsockname()[0])
        self.system = System(self.config, self.make_worker)
        batches: list[BatchServer | CurveServer] = []
        try:
            engine = Metered(self.system.gateway)
            for name in self.system.supervisor.pids:
                self.system.ctx.peer(name)  # while there are descriptors
            request_log = RequestLog(kept.log_requests)
            if spans is not None:
                request_log.on_end, engine.metrics.spans = spans.ended, spans.counts
            load = LoadLines(engine, request_log, loop.call_later)
            batch = BatchServer(local_socket(self.system.ctx, self.system.run_dir), engine, request_log)
            batches.append(batch)
            if self.access.batch_listener and clients is not None:
                away = CurveServer(self.access.batch_listener, self.access.batch_secret, clients, engine, request_log)
                batches.append(away)
                descriptors -= CONNECTIONS
                text = f"batch socket: {away.address}, where {counted(len(clients), 'client key')} in force"
                logs.say("batch_socket", text, address=away.address, keys=len(clients))
            app = build_app(engine, batch.address, store, request_log, keys)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, **RUN_KWARGS)
            await runner.setup()
            server = runner.server
            if server is None:
                raise RuntimeError("the runner has been set up")
            limit, closed, door = connections_within(descriptors), engine.metrics.closed, app[DOOR]
            self.connections = connections = Connections(limit, engine.kept, closed)
            engine.metrics.connections = connections.__len__
            engine.metrics.processes.processes = self.system.gateway.processes
            app[WATCHERS].processes = self.system.gateway.processes
            app[WATCHERS].rings = self.system.rings.depths
            listener = Acceptor(
                self.sock,
                lambda: Connection(server, HEADER_SECONDS, request_log, connections, door),
                door,
                connections,
                self.access.tls,
            )
            self.pump()
            self.tick()
            self.system.gateway.sooner = lambda: loop.call_soon(self.tick)
            await self.done.wait()
            if BATCHES in app:  # they continue with the next start
                await app[BATCHES].close()
            await self.drain()
            while batches:
                batches.pop().close()
            listener.close()
            await runner.cleanup()
            load.close()
        finally:
            for fd in self.watched:
                loop.remove_reader(fd)
            while batches:
                batches.pop().close()
            self.closed = True
            self.system.close()
            if spans is not None:
                spans.close()
        return self.exit_code()

    # ---------------- serving
    def pump(self) -> None:
        """Handle messages of the child processes; called when one of their descriptors is readable."""
        if self.closed:  # what was due has come too late
            return
        if self.system.pump(0):
            asyncio.get_running_loop().call_soon(self.pump)  # the loop serves sockets in between
        self.watch()
        state = self.system.gateway.state
        if state == "ready" and not self.announced:
            self.announced = True
            host, port = self.sock.getsockname()[:2]
            pages, tls = self.system.gateway.num_pages, self.access.tls is not None
            announce(self.config, pages, (host, port), self.start, tls=tls, given=self.given)
            gc.collect()
            gc.freeze()  # what is loaded stays: looking through it again would stop all streams for a tenth of a second
        if state == "dead":
            self.done.set()

    def tick(self) -> None:
        """Have done what is due by the clock, again and again; called at once when something is due earlier."""
        if self.closed:
            return
        seconds = _TICK_SECONDS
        try:
            seconds = self.system.tick()
        finally:  # one failure must not end all deadlines
            self.watch()
            if self.clock is not None:
                self.clock.cancel()
            self.clock = asyncio.get_running_loop().call_later(seconds, self.tick)

    def watch(self) -> None:
        """Follow the set of the child processes' descriptors."""
        current, spawned = set(self.system.fds()), self.system.supervisor.spawned
        if current == self.watched and spawned == self.spawned:
            return
        from minisgl.api.http.fair_loop import FairLoop

        loop = asyncio.get_running_loop()
        # All of them again: a new process may have the number of a descriptor that was closed, and with that unwatched.
        for fd in self.watched:
            loop.remove_reader(fd)
        for fd in current:
            loop.add_reader(fd, self.pump)
        if isinstance(loop, FairLoop):
            loop.prefer(current)
        self.watched, self.spawned = current, spawned

    # ---------------- stopping
    def stop(self) -> None:
        """Handle ^C or SIGTERM: refuse new requests; running ones get --drain-seconds, unless the signal comes again."""
        gateway = self.system.gateway
        if gateway.state == "draining":
            gateway.end()
        gateway.drain()
        if self.connections is not None:
            self.connections.drain()
        self.done.set()

    def hang_up(self, keys: Keys, clients: ClientKeys | None) -> None:
        """Handle SIGHUP: read keys and certificate again, unless it means that the server's terminal has been closed."""
        if self.access.terminal_closed():
            self.stop()
        else:
            self.access.reload(keys, clients)

    async def drain(self) -> None:
        gateway = self.system.gateway
        if gateway.open_requests:
            n, seconds = gateway.open_requests, self.config.server.drain_seconds
            logs.say("stopping", f"stopping: {n} open requests get {seconds:g} s to finish", open_requests=n, seconds=seconds)
        end = time.monotonic() + self.config.server.drain_seconds
        while gateway.state == "draining" and self.busy() and time.monotonic() < end:  # noqa: ASYNC110  seldom, once
            await asyncio.sleep(0.05)
        if gateway.open_requests:
            gateway.end()
        await asyncio.sleep(_FLUSH_SECONDS if self.announced else 0)

    def busy(self) -> bool:
        """Whether a request is open, or its answer on the way to its client."""
        return self.system.gateway.open_requests > 0 or (self.connections is not None and self.connections.busy > 0)

    def exit_code(self) -> int:
        gateway = self.system.gateway
        if gateway.failure is None:
            logs.say("stopped", "minisgl has stopped")
            return 0
        if not gateway.crashed:  # an actor has refused to start, and said why
            raise UserError(gateway.failure)
        logs.say("failed", f"minisgl: {gateway.failure}; see the messages above", logging.ERROR)
        return EXIT_DIED
