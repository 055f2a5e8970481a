"""Opens many requests at once, from one thread, at as little cost as Python allows.  Run by scripts/check/overload.py.

    python -m scripts.lib.flood URL REQUESTS ADDRESS PID

Every request has a connection of its own, from ADDRESS; all connections are opened before any is used.  Those that were
admitted ask for long answers: when no answer has come for QUIET seconds, they are given up, and some may be answered in full
before.  Prints one JSON object: answers by status, how long refusals took from the last byte sent to the first byte received,
when the last refusal came, counted from the first connection, and the CPU time of process PID until then.  `until`: when that
was, by the clock of all processes.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

BODY = json.dumps({"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True}).encode()
QUIET = 4.0
REFUSED = ("429", "503")
SAMPLE_SECONDS = 0.02  # between two looks at the CPU time of the server
IP_BIND_ADDRESS_NO_PORT = 24  # <linux/in.h>: the port is chosen with the peer, so those in TIME_WAIT with others are free


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has taken, all its threads together, in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(url: str, n: str, address: str, pid: str) -> dict[str, Any]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    to = urlsplit(url)
    raw = b"POST /v1/completions HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        *(to.netloc.encode(), len(BODY), BODY),
    )
    events, sent, left = selectors.DefaultSelector(), dict[Any, float](), int(n)
    statuses, refusals = Counter[str](), list[float]()
    start = last = refused = sampled = time.monotonic()
    began = cpu = cpu_seconds(int(pid))
    for _ in range(left):
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((address, 0))
        sock.connect_ex((to.hostname or "", to.port or 80))
        events.register(sock, selectors.EVENT_WRITE)
    opened = last = refused = time.monotonic()
    while left and time.monotonic() - last < QUIET:
        for key, _ in events.select(0.5):
            sock: Any = key.fileobj  # type: ignore[no-redef]
            try:
                if sock not in sent:
                    sock.send(raw)
                    sent[sock] = time.monotonic()
                    events.modify(sock, selectors.EVENT_READ)
                    continue
                status = sock.recv(1 << 16)[9:12].decode() or "closed"
            except OSError as e:
                status = type(e).__name__
            last = time.monotonic()
            statuses[status] += 1
            if status in REFUSED:
                refused = last
                refusals.append(last - sent[sock])
            events.unregister(sock)
            sock.close()
            left -= 1
        if sampled < refused - SAMPLE_SECONDS:
            sampled, cpu = refused, cpu_seconds(int(pid))
    statuses["admitted"] += left
    refusals.sort()
    ms = {f"refused_p{p}_ms": round(1000 * refusals[(len(refusals) - 1) * p // 100], 1) for p in (50, 99) if refusals}
    seconds = {"opened_s": opened - start, "last_refusal_s": refused - start, "cpu_s": cpu - began}
    return {"answers": dict(+statuses), **ms, **{name: round(value, 2) for name, value in seconds.items()}, "until": refused}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])), flush=True)
