"""Opens many requests at once, from one thread, at as little cost as Python allows.  Run by scripts/check/overload.py.

    python -m scripts.lib.flood URL REQUESTS ADDRESS

Every request has a connection of its own, from ADDRESS; all connections are opened before any is used.  Those that were
admitted ask for long answers: when no answer has come for QUIET seconds, they are given up.  Prints one JSON object: answers by
status, how long refusals took from the last byte sent to the first byte received, and when the last one came, counted from the
first connection.
"""

from __future__ import annotations

import json
import resource
import selectors
import socket
import sys
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

BODY = json.dumps({"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True}).encode()
QUIET = 2.0
REFUSED = ("429", "503")


def main(url: str, n: str, address: str) -> dict[str, Any]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    to = urlsplit(url)
    raw = b"POST /v1/completions HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        *(to.netloc.encode(), len(BODY), BODY),
    )
    events, sent, left = selectors.DefaultSelector(), dict[Any, float](), int(n)
    statuses, refusals = Counter[str](), list[float]()
    start = last = time.monotonic()
    for _ in range(left):
        sock = socket.socket()
        sock.setblocking(False)
        sock.bind((address, 0))
        sock.connect_ex((to.hostname or "", to.port or 80))
        events.register(sock, selectors.EVENT_WRITE)
    opened = last = time.monotonic()
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
                refusals.append(last - sent[sock])
            events.unregister(sock)
            sock.close()
            left -= 1
    statuses["admitted"] += left
    refusals.sort()
    ms = {f"refused_p{p}_ms": round(1000 * refusals[(len(refusals) - 1) * p // 100], 1) for p in (50, 99) if refusals}
    return {"answers": dict(+statuses), **ms, "opened_s": round(opened - start, 2), "last_answer_s": round(last - start, 2)}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])), flush=True)
