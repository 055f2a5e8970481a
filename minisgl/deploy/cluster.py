"""Runs `minisgl cluster N`: N replicas of the ordinary server and a router before them, on one host, until a signal.

The first step beyond one server, and no cluster manager: what dies is reported and started again, as often as a server restarts
its own processes, and everything ends together.  scripts/cluster.sh installs the router before.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from minisgl.commands.flags import ADMIN_KEY_VARIABLE, keys_from
from minisgl.commands.parser import Parser
from minisgl.commands.serve import bind
from minisgl.config import EngineConfig, ServerConfig
from minisgl.deploy import plan_cluster
from minisgl.deploy.plan_cluster import Launch, Ports
from minisgl.deploy.program import Program, get, is_free, server_command
from minisgl.errors import UserError

EXIT_DIED = 70  # as the server's own, when nothing is left to serve
_LOOK_SECONDS = 0.2
_SAY_SECONDS = 5.0  # between two lines of progress where no terminal shows them
_ROUTER_SECONDS = 5.0  # for the router to end; its streams have ended with the replicas
_EVENTS = 1000  # KV events and replay of replica i: its port + 1000 and + 2000; metrics of the router: its port + 1000
_ROOT = Path(__file__).parents[2]
_POLICIES = ("random", "round_robin", "cache_aware", "kv_aware", "power_of_two", "consistent_hash", "sticky_least_loaded")


def parser() -> Parser:
    """The parser of `minisgl cluster`; what stands behind -- is for `minisgl serve`."""
    p = Parser(
        prog="minisgl cluster",
        description="Start N replicas of `minisgl serve` and vllm-router before them, on this host; ^C ends all of it.",
        epilog="Behind -- stand flags of `minisgl serve` for every replica: minisgl cluster 3 -- --model M.  In them, "
        f"{plan_cluster.REPLICA} becomes the replica's number.  The replicas listen at the ports behind the router's.",
    )
    p.add_argument("replicas", type=int, metavar="N", help="how many replicas")
    p.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address of the router (%(default)s)")
    p.add_argument("--port", type=int, default=8000, metavar="PORT", help="port of the router (%(default)d)")
    p.add_argument(
        "--policy",
        choices=("auto", *_POLICIES),
        default="auto",
        metavar="KIND",
        help="of the router: auto is kv_aware where the server has --kv-events and no API keys, else cache_aware",
    )
    p.add_argument("--router", default="", metavar="PROGRAM", help="the router's program; default: vllm-router")
    p.add_argument("--router-flags", default="", metavar="TEXT", help="more flags for the router, in one word")
    p.add_argument("--log-dir", default="", metavar="DIR", help="keep what replicas and router print here; default: nowhere")
    return p


def run(argv: list[str]) -> int:
    """Serve until a signal.  Exit code: 0 after ^C or SIGTERM, 1 if something did not start, EXIT_DIED.  Raises UserError."""
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser().parse_args(own)
    if not 1 <= args.replicas <= 64:
        raise UserError(f"N must be between 1 and 64 on one host, got {args.replicas}")
    if not 1 <= args.port <= 65535 - args.replicas - 2 * _EVENTS:
        raise UserError(
            f"--port {args.port}: between 1 and {65535 - args.replicas - 2 * _EVENTS}, as replicas take ports above"
        )
    served = plan_cluster.checked(flags, args.replicas)
    keys, admins = map(bool, keys_from(served))
    # A request through the router comes from this host; without a key that nobody knows it would be its administrator's.
    secret = {} if keys or admins else {ADMIN_KEY_VARIABLE: secrets.token_hex(32)}
    router_flags = plan_cluster.split("--router-flags", args.router_flags)
    policy = plan_cluster.best_policy(keys=keys, cache=served.cache) if args.policy == "auto" else args.policy
    if policy == plan_cluster.EXACT and keys:
        raise UserError("--policy kv_aware: what is cached for the owner of an API key is not published; choose cache_aware")
    if policy == plan_cluster.EXACT and not plan_cluster.publishes_kv_events():
        raise UserError("--policy kv_aware: this version's server has no --kv-events; choose cache_aware")
    exact = policy == plan_cluster.EXACT
    ports = [Ports(args.port + i, args.port + i + _EVENTS, args.port + i + 2 * _EVENTS) for i in range(1, args.replicas + 1)]
    plan = plan_cluster.launches(flags, ports, cores=len(os.sched_getaffinity(0)), gpus=_gpus(), exact=exact)
    program = router_program(args.router)
    bind(args.host, args.port).close()
    for port in (args.port + _EVENTS, *(p for own in ports for p in (vars(own).values() if exact else [own.http]))):
        if not is_free(port):
            raise UserError(f"port {port} of 127.0.0.1 is taken: stop what listens there, or choose another --port")
    return _Cluster(args, plan, served, policy=policy, program=program, router_flags=router_flags, secret=secret).run()


def _gpus() -> list[str]:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        listed = ""
    return plan_cluster.visible_gpus(listed)


def router_program(given: str) -> list[str]:
    """The command of the router, `given` or found.  Raises UserError where there is none."""
    beside = _ROOT / ".venv-router/bin/vllm-router"  # where scripts/cluster.sh installs it
    found = given or (str(beside) if beside.exists() else "vllm-router")
    if program := shutil.which(found):
        return [program]
    if given:
        raise UserError(f"--router {given}: there is no such program")
    raise UserError("the router is not installed: scripts/cluster.sh does that, and so does `pip install vllm-router`")


class _Cluster:
    """The programs of one run, and what is said about them."""

    def __init__(
        self,
        args: argparse.Namespace,
        plan: Sequence[Launch],
        served: argparse.Namespace,
        *,
        policy: str,
        program: Sequence[str],
        router_flags: Sequence[str],
        secret: Mapping[str, str],
    ) -> None:
        """`served`: the flags of a replica.  `secret`: for the environment of the replicas alone.  Raises UserError."""
        self.args, self.plan, self.policy, self.program, self.router_flags = args, plan, policy, program, router_flags
        self.page_size = getattr(served, "page_size", None) or EngineConfig().page_size
        self.drain_seconds = float(served.drain_seconds)
        self.log_dir = Path(args.log_dir) if args.log_dir else None
        if self.log_dir:
            try:
                self.log_dir.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise UserError(f"--log-dir {self.log_dir}: {e.strerror}") from e
        self.replicas = []
        for i, r in enumerate(plan, 1):
            command, log = server_command(*r.flags), self._log(f"replica{i}")
            self.replicas.append(
                Program(f"replica {i}", command, r.ports.http, environment={**r.environment, **secret}, log=log)
            )
        self.router: Program | None = None
        self.deaths: dict[str, deque[float]] = {}
        self.given_up: set[str] = set()
        self.signals = 0

    def _log(self, name: str) -> Path | None:
        """The file that a program's output is appended to.  Raises UserError where it cannot be written."""
        if self.log_dir is None:
            return None
        try:
            (path := self.log_dir / f"{name}.log").open("ab").close()
        except OSError as e:
            raise UserError(f"--log-dir {self.log_dir}: {path.name} cannot be written ({e.strerror})") from e
        return path

    def run(self) -> int:
        handlers = {n: signal.signal(n, self._signalled) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            begin = time.monotonic()
            say(f"starting {self._count()} from port {self.replicas[0].port}")
            for replica in self.replicas:
                replica.start()
            if not self._await(self.replicas, begin):
                return 0 if self.signals else 1
            self.router = self._make_router()
            self.router.start()
            if not self._await([self.router], begin):
                return 0 if self.signals else 1
            url = f"http://{f'[{self.args.host}]' if ':' in self.args.host else self.args.host}:{self.args.port}"
            seconds = time.monotonic() - begin
            say(f"ready in {seconds:.1f} s: {url}/v1   ({self._count()}, policy {self.policy})")
            say("^C stops everything")
            return self._watch()
        finally:
            self._end()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _count(self) -> str:
        return "1 replica" if len(self.replicas) == 1 else f"{len(self.replicas)} replicas"

    def _signalled(self, *_: object) -> None:
        self.signals += 1  # and no more: a lock that the interrupted code holds would never be free

    def _stopped(self) -> bool:
        """Wait a little.  Whether a signal has come."""
        if not self.signals:
            time.sleep(_LOOK_SECONDS)
        return self.signals > 0

    def _make_router(self) -> Program:
        command = plan_cluster.router_command(
            self.program,
            self.args.host,
            self.args.port,
            self.plan,
            policy=self.policy,
            page_size=self.page_size,
            model=served_model(self.plan[0].ports.http),
            metrics_port=self.args.port + _EVENTS,
            extra=self.router_flags,
        )
        here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.args.host, self.args.host)
        return Program("router", command, self.args.port, "/readiness", host=here, log=self._log("router"))

    def _await(self, programs: Sequence[Program], begin: float) -> bool:
        """Wait until all are ready, with progress; False where one has ended before, or after a signal."""
        said, waiting = begin, list(programs)
        while waiting:
            waiting = [program for program in waiting if not program.is_ready()]
            for program in waiting:
                if how := program.ended():
                    say(f"{program.name} {how} before it was ready; everything is stopped", program)
                    return False
            text = f"{len(programs) - len(waiting)} of {len(programs)} ready, {time.monotonic() - begin:.0f} s"
            if sys.stderr.isatty():
                print(f"\r\033[Kminisgl: {text}" if waiting else "\r\033[K", end="", file=sys.stderr, flush=True)
            elif time.monotonic() - said > _SAY_SECONDS and waiting:
                said = time.monotonic()
                say(f"{text}: waiting for {', '.join(p.name for p in waiting)}")
            if waiting and self._stopped():
                return False
        return True

    def _watch(self) -> int:
        """Report what dies and start it again, until a signal, or until nothing is left that could serve."""
        assert self.router is not None
        while not self._stopped():
            for program in (*self.replicas, self.router):
                if program.name not in self.given_up and (how := program.ended()):
                    self._died(program, how)
            if self.router.name in self.given_up or self.given_up >= {r.name for r in self.replicas}:
                say("nothing is left to serve with: stopping")
                return EXIT_DIED
        return 0

    def _died(self, program: Program, how: str) -> None:
        now, most, window = time.monotonic(), ServerConfig().max_restarts, ServerConfig().restart_window
        times = self.deaths.setdefault(program.name, deque(maxlen=most))
        if len(times) == most and now - times[0] < window:
            self.given_up.add(program.name)
            say(f"{program.name} {how}, for the {most + 1}th time within {window:g} s: it stays down", program)
            return
        times.append(now)
        say(f"{program.name} (port {program.port}) {how}: starting it again", program)
        program.start()

    def _end(self) -> None:
        """Drain the replicas, then end the router; a second signal ends all at once."""
        programs = [*self.replicas, *([self.router] if self.router else [])]
        if self.signals:
            say("stopping; ^C again does not wait")
        seen = self.signals
        for replica in self.replicas:
            replica.signal(signal.SIGTERM)
        end = time.monotonic() + self.drain_seconds + _ROUTER_SECONDS
        while any(not r.wait(0) for r in self.replicas) and time.monotonic() < end and self.signals == seen:
            time.sleep(0.05)
        if self.router is not None and self.signals == seen:
            self.router.signal(signal.SIGTERM)
            end = time.monotonic() + _ROUTER_SECONDS
            while not self.router.wait(0) and time.monotonic() < end and self.signals == seen:
                time.sleep(0.05)
        for program in programs:
            program.kill()


def served_model(port: int) -> str:
    """The name of the model at a replica, which is the router's name of it; "" where it does not say."""
    status, body = get(port, "/v1/models")
    if status != 200:
        return ""
    answer: dict[str, Any] = json.loads(body)
    return str(answer["data"][0]["id"])


def say(text: str, program: Program | None = None) -> None:
    """One line on stderr; with `program`, its last lines below."""
    lines = [f"minisgl: {text}", *(f"    {line}" for line in (list(program.lines) if program is not None else []))]
    with suppress(OSError):  # of a terminal that is no more: what runs has to be stopped all the same
        print("\n".join(lines), file=sys.stderr, flush=True)
