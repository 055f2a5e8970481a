"""A Ray cluster of two nodes on this machine, minisgl on Ray Serve in it, and what is lost when a node dies under load.

    .venv/bin/python scripts/check/ray_cluster.py [--clients 4] [--seconds 10] [--model MODEL]

Needs the extra [ray].  Two replicas, one on each node, each with one thread (the embedded model, unless another is named).
Shows that prompts that begin alike go to one replica, then takes the second node away under load, and fails where a request
that had not begun is lost, where a stream just ends as if it were complete, or where nothing is served afterwards.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from minisgl.deploy.program import get
from scripts.check.front_door import CUT, EVENT, MEANING, OK, Load, until

CPUS = 1  # of a node: one replica


def cached_tokens(port: int, model: str, prompt: str) -> int:
    """How much of a prompt the replica that got it had cached."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": 1})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def serve_on(cluster: Any, port: int, model: str) -> None:
    """Start the application with two replicas on the nodes of `cluster`, and wait until it serves."""
    import ray
    from ray import serve

    from minisgl.deploy.ray import app

    ray.init(address=cluster.address, logging_level="warning")
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    flags = "--kv-tokens 8192"
    serve.run(app({"model": model, "replicas": "2", "cpus": "1", "drain_seconds": "5", "flags": flags}), route_prefix="/")


def main() -> int:
    p = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").split("\n", maxsplit=1)[0])
    p.add_argument("--clients", type=int, default=4)
    p.add_argument("--seconds", type=float, default=10.0, help="of load before and after the node is lost")
    p.add_argument("--tokens", type=int, default=40, help="of each answer")
    p.add_argument("--model", default="", help="default: the embedded one")
    p.add_argument("--port", type=int, default=18999)
    args = p.parse_args()
    try:
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster
    except ImportError:
        print("not run: ray is not installed (pip install 'minisgl[ray]')")
        return 2
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=CPUS)
        serve_on(cluster, args.port, args.model)
        until("models", lambda: get(args.port, "/v1/models", 10)[0] == 200)
        return check(cluster, second, args)
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def check(cluster: Any, second: Any, args: argparse.Namespace) -> int:
    model = json.loads(get(args.port, "/v1/models", 10)[1])["data"][0]["id"]
    prompts = [f"Rule {i} of the house: " + "keep the door closed. " * 40 for i in range(6)]
    first = [cached_tokens(args.port, model, prompt + "Why?") for prompt in prompts]
    again = [cached_tokens(args.port, model, prompt + "And then?") for prompt in prompts]
    print(f"cached tokens of six prompts, the first time {first}, the second time {again}")
    failed = not all(n >= 100 for n in again)
    load = Load(args.port, model, args.clients, args.tokens)
    time.sleep(args.seconds)
    before = len(load.outcomes)
    cluster.remove_node(second, allow_graceful=False)
    print(f"  a node is lost after {before} answers")
    time.sleep(args.seconds)
    load.end()
    counts = Counter((o.kind, o.began) for o in load.outcomes)
    for (kind, began), n in counts.most_common():
        bad = kind not in (OK, EVENT, CUT) or (kind == CUT and not began)
        failed |= bad
        print(f"  {n:6} {kind}: {MEANING[kind]}{'   <-- not allowed' if bad else ''}")
        if kind != OK:
            print(f"         e.g. {next(o.detail for o in load.outcomes if (o.kind, o.began) == (kind, began))[:220]}")
    failed |= not before or not any(o.kind == OK for o in load.outcomes[before:])
    print("FAILED" if failed else "as documented")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
