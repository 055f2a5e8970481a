"""Compile one FlashInfer module, with or without a GPU.  FlashInfer is imported late: it reads its environment then."""

from __future__ import annotations

from pathlib import Path

import torch

from minisgl.errors import UserError
from minisgl.model.cuda.flashinfer.modules import INSTALL, ModuleSpec, parse_arch
from minisgl.model.cuda.flashinfer.toolchain import compiling, find_toolchain


def visible_archs() -> tuple[str, ...]:
    """The compute capabilities of the GPUs this process sees, as FlashInfer writes them; () for none."""
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return tuple(sorted({parse_arch("{}.{}".format(*torch.cuda.get_device_capability(i))) for i in devices}))


def compile_module(module: ModuleSpec) -> Path:
    """Compile in FlashInfer's workspace and return the shared library there.  Raises UserError with the compiler's words."""
    tools = find_toolchain(("curand_kernel.h",) if module.kind == "fa3" else ())
    try:
        from flashinfer.compilation_context import CompilationContext
        from flashinfer.jit.attention import modules
    except ModuleNotFoundError as e:
        raise UserError(f"FlashInfer cannot be imported without the package {e.name}: {INSTALL}") from e
    targets = {f"{major}.{minor}" for major, minor in CompilationContext().TARGET_CUDA_ARCHS}
    if not set(module.archs) <= targets:
        raise RuntimeError(f"{module} is wanted for {module.archs}, and FlashInfer compiles for {targets}")
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
                raise UserError(f"this FlashInfer names its modules differently ({spec.name}): {INSTALL}")
            spec.build(False)
        except RuntimeError as e:
            raise UserError(f"compiling {module} failed: {_reason(str(e))}") from e
    return Path(spec.jit_library_path)


def _reason(output: str) -> str:
    """The lines of a build's output that tell why it failed: the first errors, or else its end."""
    lines = list(dict.fromkeys(line.strip() for line in output.splitlines() if line.strip()))
    errors = [line for line in lines if "error" in line.lower() or "not found" in line.lower()]
    return " | ".join(errors[:3] or lines[-3:])[:1000]
