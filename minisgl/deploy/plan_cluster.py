"""What `minisgl cluster` starts: command lines of the replicas and of the router.  Pure: starts nothing."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from minisgl.commands.flags import given_of
from minisgl.commands.serve import parser as serve_parser
from minisgl.config import EngineConfig
from minisgl.errors import UserError

REPLICA = "{replica}"  # in the flags of a replica: its number
KV_EVENTS = "--kv-events"
EXACT, APPROXIMATE = "kv_aware", "cache_aware"  # policies of vllm-router: by the replicas' KV events, by what it has sent where
# Flags that name something which only one server can have: field of the parser -> flag.
_ALONE = {"data_dir": "--data-dir", "journal": "--journal", "trace": "--trace", "batch_socket": "--batch-socket"}


@dataclass(frozen=True)
class Ports:
    """Of one replica; `events` and `replay` only matter where the server publishes KV events."""

    http: int
    events: int = 0
    replay: int = 0


@dataclass(frozen=True)
class Launch:
    """One replica: flags of `minisgl serve`, and variables for its environment."""

    ports: Ports
    flags: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports.http}"


def publishes_kv_events() -> bool:
    """Whether this version's server has --kv-events, with which a router knows what each replica has cached."""
    return KV_EVENTS in serve_parser()._option_string_actions


def best_policy(*, keys: bool = False, cache: str | None = None) -> str:
    """The router's policy where the user names none.

    `keys`: replicas ask for API keys: prefixes are salted, and private.  `cache`: their --cache, of which "none" tells nothing.
    """
    return EXACT if publishes_kv_events() and not keys and cache != "none" else APPROXIMATE


def split(name: str, text: str) -> list[str]:
    """The words of flags that were given as one text, as a shell reads them.  Raises UserError."""
    try:
        return shlex.split(text)
    except ValueError as e:
        raise UserError(f"{name} {text!r:.200}: no flags as a shell would read them ({e})") from e


def checked(flags: Sequence[str], replicas: int) -> argparse.Namespace:
    """The flags for the replicas, parsed as the server will.  Raises UserError, or exits as the server does."""
    args = serve_parser().parse_args([word.replace(REPLICA, "1") for word in flags])
    for flag, value, default in (("--port", args.port, 8000), ("--host", args.host, "127.0.0.1")):
        if value != default:
            raise UserError(f"{flag} {value} behind --: replicas listen on this host alone; {flag} before -- is the router's")
    if args.ssl_certfile:
        raise UserError(
            "--ssl-certfile: clients reach the replicas through the router; TLS belongs before it (docs/deployment.md)"
        )
    for name, flag in _ALONE.items():
        if getattr(args, name, None) and replicas > 1 and not any(REPLICA in word for word in _values(flags, flag)):
            raise UserError(f"{flag}: replicas cannot share it; write {REPLICA} into it, which becomes the replica's number")
    return args


def _values(flags: Sequence[str], flag: str) -> list[str]:
    """The words that may be the value of `flag`."""
    pairs = zip(flags, [*flags[1:], ""], strict=True)
    return [word if "=" in word else after for word, after in pairs if word.partition("=")[0] == flag]


def launches(flags: Sequence[str], ports: Sequence[Ports], *, cores: int, gpus: Sequence[str], exact: bool) -> list[Launch]:
    """What to start for each of `ports`.  `gpus`: what may stand in CUDA_VISIBLE_DEVICES.  `exact`: with KV events.

    Replicas share a host: each gets GPUs of its own, or its part of the cores and of the memory for the KV cache, unless the
    flags say how much.  Raises UserError.
    """
    n = len(ports)
    args = checked(flags, n)
    given = given_of(args)
    if exact:
        for name in ("kv_events", "kv_events_replay"):
            if getattr(args, name):
                raise UserError(f"--{name.replace('_', '-')}: with --policy {EXACT} each replica has its own; leave it out")
        if args.kv_events_format != "map":
            raise UserError(f"--kv-events-format {args.kv_events_format}: the router reads map alone; leave it out")
    on_gpu = bool(gpus) and args.device != "cpu" and "fake" not in (args.model, args.model_word)
    tp = given.get("tp", EngineConfig().tp)
    if on_gpu and n * tp > len(gpus):
        raise UserError(
            f"{n} replicas of --tp {tp} need {n * tp} GPUs and this host shows {len(gpus)}: ask for "
            f"{len(gpus) // tp or 'fewer'} replicas, a smaller --tp, or --device cpu"
        )
    shared: list[str] = []
    if not on_gpu and n > 1:
        if "threads" not in given:
            shared += ["--threads", str(max(tp, cores // n))]
        if not {"kv_tokens", "memory_fraction"} & given.keys():
            shared += ["--memory-fraction", f"{EngineConfig().memory_fraction / n:.4g}"]
    out = []
    for i, own in enumerate(ports):
        words = [word.replace(REPLICA, str(i + 1)) for word in flags]
        words += [*shared, "--host", "127.0.0.1", "--port", str(own.http)]
        if exact:
            words += [KV_EVENTS, f"tcp://127.0.0.1:{own.events}", f"{KV_EVENTS}-replay", f"tcp://127.0.0.1:{own.replay}"]
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * tp : (i + 1) * tp])} if on_gpu else {}
        out.append(Launch(own, words, visible))
    return out


def visible_gpus(listed: str, environment: Mapping[str, str] = os.environ) -> list[str]:
    """GPUs that replicas may use: those of CUDA_VISIBLE_DEVICES, or all in `listed`, the output of `nvidia-smi -L`."""
    count = sum(line.startswith("GPU ") for line in listed.splitlines())
    if count and "CUDA_VISIBLE_DEVICES" in environment:
        return [word for word in environment["CUDA_VISIBLE_DEVICES"].split(",") if word.strip() not in ("", "-1")]
    return [str(i) for i in range(count)]


def router_command(
    program: Sequence[str],
    host: str,
    port: int,
    replicas: Sequence[Launch],
    *,
    policy: str,
    page_size: int,
    model: str,
    metrics_port: int,
    extra: Sequence[str] = (),
) -> list[str]:
    """The command line of vllm-router 0.1.17.

    /ready is 503 from the moment a replica drains, or recovers; it is asked every second, since by default the router learns of
    that after three minutes.  Tries are spread over three seconds, since the five of the default all go to the dead replica, in
    less time than its death is noticed in.  `model`: the name that replicas serve.  `metrics_port`: without one, all routers of
    a host want 29000.  `extra`: more of the router's own flags, which win.
    """
    words = [*program, "--host", host, "--port", str(port), "--worker-urls", *(r.url for r in replicas), "--policy", policy]
    words += ["--health-check-endpoint", "/ready", "--health-check-interval-secs", "1", "--health-failure-threshold", "1"]
    words += ["--health-success-threshold", "1", "--cb-timeout-duration-secs", "2"]  # back again as soon as it is ready
    words += ["--retry-max-retries", "8", "--retry-initial-backoff-ms", "100", "--retry-max-backoff-ms", "1000"]
    words += ["--worker-startup-check-interval", "1", "--log-level", "warning", "--prometheus-port", str(metrics_port)]
    if policy == EXACT:
        for r in replicas:
            words += ["--kv-event-source", f"{r.url}=tcp://127.0.0.1:{r.ports.events}"]
            words += ["--kv-event-replay-source", f"{r.url}=tcp://127.0.0.1:{r.ports.replay}"]
        words += ["--kv-event-block-size", str(page_size), "--kv-event-model", model]
    return [*words, *extra]
