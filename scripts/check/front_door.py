"""Kill replicas and the router of a cluster under load: what is lost, and how clients learn of it.

    .venv/bin/python scripts/check/front_door.py [--replicas 3] [--clients 8] [--seconds 10] [--policy KIND] [-- FLAG ...]

Starts replicas (the fake engine, unless flags behind -- name a model) and vllm-router as `minisgl cluster` does, and keeps
clients asking, half of them with streams.  Then a replica is killed, another one is drained by SIGTERM, and the router is
killed.  Fails where a request that had not begun to be answered is lost though a replica was there, where a stream just ends as
if it were complete, or where a request hangs.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from minisgl.deploy import plan_cluster
from minisgl.deploy.cluster import router_program, served_model
from minisgl.deploy.plan_cluster import Ports
from minisgl.deploy.program import Program, get, is_free, server_command

PATIENCE = 60.0  # seconds for one answer; longer is a hang
# Outcomes of one request.
OK, CUT, EVENT, REFUSED, UNREACHED, SILENT, HUNG = "complete", "cut", "error event", "refused", "unreached", "silent", "hung"
MEANING = {
    OK: "answered to its end",
    CUT: "its stream was cut: the client's HTTP library raises",
    EVENT: "its stream ended with one error event",
    REFUSED: "answered with an HTTP error",
    UNREACHED: "no connection, or it was closed before an answer began",
    SILENT: "LOST: its stream ended as if it were complete",
    HUNG: "LOST: no answer in time",
}


@dataclass
class Outcome:
    """Of one request.  `began`: something of its answer had come.  `detail`: what the client was told."""

    kind: str
    began: bool
    detail: str = ""


def outcome_of_stream(data: bytes, whole: bool) -> Outcome:
    """What became of a stream of server-sent events.  `whole`: the HTTP answer ended as it should."""
    events = [line.removeprefix("data: ") for line in data.decode(errors="replace").split("\n") if line.startswith("data: ")]
    errors = [event for event in events if event.startswith("{") and '"error"' in event and "error" in _parsed(event)]
    if errors:
        return Outcome(EVENT if len(errors) == 1 else SILENT, True, errors[0])
    if events and events[-1].strip() == "[DONE]":
        return Outcome(OK, True)
    return Outcome(SILENT if whole else CUT, bool(events), f"{len(events)} events")


def _parsed(event: str) -> dict[str, object]:
    try:
        value = json.loads(event)
    except ValueError:  # cut in the middle
        return {}
    return value if isinstance(value, dict) else {}


def ask(port: int, model: str, number: int, *, stream: bool, tokens: int) -> Outcome:
    """One request, as a client without retries sends it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    prompt = f"Question {number} of client {number % 7}: why? " * 4
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": stream, "ignore_eos": True}
    data, answer = b"", None
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            return Outcome(REFUSED, False, f"{answer.status} {answer.read()[:200].decode(errors='replace')}")
        while part := answer.read1(1 << 16):
            data += part
        return outcome_of_stream(data, True) if stream else Outcome(OK, True)
    except TimeoutError:
        return Outcome(HUNG, bool(data), "no answer in time")
    except (OSError, http.client.HTTPException) as e:
        if answer is None or not data:
            return Outcome(UNREACHED, answer is not None, repr(e))
        return outcome_of_stream(data, False) if stream else Outcome(CUT, True, repr(e))
    finally:
        connection.close()


class Load:
    """Clients that ask one request after another until they are told to end."""

    def __init__(self, port: int, model: str, clients: int, tokens: int) -> None:
        self.outcomes: list[Outcome] = []
        self._end = threading.Event()
        self._args = (port, model, tokens)
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self, client: int) -> None:
        port, model, tokens = self._args
        number = client * 100_000
        while not self._end.is_set():
            number += 1
            found = ask(port, model, number, stream=client % 2 == 0, tokens=tokens)
            self.outcomes.append(found)
            if found.kind != OK:
                time.sleep(0.2)  # as a client that tries again would

    def end(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()


def until(what: str, done: Callable[[], bool], seconds: float = 120.0) -> float:
    """Wait for it; how long it took.  Raises TimeoutError."""
    begin = time.monotonic()
    while not done():
        if time.monotonic() - begin > seconds:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.05)
    return time.monotonic() - begin


@contextmanager
def running(programs: list[Program]) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        for program in programs:
            print(f"{program.name} {program.ended() or 'runs'}:", *program.lines, sep="\n    ")
        raise
    finally:
        for program in programs:
            program.kill()


def free_ports(n: int) -> list[Ports]:
    """`n` triples of free ports, of which the first one is for the router."""
    base = 20_000 + os.getpid() % 20_000
    while not all(is_free(base + i + 1000 * k) for i in range(n) for k in range(3)):
        base += 1 + n
    return [Ports(base + i, base + i + 1000, base + i + 2000) for i in range(n)]


def main() -> int:
    p = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").split("\n", maxsplit=1)[0])
    p.add_argument("--replicas", type=int, default=3)
    p.add_argument("--clients", type=int, default=8)
    p.add_argument("--seconds", type=float, default=10.0, help="of load around each fault")
    p.add_argument("--tokens", type=int, default=300, help="of each answer")
    p.add_argument("--policy", default=plan_cluster.best_policy())
    p.add_argument("--router", default="")
    p.add_argument("flags", nargs="*", help="of the replicas, behind --")
    args = p.parse_args()
    exact, (door, *ports) = args.policy == plan_cluster.EXACT, free_ports(args.replicas + 1)
    plan = plan_cluster.launches(args.flags or ["fake"], ports, cores=os.cpu_count() or 1, gpus=[], exact=exact)
    replicas = [Program(f"replica {i}", server_command(*r.flags), r.ports.http) for i, r in enumerate(plan, 1)]
    with running(replicas):
        for replica in replicas:
            replica.start()
        until("replicas", lambda: all(replica.is_ready() for replica in replicas))
        model = served_model(replicas[0].port)
        command = plan_cluster.router_command(
            router_program(args.router),
            "127.0.0.1",
            door.http,
            plan,
            policy=args.policy,
            page_size=16,
            model=model,
            metrics_port=door.events,
        )
        router = Program("router", command, door.http, "/readiness")
        with running([router]):
            router.start()
            until("router", router.is_ready)
            return check(replicas, router, model, args)


def healthy(port: int) -> int:
    """How many replicas the router would send requests to."""
    status, body = get(port, "/readiness")
    return int(json.loads(body)["healthy_workers"]) if status == 200 else 0


def check(replicas: list[Program], router: Program, model: str, args: argparse.Namespace) -> int:
    """Every fault under load.  The exit code."""

    def kill(program: Program) -> None:
        program.kill()
        program.start()
        print(f"  {program.name} killed; another one was ready after {until(program.name, program.is_ready):.1f} s")

    def drain(program: Program) -> None:
        program.signal(signal.SIGTERM)
        print(f"  {program.name} drained in {until(program.name, lambda: bool(program.ended())):.1f} s")
        program.start()
        until(program.name, program.is_ready)

    faults: list[tuple[str, Callable[[], None], frozenset[str]]] = [
        ("a replica is killed", lambda: kill(replicas[0]), frozenset({OK, CUT, EVENT})),
        ("a replica is drained", lambda: drain(replicas[1 % len(replicas)]), frozenset({OK, CUT, EVENT})),
        ("the router is killed", lambda: kill(router), frozenset({OK, CUT, UNREACHED})),
    ]
    failed = False
    for title, fault, allowed in faults:
        until("the router's replicas", lambda: healthy(router.port) == len(replicas))
        print(f"{title}, policy {args.policy}, {args.clients} clients")
        load = Load(router.port, model, args.clients, args.tokens)
        time.sleep(args.seconds / 2)
        before = len(load.outcomes)
        fault()
        time.sleep(args.seconds / 2)
        load.end()
        counts = Counter((o.kind, o.began) for o in load.outcomes)
        for (kind, began), n in counts.most_common():
            bad = kind not in allowed or (kind == UNREACHED and began)
            failed |= bad
            where = "" if kind == OK else " (begun)" if began else " (not begun)"
            print(f"  {n:6} {kind}{where}: {MEANING[kind]}{'   <-- not allowed here' if bad else ''}")
            if kind != OK:
                print(f"         e.g. {next(o.detail for o in load.outcomes if (o.kind, o.began) == (kind, began))[:220]}")
        if not before or not any(o.kind == OK for o in load.outcomes[-args.clients :]):
            failed = True
            print("  no answers before, or none after: the check has shown nothing")
    print("FAILED" if failed else "as documented")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
