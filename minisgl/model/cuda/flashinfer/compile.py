"""Compiles FlashInfer modules, with or without a GPU.  FlashInfer reads its environment when it is imported: late, here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from minisgl.config import EngineConfig, ModelSpec
from minisgl.errors import UserError
from minisgl.model.cuda.flashinfer import modules as fm
from minisgl.model.cuda.flashinfer.toolchain import compiling, find_toolchain


def visible_archs() -> tuple[str, ...]:
    """The compute capabilities of the GPUs this process sees, as FlashInfer writes them; () for none."""
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return tuple(sorted({fm.parse_arch("{}.{}".format(*torch.cuda.get_device_capability(i))) for i in devices}))


def compile_module(module: fm.ModuleSpec) -> Path:
    """Compile in FlashInfer's workspace and return the shared library there.  Raises UserError with the compiler's message."""
    tools = find_toolchain(("curand_kernel.h",) if module.kind == "fa3" else ())
    try:
        from flashinfer.compilation_context import CompilationContext
        from flashinfer.jit.attention import modules
    except ModuleNotFoundError as e:
        raise UserError(f"FlashInfer cannot be imported without the package {e.name}: {fm.INSTALL}") from e
    targets = {f"{major}.{minor}" for major, minor in CompilationContext().TARGET_CUDA_ARCHS}
    if not set(module.archs) <= targets:
        raise RuntimeError(f"{module} is needed for {module.archs}, and FlashInfer compiles for {targets}")
    q, kv = getattr(torch, module.q_dtype), getattr(torch, module.kv_dtype)
    # Then: index dtype, head sizes, position encoding 0 (none: rope is ours), window, soft cap [, no fp16 scores].
    types = (q, kv, q, torch.int32, module.head_dim, module.head_dim, 0, module.window, module.softcap)
    with compiling(tools):
        try:
            if module.kind == "decode":
                spec = modules.gen_batch_decode_module(*types)
            else:
                spec = modules.gen_batch_prefill_module(module.kind, *types, False)
            if spec.name != module.uri:
                raise UserError(f"this FlashInfer names its modules differently ({spec.name}): {fm.INSTALL}")
            spec.build(False)
        except RuntimeError as e:
            raise UserError(f"compiling {module} failed: {_reason(str(e))}") from e
    return Path(spec.jit_library_path)


def _reason(output: str) -> str:
    """The lines of a build's output that explain its failure: the first errors, or else its end."""
    lines = list(dict.fromkeys(line.strip() for line in output.splitlines() if line.strip()))
    errors = [line for line in lines if "error" in line.lower() or "not found" in line.lower()]
    return " | ".join(errors[:3] or lines[-3:])[:1000]


def build(module: fm.ModuleSpec, directory: Path | None = None) -> None:
    """Compile `module` and install it into FlashInfer (or `directory`): minutes.  Raises UserError.

    FlashInfer reads FLASHINFER_CUDA_ARCH_LIST and FLASHINFER_WORKSPACE_BASE when it is imported, which is here at the latest.
    """
    found = fm.installation()
    directory = directory or found.aot
    fm.check_writable(directory / module.uri)
    fm.install(compile_module(module), module.uri, directory, found.note(module))


def build_all(modules: Sequence[fm.ModuleSpec], say: Callable[[str], None], directory: Path | None = None) -> None:
    """`build` each, with a line before and after.  Raises UserError at the first that fails."""
    for i, module in enumerate(modules, 1):
        line = f"compiling {i} of {len(modules)}: {module} ..."
        say(line)
        start = time.monotonic()
        build(module, directory)
        say(f"{line} {time.monotonic() - start:.0f} s")


def build_missing(spec: ModelSpec, engine: EngineConfig, arch: str, say: Callable[[str], None]) -> None:
    """Compile what a start on a GPU of `arch` needs and does not find.  Runs in rank 0.  Raises UserError."""
    states = fm.status(fm.needed(spec, engine, (arch,)))
    missing = [module for module, state in states.items() if state in (fm.State.MISSING, fm.State.STALE)]
    if missing:
        say(announce(missing))
        build_all(missing, say)


def announce(missing: Sequence[fm.ModuleSpec]) -> str:
    """One line for a start that has to compile; "" if nothing is missing."""
    if not missing:
        return ""
    count = f"{len(missing)} module{'s' if len(missing) > 1 else ''}"
    return (
        f"FlashInfer has to compile {count} first ({'; '.join(map(str, missing))}): once, about a minute each on 16 cores; "
        "`python -m minisgl prebuild` does it ahead of time"
    )
