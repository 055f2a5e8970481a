"""The arguments of `serve run minisgl.deploy.ray:app`, checked, and the flags of the servers that they make.  Pure."""

from __future__ import annotations

from typing import Any

from minisgl.deploy.plan_cluster import split
from minisgl.errors import UserError

DEFAULTS: dict[str, Any] = {
    "model": "",  # as --model; "": the embedded one
    "replicas": 1,
    "max_replicas": 0,  # above `replicas`: as many are started when much is waiting
    "target_requests": 32,  # open requests of a replica, beyond which another one is started
    "max_requests": 1024,  # open requests of a replica, beyond which they wait at the ingress
    "cpus": 1.0,  # of a replica: what Ray reserves, and --threads
    "gpus": 0.0,  # of a replica: what Ray reserves
    "drain_seconds": 30.0,
    "flags": "",  # more flags of `minisgl serve`, in one word
}
# Flags of the server that are not for its users here.
_SHARED = "replicas on one node cannot share it"
_OURS = {
    "--host": "Ray's proxy is what clients reach",
    "--port": "Ray's proxy is what clients reach, at its http_options.port",
    "--ssl-certfile": "clients reach the replicas through Ray's proxy; TLS belongs before it",
    "--drain-seconds": "write drain_seconds=N, which Ray has to know, too",
    **dict.fromkeys(("--data-dir", "--journal", "--trace", "--batch-socket", "--kv-events"), _SHARED),
}


def settings(args: dict[str, Any]) -> dict[str, Any]:
    """What `serve run` was given, over DEFAULTS, with their types.  Raises UserError."""
    found = dict(DEFAULTS)
    for name, given in args.items():
        if name not in DEFAULTS:
            raise UserError(f"{name}: unknown; there are {', '.join(DEFAULTS)}")
        kind = type(DEFAULTS[name])
        try:
            found[name] = kind(given)
        except ValueError:
            raise UserError(f"{name}={given}: a number is expected") from None
        if kind is not str and not 0 <= found[name] < 1e6:
            raise UserError(f"{name}={given}: a number from 0 to a million is expected")
    if min(found["replicas"], found["target_requests"], found["max_requests"]) < 1 or found["cpus"] <= 0:
        raise UserError("replicas, target_requests and max_requests must be at least 1, and cpus above 0")
    if 0 < found["max_replicas"] < found["replicas"]:
        raise UserError(f"max_replicas={found['max_replicas']} is less than replicas={found['replicas']}")
    alone = max(found["replicas"], found["max_replicas"]) == 1
    for flag in (word.partition("=")[0] for word in split("flags", found["flags"])):
        if flag in _OURS and not (alone and _OURS[flag] == _SHARED):
            raise UserError(f"flags: {flag}: {_OURS[flag]}")
    return found


def flags_of(found: dict[str, Any]) -> list[str]:
    """The flags of each server, without its port."""
    words = ["--model", found["model"]] if found["model"] else []
    words += ["--drain-seconds", f"{found['drain_seconds']:g}", *split("flags", found["flags"])]
    if not found["gpus"] and not any(word.partition("=")[0] == "--threads" for word in words):
        words += ["--threads", str(max(1, int(found["cpus"])))]
    return words
