"""The flags of everything that starts an engine, and the Config they make.  Standard library only: `--help` is instant."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from typing import Any

from minisgl.config import GPU_DEFAULTS, Config, EngineConfig, ModelSpec, ServerConfig, _check_gpus, gpu_count
from minisgl.errors import UserError

_ENGINE_FLAGS: tuple[tuple[str, Any, str, str], ...] = (
    ("tp", int, "N", "tensor-parallel degree: one worker process per rank"),
    ("device", str, "KIND", "auto (a GPU where there is one), cpu or cuda"),
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
    ("attention_backend", str, "NAME", "auto, triton, flashinfer or torch (GPU)"),
    (
        "quantization",
        str,
        "KIND",
        "of the linear layers: none; fp8 (GPU); int8 or q4, on weights of 8 or 4 bits (CPU); auto: on a CPU, without --dtype, "
        "4 bits where a GGUF file has them and 8 for the rest, elsewhere none",
    ),
    ("kv_cache_dtype", str, "TYPE", "auto (the model's), or fp8 (GPU)"),
    ("graphs", str, "STATE", "on, or off: no CUDA graphs, for comparisons (GPU)"),
    ("chat_template", str, "FILE", "a Jinja chat template to use instead of the model's own"),
    (
        "generation_config",
        str,
        "KIND",
        "sampling parameters of requests that do not say: auto (the model's generation_config.json), or none",
    ),
    ("sample_seed", int, "SEED", "base for the seeds of requests that bring none; 0: random"),
)

MIN_KEY_CHARS = 16


def flag(name: str) -> str:
    """The flag of a field: max_running -> --max-running."""
    return "--" + name.replace("_", "-")


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """The model and every field of EngineConfig."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="PATH_OR_HUB_ID",
        help="a .gguf file, a directory, org/name, random:SHAPE, or fake (no model); default: SmolLM2-135M-Instruct",
    )
    model.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    engine = parser.add_argument_group("engine")
    defaults: dict[str, Any] = {f.name: f.default for f in fields(EngineConfig)} | {"device": "auto"}
    for name, kind, metavar, text in _ENGINE_FLAGS:
        default = (f"{defaults[name]}" or "the model's") + (f", on a GPU {GPU_DEFAULTS[name]}" if name in GPU_DEFAULTS else "")
        engine.add_argument(flag(name), type=kind, metavar=metavar, help=f"{text} ({default})")


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
    server.add_argument(
        "--tool-call-parser",
        choices=("auto", "none", "hermes", "llama3", "mistral"),
        default="auto",
        help="how the model writes calls of tools; auto: as its chat template shows",
    )
    server.add_argument(
        "--reasoning-parser",
        choices=("auto", "none", "qwen3", "deepseek_r1"),
        default="auto",
        help="how the model writes thoughts; auto: as its chat template shows",
    )
    server.add_argument(
        "--num-tokenizers",
        type=int,
        metavar="N",
        default=d.num_tokenizers,
        help="tokenizer processes: with more than one, short prompts do not wait for long ones (%(default)s)",
    )
    server.add_argument("--strict", action="store_true", help="refuse unknown fields of a request; default: report them")
    server.add_argument("--any-model-name", action="store_true", help="serve requests for whatever model they name")
    server.add_argument(
        "--data-dir", metavar="DIR", default=d.data_dir, help="keep /v1/files and /v1/batches here; default: off"
    )
    server.add_argument("--api-key-file", metavar="FILE", help="keys, one a line: a request must bring one; default: none")


def engine_config(values: dict[str, Any]) -> EngineConfig:
    """EngineConfig from the values that were given (None: not), and the one environment variable that is part of the interface.

    What was not given has the default of the device.  Raises UserError.
    """
    chosen = {name: values[name] for name, *_ in _ENGINE_FLAGS if values.get(name) is not None}
    device = chosen.get("device", "auto")
    gpus = gpu_count() if device in ("auto", "cuda") else 0
    if device == "auto":
        chosen["device"] = device = "cuda" if gpus else "cpu"
    if device == "cuda":
        _check_gpus(gpus, chosen.get("tp", 1))
        chosen = GPU_DEFAULTS | chosen
    if os.environ.get("MINISGL_DISABLE_OVERLAP_SCHEDULING", "") not in ("", "0"):
        chosen["lag"] = 1
    return EngineConfig(**chosen)


def read_keys(path: str | None) -> tuple[str, ...]:
    """The keys in a file, one a line.  A key is never an argument: everybody may read those.  Raises UserError."""
    if path is None:
        return ()
    try:
        with open(path, encoding="utf-8") as f:
            keys = tuple(line.strip() for line in f if line.strip())
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--api-key-file {path}: cannot read it: {e}") from e
    if not keys or min(map(len, keys)) < MIN_KEY_CHARS:
        raise UserError(f"--api-key-file {path}: it must hold keys of at least {MIN_KEY_CHARS} characters, one a line")
    return keys


def config_from(args: argparse.Namespace, model: ModelSpec, styles: tuple[str, str] = ("", "")) -> Config:
    """The whole Config of a server.  `styles`: how the model writes calls of tools and thoughts, where the flags say auto.

    Raises UserError naming the flag.
    """
    asked = (args.tool_call_parser, args.reasoning_parser)
    calls, thoughts = (
        found if flag == "auto" else "" if flag == "none" else flag for flag, found in zip(asked, styles, strict=True)
    )
    server = ServerConfig(
        host=args.host,
        port=args.port,
        served_names=tuple(args.served_model_name or (model.name,)),
        drain_seconds=args.drain_seconds,
        max_open_requests=args.max_open_requests,
        max_queue=args.max_queue,
        max_queued_tokens=args.max_queued_tokens,
        tool_call_parser=calls,
        reasoning_parser=thoughts,
        num_tokenizers=args.num_tokenizers,
        strict=args.strict,
        any_model_name=args.any_model_name,
        data_dir=args.data_dir,
        api_keys=read_keys(args.api_key_file),
    )
    return Config(model, engine_config(vars(args)), server)
