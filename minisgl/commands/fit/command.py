"""Runs `minisgl fit`: where the memory of a model goes on some hardware, and the limits that follow.  No torch.

It reads config.json, the header of a GGUF file or a preset, and no weights.  The formulas are those by which the engine sizes
itself at its start (model/common/memory.py, model/cuda/memory.py).
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from typing import Any

from minisgl.commands.fit.estimate import GIB, Load, estimate
from minisgl.commands.fit.hardware import GPUS, Hardware
from minisgl.commands.fit.report import document, lines
from minisgl.commands.parser import Parser
from minisgl.config import EngineConfig, flag, settings_of
from minisgl.errors import UserError

_SAME = ("dtype", "quantization", "kv_cache_dtype", "page_size", "max_running", "step_tokens", "memory_fraction")


def run(argv: list[str]) -> int:
    """Print the ledger.  Returns 0 if the load fits, else 1.  Raises UserError."""
    args = _parser().parse_args(argv)
    from minisgl.model.checkpoint.resolve import resolve
    from minisgl.model.common.shard import check_tp

    spec = resolve(_model(args), args.revision, weights=False)
    hardware, engine = _hardware(args), _engine(args)
    check_tp(spec, engine.tp)
    load = Load(args.users, args.context or spec.max_context)
    if load.context > spec.max_context:
        raise UserError(f"--context {load.context}: {spec.name} has a context of {spec.max_context} tokens")
    found = estimate(spec, engine, hardware, kernels=_kernels(engine))
    said = document(found, load)
    print(json.dumps(said, indent=2) if args.json else "\n".join(lines(found, load, said)))
    return 0 if found.holds(load) else 1


def _parser() -> Parser:
    p = Parser(
        prog="minisgl fit", description="Predict memory and limits of a model, without loading it.  Exit code 1: no fit."
    )
    p.add_argument("model_word", nargs="?", metavar="MODEL", help="the same as --model MODEL")
    p.add_argument("--model", metavar="PATH_OR_HUB_ID", help="as for serve; default: the embedded model")
    p.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    where = p.add_mutually_exclusive_group()
    where.add_argument("--gpu", metavar="NAME", help=f"{', '.join(GPUS)}, or cpu: this machine; default: cpu")
    where.add_argument("--gpu-memory", type=float, metavar="GIB", help="another GPU, by its memory")
    p.add_argument("--gpus", type=int, default=1, metavar="N", help="as many of them, as --tp of serve (%(default)s)")
    p.add_argument("--users", type=int, default=1, metavar="U", help="requests at the same time (%(default)s)")
    p.add_argument("--context", type=int, default=0, metavar="TOKENS", help="of each, answer included; default: the model's")
    p.add_argument("--bandwidth", type=float, default=0.0, metavar="GB/S", help="of the memory, instead of the data sheet's")
    p.add_argument("--tflops", type=float, default=0.0, metavar="TFLOPS", help="of 16-bit products, likewise")
    for name, default, s in settings_of(EngineConfig):
        if name in _SAME:
            p.add_argument(flag(name), type=type(default), metavar=s.metavar, help=f"as for serve: {s.help}")
    p.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return p


def _model(args: argparse.Namespace) -> str | None:
    if args.model is not None and args.model_word not in (None, args.model):
        raise UserError(f"two models are named, {args.model_word} and --model {args.model}: leave one out")
    model: str | None = args.model or args.model_word
    if model == "fake":
        raise UserError("--model fake: the fake engine has no model, and takes no memory to speak of")
    return model


def _hardware(args: argparse.Namespace) -> Hardware:
    for name, least in (("users", 1), ("context", 0), ("gpus", 1), ("bandwidth", 0), ("tflops", 0), ("gpu_memory", 1)):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and least <= value <= 1 << 30):
            raise UserError(f"{flag(name)} must be between {least} and {1 << 30}, got {value:g}")
    name = (args.gpu or "cpu").lower()
    if args.gpu_memory is not None:
        found = Hardware("GPU", args.gpu_memory, 0.0, 0.0, 0.0, 90, "--gpu-memory: no rates are known")
    elif name == "cpu":
        from minisgl.model.common.host import available_bytes

        found = Hardware("CPU", available_bytes() / GIB, 0.0, 0.0, 0.0, 0, "memory that is available here now")
    elif name in GPUS:
        found = GPUS[name]
    else:
        raise UserError(f"--gpu must be one of {', '.join(GPUS)}, cpu, got {args.gpu!r}; another: --gpu-memory GIB")
    bandwidth, flops = args.bandwidth * 1e9 or found.bandwidth, args.tflops * 1e12 or found.flops
    return replace(found, bandwidth=bandwidth, flops=flops, fp8_flops=found.fp8_flops or 2 * args.tflops * 1e12)


def _engine(args: argparse.Namespace) -> EngineConfig:
    device = "cpu" if args.gpu_memory is None and (args.gpu or "cpu").lower() == "cpu" else "cuda"
    given = {name: getattr(args, name) for name in _SAME if getattr(args, name) is not None}
    usual = {name: s.on_gpu for name, _, s in settings_of(EngineConfig) if s.on_gpu is not None} if device == "cuda" else {}
    values: dict[str, Any] = usual | given
    return EngineConfig(tp=args.gpus, device=device, **values)


def _kernels(engine: EngineConfig) -> bool:
    """Whether a CPU server here would have its C kernels; elsewhere nobody asks."""
    if engine.device != "cpu":
        return True
    from minisgl.model.cpu.build import NoKernels, load_kernels

    try:
        load_kernels()
    except NoKernels:
        return False
    return True
