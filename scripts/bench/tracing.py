"""What a trace costs while it runs: the same load on the fake engine without and with one, in turn.

    .venv/bin/python scripts/bench/tracing.py [--rows 64] [--tokens 200] [--rounds 6]

One JSON line.  `cpu_ms`: CPU milliseconds of all processes of the server for the load without and with a trace, the smallest of
the rounds, as others may use the machine, too; `tokens_per_s`: the largest.  The file is made after the load, and not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.check.trace import ask
from scripts.lib.live_server import live_server
from scripts.lib.reference import provenance


def cpu_ms(pid: int) -> float:
    """CPU time so far of the server's processes but the one that makes the file."""
    total = 0.0
    pids = [pid, *(int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split())]
    for p in pids:
        if "reader" not in Path(f"/proc/{p}/cmdline").read_text():
            total += sum(int(t.joinpath("schedstat").read_text().split()[0]) for t in Path(f"/proc/{p}/task").iterdir()) / 1e6
    return total


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--rows", type=int, default=64, help="requests at the same time")
    p.add_argument("--tokens", type=int, default=200, help="of each answer")
    p.add_argument("--rounds", type=int, default=6)
    args = p.parse_args()
    flags = ("--model", "fake", "--device", "cpu", "--max-running", str(args.rows), "--step-tokens", "512")
    rounds: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with live_server(*flags) as url, ThreadPoolExecutor(args.rows) as pool:
        pid = json.loads(ask(url, "/server_info", method="GET"))["pid"]
        bodies = [
            {"prompt": [3 + (i * 7 + k) % 200 for k in range(100)], "max_tokens": args.tokens, "ignore_eos": True}
            for i in range(args.rows)
        ]
        for n in range(2 * args.rounds + 1):
            on = n % 2 == 0
            tracing = threading.Thread(target=ask, args=(url, "/debug/trace?seconds=8"))
            if on:
                tracing.start()
                time.sleep(0.5)
            before, began = cpu_ms(pid), time.monotonic()
            for answer in [pool.submit(ask, url, "/v1/completions", body) for body in bodies]:
                answer.result()
            seconds, spent = time.monotonic() - began, cpu_ms(pid) - before
            if on:
                tracing.join()
            if n:  # the first one warms up
                rounds[on].append((spent, args.rows * args.tokens / seconds))
    cpu = {on: min(spent for spent, _ in of) for on, of in rounds.items()}
    rate = {on: max(per_second for _, per_second in of) for on, of in rounds.items()}
    out = {"cpu_ms": [round(cpu[False]), round(cpu[True])], "cpu_more": round(cpu[True] / cpu[False] - 1, 4)}
    out |= {"tokens_per_s": [round(rate[False]), round(rate[True])], "rounds": args.rounds, "rows": args.rows}
    print(json.dumps(out | provenance()))


if __name__ == "__main__":
    main()
