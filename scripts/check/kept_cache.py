"""What a request after the death of the scheduler saves, because the cached pages outlive it; one JSON line.

    .venv/bin/python scripts/check/kept_cache.py [--model MODEL] [--tokens 1500] [--kills 5] [--device cpu]

A prompt of --tokens tokens is answered, the scheduler is killed, and the prompt is asked again: at once ("from the kill", with
the recovery in it), or when the engine is up again ("when ready").  Medians of the seconds to its first token, "kept", and
"empty", where the cache was flushed before the kill.  The answers must be equal, and all whole pages of the prompt cached.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import time
from typing import Any

from minisgl.actors.spawn import find_model
from minisgl.api.engine import Chunk, TokenPrompt
from minisgl.api.system import System
from minisgl.config import Config, EngineConfig, ServerConfig
from minisgl.sampling_params import SamplingParams
from scripts.lib.reference import provenance


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--kills", type=int, default=5, help="of each of the four kinds")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rng, one = random.Random(0), SamplingParams(temperature=0, ignore_eos=True, max_tokens=1)
    prompt = TokenPrompt(tuple(rng.randint(50, 10_000) for _ in range(args.tokens)))
    engine = EngineConfig(device=args.device, kv_tokens=4 * args.tokens)
    system = System(Config(find_model(args.model, None, 1), engine, ServerConfig(max_restarts=1 << 20)))
    gateway = system.gateway
    seconds: dict[str, list[float]] = {}
    wrong = []

    def ask() -> tuple[float, tuple[int, ...], int]:
        told: list[Any] = []
        start = time.perf_counter()
        gateway.open(prompt, one, told.append)
        while not told:
            system.pump(0.01)
        assert isinstance(told[0], Chunk), told
        return time.perf_counter() - start, tuple(told[0].token_ids), told[0].cached_tokens

    try:
        system.wait_ready()
        _, right, _ = ask()
        for _ in range(args.kills):
            for kind in ("kept", "empty"):
                for when in ("from the kill", "when ready"):
                    ask()
                    if kind == "empty":
                        gateway.flush_cache()
                        while gateway.stats["cached_pages"]:
                            system.pump(0.1)
                    os.kill(system.supervisor.pids["scheduler"], signal.SIGKILL)
                    if when == "when ready":
                        while gateway.state == "ready":
                            system.pump(0.01)
                        while gateway.state != "ready":
                            system.pump(0.01)
                    took, said, cached = ask()
                    seconds.setdefault(f"{kind}, {when}", []).append(took)
                    whole = (args.tokens - 1) // engine.page_size * engine.page_size
                    if said != right or cached != (whole if kind == "kept" else 0):
                        wrong.append((kind, when, said, cached))
    finally:
        system.close()
    figures: dict[str, Any] = {k: round(statistics.median(v), 3) for k, v in seconds.items()}
    load = round(os.getloadavg()[0], 1)
    made = {"check": "kept_cache", "tokens": args.tokens, "kills": 4 * args.kills, "load": load, **provenance()}
    print(json.dumps({**made, **figures, "wrong": wrong}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
