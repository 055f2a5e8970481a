"""GPUs: which are found or why none, whether torch can use them, and which attention they get."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from minisgl.commands.doctor.driver import Driver, Surroundings
from minisgl.commands.doctor.rows import GIB, Check, Fact, Missing, has, pip
from minisgl.commands.doctor.software import PACKAGES, Torch
from minisgl.model.cuda.attention.requirements import FLOAT8_CAPABILITY, flashinfer_lacks, triton_lacks

_ONLY_GPUS = "only GPUs use it"


def checks(driver: Driver, around: Surroundings, torch: Torch) -> Iterator[Check]:
    """The rows, in their order."""
    gpus = len(driver.gpus)
    yield Check("GPU", False, lambda: gpu(driver, around))
    yield Check("torch for GPUs", gpus > 0, lambda: torch_for(driver, torch.answer))
    yield Check("attention", False, lambda: attention(driver))
    yield Check("FlashInfer (GPU)", False, lambda: flashinfer(gpus))
    yield Check("compiling for GPUs", False, lambda: toolchain(gpus))
    yield Check("several GPUs: /dev/shm", False, lambda: dev_shm(gpus))


def gpu(driver: Driver, around: Surroundings) -> Fact:
    """The GPUs, or the first reason why there is none."""
    if driver.gpus:
        names = ", ".join(f"{g.name} ({g.gib:.1f} GiB, compute capability {g.capability / 10:.1f})" for g in driver.gpus)
        old = [g for g in driver.gpus if g.capability < 80]
        if old:
            return Fact(
                names, f"{old[0].name} is older than 8.0: attention runs in plain torch, slowly", "--device cpu", "better"
            )
        no8 = all(g.capability < FLOAT8_CAPABILITY for g in driver.gpus)
        shown = f"{names}; driver {around.module or 'without a version'}, for CUDA {driver.cuda[0]}.{driver.cuda[1]}"
        return Fact(shown, "no float8 (it needs 8.9): --quantization fp8 and --kv-cache-dtype fp8 are refused" if no8 else "")
    cpu = "models run on the CPU"
    hides = around.visible is not None and around.visible.strip(" ,") in ("", "-1")
    if hides and (around.nodes or around.on_bus or driver.library):
        return Fact(f"hidden: CUDA_VISIBLE_DEVICES={around.visible!r}", cpu, "unset CUDA_VISIBLE_DEVICES", "better")
    if not (around.on_bus or around.nodes or around.module):
        return Fact("none in this machine", f"{cpu}, which is no fault", state="absent")
    if not driver.library and around.container:
        raise Missing("the container has no driver library (libcuda.so.1)", "docker run --gpus all ...", cpu)
    if not driver.library:
        raise Missing(f"{around.on_bus} on the bus, but no driver (libcuda.so.1)", "apt install nvidia-driver", cpu)
    if not around.nodes:
        mend = "docker run --gpus all ..." if around.container else "sudo nvidia-modprobe -u -c=0"
        raise Missing("there is no /dev/nvidia0" + " in this container" * around.container, mend, cpu)
    if not around.module:
        raise Missing("the driver's kernel module is not loaded", "sudo modprobe nvidia", cpu)
    hidden = f"; CUDA_VISIBLE_DEVICES={around.visible}" if around.visible is not None else ""
    raise Missing(f"the driver {around.module} lists none: {driver.error or 'no device'}{hidden}", "nvidia-smi", cpu)


def torch_for(driver: Driver, answer: list[Any] | None) -> Fact:
    """The CUDA version that torch is built for, and whether it goes with driver and GPU."""
    if answer is None:
        raise Missing("torch does not work")
    version, cuda, usable, archs = (*answer, [])[:4]
    if not driver.gpus:
        if not cuda:
            return Fact(f"torch {version} is a build for CPUs", "enough where there is no GPU")
        return Fact(f"torch {version} is built for CUDA {cuda}", "works on the CPU, too; a build for CPUs is gigabytes smaller")
    again = pip("--force-reinstall", PACKAGES["torch"])
    if not cuda:
        raise Missing(f"torch {version} is a build for CPUs", f"{again}, or serve with --device cpu", "it cannot use the GPU")
    wanted = tuple(int(n) for n in re.findall(r"\d+", cuda)[:2])
    if not usable and driver.cuda[0] and wanted[:1] > driver.cuda[:1]:
        found = f"the driver supports CUDA {driver.cuda[0]}.{driver.cuda[1]}, and torch {version} is built for {cuda}"
        raise Missing(
            found, f"a newer driver, or a torch built for CUDA {driver.cuda[0]}", "the driver is too old for this torch"
        )
    if not usable:
        raise Missing(f"torch {version} for CUDA {cuda} finds no GPU", "nvidia-smi", "the driver may be too old")
    wanting = [g.name for g in driver.gpus if archs and not _compiled_for(g.capability, archs)]
    if wanting:
        raise Missing(f"torch {version} has no kernels for {wanting[0]} (only {', '.join(archs)})", again, "it cannot use it")
    return Fact(f"CUDA {cuda}")


def _compiled_for(capability: int, archs: list[str]) -> bool:
    """Whether a list such as ["sm_80", "sm_90", "compute_90"] serves a GPU: the same generation, not newer, or PTX."""
    for arch in archs:
        kind, _, number = arch.partition("_")
        n = int(re.sub(r"\D", "", number) or 0)
        if n <= capability and (kind == "compute" or n // 10 == capability // 10):
            return True
    return False


def attention(driver: Driver) -> Fact:
    """The backends of a model with heads of 128 in bfloat16, and why not others.  `--model` says it for one."""
    if not driver.gpus:
        return Fact("C kernels, on the CPU", "torch where heads or pages are no multiples of 16: --model tells")
    capability = driver.gpus[0].capability
    return Fact(*backends(128, "bfloat16", capability, sinks=False))


def backends(head_dim: int, dtype: str, capability: int, *, sinks: bool) -> tuple[str, str, str, str]:
    """The fields of a Fact, as model/cuda/attention/choose.py chooses."""
    ours = triton_lacks(head_dim, capability)
    decode = "plain torch" if ours else "our Triton kernels"
    lacks = flashinfer_lacks(head_dim, dtype, capability, sinks=sinks, installed=has("flashinfer"))
    if lacks is None:
        return f"FlashInfer (prefill), {decode} (decode)", "", "", "ok"
    mend = install_flashinfer() if "not installed" in lacks else ""
    why = f"FlashInfer, which is faster on long prompts, is not used: {lacks}" + (f"; Triton: {ours}" if ours else "")
    return f"{decode} (prefill and decode)", why, mend, "better"


def install_flashinfer() -> str:
    """The command."""
    from minisgl.model.cuda.flashinfer.modules import INSTALL

    return INSTALL.replace("pip install", f"{shlex.join([sys.executable, '-m', 'pip'])} install")


def flashinfer(gpus: int) -> Fact:
    if not has("flashinfer"):
        if not gpus:
            return Fact("not installed", _ONLY_GPUS, install_flashinfer(), "absent")
        return Fact("not installed", "our own kernels do its work", install_flashinfer(), "better")
    from minisgl.model.cuda.flashinfer.modules import installation

    return Fact(installation().version, "" if gpus else _ONLY_GPUS)


def toolchain(gpus: int) -> Fact:
    from minisgl.errors import UserError
    from minisgl.model.cuda.flashinfer.toolchain import find_toolchain

    try:
        tools = find_toolchain()
    except UserError as e:
        found, _, mend = str(e).rpartition(": ")
        means = "FlashInfer's kernels can only come from `minisgl prebuild` elsewhere" if gpus else _ONLY_GPUS
        return Fact(found or str(e), means, mend if found else "", "missing" if gpus else "absent")
    return Fact(f"nvcc in {tools.home}, {tools.cxx}, ninja")


def dev_shm(gpus: int) -> Fact:
    total = shutil.disk_usage("/dev/shm").total
    if total >= GIB:
        return Fact(f"{total / GIB:.1f} GiB")
    means = "NCCL may run out of it with --tp above 1"
    return Fact(f"{total >> 20} MiB", means, "docker run --shm-size=1g ...", "missing" if gpus > 1 else "absent")
