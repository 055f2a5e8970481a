"""Whether Dynamo's select_service, which hears the KV events, names the replica that has a conversation's prefix.

    .venv/bin/python scripts/check/select_service.py --python VENV/bin/python

`--python`: of an environment with `pip install ai-dynamo-runtime==1.6.1`.  Two replicas with the fake engine answer the first
turns of conversations, by turns; then the service is asked where the second turns should go.  The service is started when half
of them have been answered, so it comes late.  Prints a JSON line; exit code 1 if it names another replica.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.error
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from minisgl.deploy.program import free_port
from scripts.check.kv_router import CONVERSATIONS, LATE_SECONDS, Replica, ask


def start(python: str, replicas: list[Replica]) -> tuple[subprocess.Popen[bytes], str]:
    """The service, which knows the replicas as workers 0, 1, ..., and its URL."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [python, "-m", "dynamo.select_service", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for i, r in enumerate(replicas):
        worker = {"worker_id": i, "model_name": "fake", "endpoint": r.url, "block_size": 16}
        worker |= {"data_parallel_start_rank": 0, "data_parallel_size": 1}
        worker |= {"kv_events_endpoints": {"0": r.events}, "replay_endpoint": r.replay}
        for _ in range(200):
            try:
                ask(f"{url}/workers", worker)
                break
            except urllib.error.HTTPError:
                raise
            except OSError:
                time.sleep(0.1)
        else:
            raise SystemExit("the service has not started")
    return process, url


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--python", required=True)
    python = parser.parse_args().python
    processes: list[subprocess.Popen[Any]] = []
    try:
        replicas = []
        for _ in range(2):
            replicas.append(Replica())
            processes.append(replicas[-1].process)
        texts = [f"Talk {i}. " + " ".join(f"word{i}x{k}" for k in range(120)) for i in range(CONVERSATIONS)]
        url = ""
        for i, text in enumerate(texts):
            ask(f"{replicas[i % 2].url}/v1/completions", {"model": "fake", "prompt": text, "max_tokens": 8})
            if i == CONVERSATIONS // 2:
                process, url = start(python, replicas)
                processes.append(process)
        time.sleep(LATE_SECONDS)
        named, shares = [], []
        for text in texts:
            tokens = ask(f"{replicas[0].url}/tokenize", {"model": "fake", "prompt": f"{text} and more of it"})["tokens"]
            chosen = ask(f"{url}/select", {"model_name": "fake", "token_ids": tokens})
            named.append(chosen["worker_id"])
            shares.append(chosen["overlap"]["gpu"] / len(tokens))
        fault = named != [i % 2 for i in range(CONVERSATIONS)] or min(shares) < 0.9
        facts = {"conversations": len(texts), "named": named, "known": [round(s, 3) for s in shares], "fault": fault}
        print(json.dumps({"check": "select_service", **facts}))
        return int(fault)
    finally:
        for started in processes[::-1]:
            started.terminate()
        for started in processes[::-1]:
            started.wait(30)


if __name__ == "__main__":
    sys.exit(main())
