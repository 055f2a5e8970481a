"""The flags of everything that starts an engine, and the Config they make.  Standard library only: `--help` is instant."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from typing import Any

from minisgl.config import Config, EngineConfig, ModelSpec, ServerConfig

_ENGINE_FLAGS: tuple[tuple[str, Any, str, str], ...] = (
    ("tp", int, "N", "tensor-parallel degree: one worker process per rank"),
    ("device", str, "KIND", "cpu, or cuda (NVIDIA GPUs: experimental)"),
    ("dtype", str, "TYPE", "auto, float32, bfloat16 or float16; auto: float32 on a CPU, the checkpoint's on a GPU"),
    ("page_size", int, "TOKENS", "tokens per page of the KV cache"),
    ("max_running", int, "N", "requests that may run at the same time"),
    ("step_tokens", int, "TOKENS", "token budget of a step; decodes come first, prompts fill the rest"),
    ("lag", int, "N", "plans in flight; 1 switches overlap off, as MINISGL_DISABLE_OVERLAP_SCHEDULING=1 does"),
    ("kv_tokens", int, "TOKENS", "size of the KV cache; 0: from --memory-fraction"),
    ("memory_fraction", float, "F", "share of the memory left after the weights that the KV cache may take"),
    ("max_context", int, "TOKENS", "longest prompt plus completion; 0: the model's own limit"),
    ("cache", str, "KIND", "prefix cache: radix, or none"),
    ("order", str, "KIND", "who starts first: prefix (longest cached prefix), or arrival"),
    ("itl_target_ms", float, "MS", "keep the time between a request's tokens near this by smaller prefill chunks; 0: off"),
    ("threads", int, "N", "CPU threads over all ranks; 0: as many as this process may use"),
    ("sample_seed", int, "SEED", "base for the seeds of requests that bring none; 0: random"),
)


def flag(name: str) -> str:
    """The flag of a field: max_running -> --max-running."""
    return "--" + name.replace("_", "-")


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """The model and every field of EngineConfig."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="PATH_OR_HUB_ID", help="a .gguf file, a directory, or org/name; default: SmolLM2-135M-Instruct"
    )
    model.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    engine = parser.add_argument_group("engine")
    defaults = {f.name: f.default for f in fields(EngineConfig)}
    for name, kind, metavar, text in _ENGINE_FLAGS:
        engine.add_argument(flag(name), type=kind, metavar=metavar, default=defaults[name], help=f"{text} (%(default)s)")


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """The fields of ServerConfig that a user may set."""
    server = parser.add_argument_group("server")
    d = ServerConfig()
    server.add_argument("--host", default=d.host, help="address to listen on (%(default)s)")
    server.add_argument("--port", type=int, default=d.port, help="port to listen on; 0 picks a free one (%(default)s)")
    server.add_argument("--served-model-name", metavar="NAME", action="append", help="name clients may use; may be repeated")
    server.add_argument(
        "--drain-seconds",
        type=float,
        metavar="S",
        default=d.drain_seconds,
        help="grace for running requests at the end (%(default)s)",
    )
    server.add_argument(
        "--max-open-requests", type=int, metavar="N", default=d.max_open_requests, help="more are answered 429 (%(default)s)"
    )

    server.add_argument(
        "--max-queue", type=int, metavar="N", default=d.max_queue, help="waiting requests; more are answered 429 (%(default)s)"
    )
    server.add_argument(
        "--max-queued-tokens",
        type=int,
        metavar="N",
        default=d.max_queued_tokens,
        help="prompt tokens of waiting requests; more are answered 429 (%(default)s)",
    )


def engine_config(values: dict[str, Any]) -> EngineConfig:
    """EngineConfig from flag values, with the one environment variable that is part of the interface.  Raises UserError."""
    chosen = {name: values[name] for name, *_ in _ENGINE_FLAGS if name in values}
    if os.environ.get("MINISGL_DISABLE_OVERLAP_SCHEDULING", "") not in ("", "0"):
        chosen["lag"] = 1
    return EngineConfig(**chosen)


def config_from(args: argparse.Namespace, model: ModelSpec) -> Config:
    """The whole Config of a server.  Raises UserError naming the flag."""
    server = ServerConfig(
        host=args.host,
        port=args.port,
        served_names=tuple(args.served_model_name or (model.name,)),
        drain_seconds=args.drain_seconds,
        max_open_requests=args.max_open_requests,
        max_queue=args.max_queue,
        max_queued_tokens=args.max_queued_tokens,
    )
    return Config(model, engine_config(vars(args)), server)
