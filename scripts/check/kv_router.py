"""Whether vllm-router's `kv_aware` sends conversations where their prefix is, also if it starts when they have begun.

    .venv/bin/python scripts/check/kv_router.py --router VENV/bin/vllm-router

`--router`: of an environment with `pip install vllm-router==0.1.17`.  Two replicas with the fake engine get the first turns of
conversations by turns, directly; then the router is started and gets the second turns.  Prints a JSON line; exit code 1 if a
conversation does not go on where it was.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from minisgl.deploy.program import free_port

ROOT = Path(__file__).parents[2]
CONVERSATIONS, LATE_SECONDS = 8, 1.0


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"content-type": "application/json"}), timeout=60) as answer:
        return json.load(answer)


class Replica:
    """A server with the fake engine."""

    def __init__(self) -> None:
        self.events, self.replay = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
        flags = ["--model", "fake", "--device", "cpu", "--port", "0", "--kv-tokens", "20000"]
        command = [sys.executable, "-m", "minisgl", *flags, "--kv-events", self.events, "--kv-events-replay", self.replay]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stderr is not None
        self.url = next(m[1] for line in self.process.stderr if (m := re.search(r"ready in .*?(http://\S+?)/v1", line)))

    def prompt_tokens(self) -> tuple[int, int]:
        """Of all requests so far, and how many of them were cached."""
        time.sleep(1.1)  # statistics are at most so old
        stats = ask(f"{self.url}/server_info")["stats"]
        return stats["prompt_tokens"], stats["cached_tokens"]


def start_router(router: str, replicas: list[Replica]) -> tuple[subprocess.Popen[bytes], str]:
    port = free_port()
    flags = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port()), "--policy", "kv_aware"]
    flags += ["--kv-event-block-size", "16", "--kv-event-model", "fake", "--worker-urls", *(r.url for r in replicas)]
    flags += ["--health-check-endpoint", "/ready", "--health-check-interval-secs", "1"]
    for r in replicas:
        flags += ["--kv-event-source", f"{r.url}={r.events}", "--kv-event-replay-source", f"{r.url}={r.replay}"]
    process = subprocess.Popen([router, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(200):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return process, f"http://127.0.0.1:{port}"
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SystemExit("the router has not started")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--router", required=True)
    processes: list[subprocess.Popen[Any]] = []
    path = parser.parse_args().router
    try:
        replicas = []
        for _ in range(2):
            replicas.append(Replica())
            processes.append(replicas[-1].process)
        texts = [f"Talk {i}. " + " ".join(f"word{i}x{k}" for k in range(120)) for i in range(CONVERSATIONS)]
        body = {"model": "fake", "max_tokens": 8}
        for i, text in enumerate(texts):
            ask(f"{replicas[i % 2].url}/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]})
        before = [r.prompt_tokens() for r in replicas]
        process, url = start_router(path, replicas)
        processes.append(process)
        time.sleep(LATE_SECONDS)
        shares = []
        for text in texts:
            messages = [{"role": "user", "content": f"{text} and more of it"}]
            usage = ask(f"{url}/v1/chat/completions", {**body, "messages": messages})["usage"]
            shares.append(usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"])
        routed = [r.prompt_tokens()[0] - b[0] for r, b in zip(replicas, before, strict=True)]
        fault = min(shares) < 0.9
        facts = {"conversations": len(texts), "cached": [round(s, 3) for s in shares], "prompt_tokens": routed, "fault": fault}
        print(json.dumps({"check": "kv_router", **facts}))
        return int(fault)
    finally:
        for started in processes[::-1]:
            started.terminate()
            started.wait(30)


if __name__ == "__main__":
    sys.exit(main())
