"""The processor: its instruction sets, the kernels that use them, and the cores, threads and pages that they get."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping

from minisgl.commands.doctor.rows import GIB, Check, Fact, Missing, read

# (flag of /proc/cpuinfo, what it is called), from the fastest that the C kernels use to the slowest (csrc/simd.h).
X86 = (("avx512_vnni", "AVX-512 VNNI"), ("avx_vnni", "AVX-VNNI"), ("avx2", "AVX2"))
ARM = (("i8mm", "NEON int8 matrices"), ("asimddp", "NEON dot product"))
_OTHERS = (("avx512f", "AVX-512"), ("amx_int8", "AMX"), ("sve", "SVE"))
_UNUSED = {"AMX": "no kernel uses it", "SVE": "no kernel uses it"}


def checks(tp: int) -> Iterator[Check]:
    """The rows, in their order."""
    yield Check("processor", False, processor)
    yield Check("kernels for this CPU", False, kernels)
    yield Check("cores and threads", False, lambda: threads(tp))
    yield Check("OpenMP", False, lambda: openmp(os.environ, tp))
    yield Check("huge pages", False, huge_pages)
    yield Check("memory", False, memory)


def flags() -> set[str]:
    """The features of the first processor."""
    from minisgl.model.cpu.build import processor as features

    return set(features().split())


def path_of(have: set[str]) -> tuple[str, str]:
    """(the instruction set that the kernels take, the best ones that are not here)."""
    rows = ARM if have & {"asimd", "aarch64"} else X86
    used = next((name for flag, name in rows if flag in have and (flag != "avx2" or "fma" in have)), "")
    better = [name for _, name in rows[: next((i for i, (_, n) in enumerate(rows) if n == used), len(rows))]]
    return used, ", ".join(better[:1])


def processor() -> Fact:
    """Name and instruction sets, and what is made of them."""
    have = flags()
    found = [name for flag, name in (*X86, *ARM, *_OTHERS) if flag in have]
    model = re.search(r"^model name\s*:\s*(.+)$", read("/proc/cpuinfo"), re.M)
    used, better = path_of(have)
    means = (
        f"products run on {used}" if used else "products run in plain C, slowly: none of the sets that the kernels use is here"
    )
    if used and better:
        means += f"; {better}, which would be faster, is not in this processor"
    means += "".join(f"; {name}: {why}" for name, why in _UNUSED.items() if name in found)
    name = f"{model[1]}: " if model else ""
    return Fact(
        f"{name}{', '.join(found) or 'no vector instructions that the kernels use'}", means, state="ok" if used else "better"
    )


def kernels() -> Fact:
    """Whether the C kernels are built, for which instructions."""
    from minisgl.model.cpu.build import NoKernels, load_kernels

    try:
        load_kernels()
    except NoKernels as e:
        slow = "answers on the CPU are several times slower: float32 in torch"
        raise Missing(str(e), "apt install gcc", slow) from e
    used, _ = path_of(flags())
    return Fact(f"compiled by {os.environ.get('CC', 'cc')} for {used or 'plain C'}", "products of 4 and 8 bits, and attention")


def threads(tp: int, root: str = "/") -> Fact:
    """The cores that this process may use, and why not all; the threads that the ranks get."""
    from minisgl.model.common.host import cpu_quota, usable_cores

    every, mine, usable = os.cpu_count() or 1, len(os.sched_getaffinity(0)), usable_cores(root)
    each = max(1, usable // tp)
    found = f"{usable} of {every} cores: {tp} rank{'s' * (tp > 1)} of {each} thread{'s' * (each > 1)}"
    quota = cpu_quota(root)
    why = []
    if mine < every:
        why.append(f"the affinity of this process is {mine} cores (taskset, cpuset)")
    if quota is not None and math.ceil(quota) < mine:
        why.append(f"a control group allows {quota:g} cores")
    if tp > usable:
        means = (
            f"{tp} ranks share {usable} core{'s' * (usable > 1)}: each step waits for the slowest, and more ranks slow it down"
        )
        return Fact(found, means, f"minisgl serve --tp {usable}", "better")
    if why:
        return Fact(found, "; ".join(why), "docker run --cpus N ..., or taskset -c 0-N", "better")
    return Fact(found)


def openmp(env: Mapping[str, str], tp: int) -> Fact:
    """The variables that override what the workers would set (model/common/host.py)."""
    from minisgl.model.common.host import SPIN_COUNT, usable_cores

    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_PROC_BIND")
    given = {name: env[name] for name in names if env.get(name)}
    if not given:
        return Fact(f"the workers' own settings: threads as above, GOMP_SPINCOUNT {SPIN_COUNT}")
    wrong = []
    if (n := given.get("OMP_NUM_THREADS", "")).isdecimal() and int(n) > usable_cores():
        wrong.append(f"more threads than the {usable_cores()} cores slow every step down")
    if given.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        wrong.append(
            "PASSIVE puts threads to sleep hundreds of times a step: 20 instead of 30 tokens a second where it was measured"
        )
    if given.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        wrong.append("ACTIVE keeps cores busy that other actors need")
    if given.get("OMP_PROC_BIND", "false").lower() not in ("false", "0") and tp > 1:
        wrong.append("bound threads of several ranks meet on the same cores")
    shown = ", ".join(f"{k}={v}" for k, v in given.items())
    if wrong:
        return Fact(shown, "; ".join(wrong), f"unset {' '.join(given)}", "better")
    return Fact(shown, "the environment's, which the workers leave alone")


def huge_pages() -> Fact:
    """Whether large memory gets pages of 2 MiB by itself."""
    text = read("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", text)
    if chosen is None:
        return Fact("this kernel has no transparent ones", "weights and KV cache lie on pages of 4 KiB", state="absent")
    if chosen[1] == "always":
        return Fact("always")
    mend = "echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
    means = "weights and KV cache lie on pages of 4 KiB, whose addresses are looked up more often"
    return Fact(chosen[1], means, mend, "better")


def memory(root: str = "/") -> Fact:
    """What is left, and who limits it."""
    from minisgl.model.common.host import available_bytes

    left, everything = available_bytes(root), re.search(r"MemAvailable:\s*(\d+)", read(f"{root}proc/meminfo"))
    machine = int(everything[1]) * 1024 if everything else left
    found = f"{left / GIB:.1f} GiB available"
    means = "on a CPU the KV cache may take 0.4 of what the weights leave (--memory-fraction)"
    if left < 0.9 * machine:
        more = f"a control group allows no more; the machine has {machine / GIB:.1f}"
        return Fact(found, f"{more}; {means}", "docker run --memory 32g ...", "better")
    return Fact(found, means)
