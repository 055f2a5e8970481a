"""Kills a server's processes under load, and much else, and sees that nobody's answer changes.

    .venv/bin/python scripts/check/chaos.py [--engine fake|cpu|MODEL] [--kills 40] [--seed 0] [--json FILE] [-- flags]

First the answers to a seeded set of mixed requests are recorded undisturbed.  Then clients ask for them again and again while
an attacker, by the same seed, kills children of the api process (also several at once, and while others recover), stops some
for less or more than --hang-seconds, sends hostile bytes to the HTTP port and the sockets of the run directory, leaves streams
and fills the disk of the batches.  At the end:

    every request is answered exactly once, as it was undisturbed: text, token ids, ends, log probabilities, calls, vectors
    the pool is whole, no request is open, the api process has kept its size and its descriptors
    the server ends at SIGTERM, leaves no process and no file, and has logged no error

A MODEL runs on a GPU, whose answers depend on their neighbours: there each must be whole and one (nothing sent is changed,
repeated or missing), and a token of a greedy answer is at most --logit-limit below the best when all of it is scored again.

One line says how it was made, one the figures (JSON), the last is the verdict.  --kills 0 kills nobody for --seconds.  What
follows -- are flags of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp

from scripts.lib import attacks
from scripts.lib.storm import ATTACKS, COMMON, SHOWN, WITH_KILLS, Chaos, Options, knows
from scripts.lib.watched import Watched


async def attack(options: Options) -> tuple[dict[str, Any], list[str]]:
    """Start a server, attack it, end it.  Returns the figures and all faults."""
    hang = options.setting("hang") if knows("hang_seconds") else None
    flags = [*options.setting("flags"), *COMMON]
    if knows("max_restarts"):
        flags += [x for pair in WITH_KILLS.items() for x in pair]
    flags += ["--hang-seconds", str(hang)] if hang else []
    with tempfile.TemporaryDirectory(prefix="chaos-disk-") as data, attacks.small_disk(Path(data)) as small:
        server = Watched(*flags, "--data-dir", data, *options.flags, echo=options.echo)
        chaos = None
        try:
            timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0, family=socket.AF_INET)
            async with aiohttp.ClientSession(server.url, timeout=timeout, connector=connector, read_bufsize=1 << 20) as session:
                chaos = Chaos(options, server, session, Path(data) if small else None, hang)
                figures = await chaos.run()
        finally:
            left = await asyncio.to_thread(server.end)
    for text in (*left[bool(chaos.killer.faults) :], *server.failures()):
        chaos.fault(text)
    figures |= {"faults": dict(chaos.kinds), "disk": "small" if small else "not mounted: no full disk was tried"}
    return {"server": flags + options.flags, **figures}, chaos.faults


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="fake", help="fake, cpu (the embedded model), or a model for the GPU")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds-between", type=float, nargs=2, default=(0.3, 1.0), metavar=("LO", "HI"), dest="between")
    parser.add_argument("--who", default="", help="worker,scheduler,tokenizer,detokenizer,checker; default: all")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a run without kills")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--cases", type=int, default=0, help="different requests")
    parser.add_argument("--tokens", type=int, default=0, help="of the longest answer")
    parser.add_argument("--wait", type=float, default=180.0, help="seconds after which an answer is missing")
    parser.add_argument("--logit-limit", type=float, default=0.5, help="on a GPU")
    parser.add_argument("--hang", type=float, default=0.0, metavar="S", help="the server's --hang-seconds")
    parser.add_argument("--limit", type=float, default=math.inf, metavar="S", help="kill nobody after so many seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and all faults there, too")
    parser.add_argument("--echo", action="store_true", help="show what the server logs")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:at])
    given: dict[str, Any] = {k: frozenset(filter(None, getattr(args, k).split(","))) for k in ("who", "attacks")}
    if unknown := given["attacks"] - set(ATTACKS):
        parser.error(f"no attack is called {min(unknown)!r}; there are {', '.join(ATTACKS)}")
    rest: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in (*given, "json", "between")}
    options = Options(**rest, **given, between=tuple(args.between), flags=sys.argv[at + 1 :])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server ends with us
    from scripts.lib.reference import provenance

    made = {"check": "chaos", "engine": options.engine, "seed": options.seed, "command": options.reproducer(), **provenance()}
    print(json.dumps(made), flush=True)
    figures, found = asyncio.run(attack(options))
    print(json.dumps(figures), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({**made, **figures, "ok": not found, "all_faults": found}, indent=1))
    for text in found[:SHOWN]:
        print(f"  {text}")
    n = figures["kills"]
    if found:
        print(f"chaos: {len(found)} faults in {figures['requests']} requests and {n} kills; again: {options.reproducer()}")
    else:
        print(f"chaos: {figures['requests']} requests and {n} kills, nothing lost, repeated, changed or left")
    return 1 if found else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
