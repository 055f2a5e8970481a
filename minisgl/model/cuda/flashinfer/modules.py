"""Lists the compiled FlashInfer modules that a model needs, finds them, and installs them.  No torch.

FlashInfer compiles a module with nvcc when it is first used, which takes minutes.  A shared library at
`<site-packages>/flashinfer/data/aot/<uri>/<uri>.so` is loaded at once instead: no compiler, no ninja, no lock, and no check.
Hence the note next to each library that this file installs: pip leaves files it does not know behind when it upgrades
FlashInfer, and a library of another version, or for another GPU, fails in the middle of a request.

Runs in the command `prebuild`, and in programs that start an engine, to announce what will be compiled.  compile.py compiles.
"""

from __future__ import annotations

import enum
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minisgl.config import EngineConfig, ModelSpec
from minisgl.errors import UserError
from minisgl.model.common.shard import Shard

HEAD_DIMS = (64, 128, 256)  # served by FlashInfer's kernels; our own Triton kernels serve all others
CUDA_CORE_GROUPS = (1, 2, 4, 8)  # query heads per KV head that its decode kernel supports; others use the one of prefill
FP8 = "float8_e4m3fn"
NOTE = "minisgl.json"  # next to a library: {"flashinfer": version, "machine": "x86_64", "archs": ["9.0a"]}
INSTALL = (
    "pip install --no-deps flashinfer-python==0.6.6 && "
    "pip install apache-tvm-ffi==0.1.15.post2 filelock jinja2 requests nvidia-ml-py packaging numpy tqdm ninja"
)
_SHORT = {"bfloat16": "bf16", "float16": "f16", FP8: "e4m3"}  # in FlashInfer's names


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One shared library of FlashInfer.  Group sizes, page sizes, scales and widths of windows are run-time arguments."""

    kind: str  # "fa3" | "fa2": prefill on tensor cores | "decode": one query per row, on CUDA cores
    head_dim: int
    q_dtype: str  # of queries and output: "bfloat16" | "float16"
    kv_dtype: str  # of the KV cache: q_dtype, or FP8
    archs: tuple[str, ...]  # compute capabilities it is compiled for, e.g. ("9.0a",)
    window: bool = False  # for layers with a sliding window
    softcap: bool = False  # for scores with a soft cap

    @property
    def uri(self) -> str:
        """FlashInfer's name for it (0.6.6; compile.py compares it with the installed version's)."""
        start = "batch_decode_with_kv_cache" if self.kind == "decode" else "batch_prefill_with_kv_cache"
        q, kv = _SHORT[self.q_dtype], _SHORT[self.kv_dtype]
        end = {"decode": "", "fa2": "_f16qk_False", "fa3": "_f16qk_False_sm90"}[self.kind]
        return (
            f"{start}_dtype_q_{q}_dtype_kv_{kv}_dtype_o_{q}_dtype_idx_i32_head_dim_qk_{self.head_dim}"
            f"_head_dim_vo_{self.head_dim}_posenc_0_use_swa_{self.window}_use_logits_cap_{self.softcap}{end}"
        )

    def __str__(self) -> str:
        use = "decode" if self.kind == "decode" else f"{self.kind} prefill"
        more = (("fp8 cache", self.kv_dtype == FP8), ("window", self.window), ("soft cap", self.softcap))
        return ", ".join([use, f"head size {self.head_dim}", self.q_dtype, *(text for text, has in more if has)])


class State(enum.Enum):
    """What a start would find of a module."""

    PREBUILT = "prebuilt"
    CACHED = "cached"  # compiled by an earlier start: still needs nvcc and ninja at every start, to see that it is current
    STALE = "stale"  # prebuilt, but for another FlashInfer version or GPU: must be built again
    MISSING = "missing"


def parse_arch(text: str) -> str:
    """A compute capability as FlashInfer writes it: "9.0" and "9.0a" -> "9.0a", "8.0" -> "8.0".  Raises UserError."""
    found = re.fullmatch(r"(\d{1,2})\.(\d)([af]?)", text)
    if not found:
        raise UserError(f"--arch {text}: not a compute capability; write 9.0a for an H100 or H200, 8.0 for an A100")
    major, minor, suffix = int(found[1]), int(found[2]), found[3]
    if (major, minor) < (7, 5):
        raise UserError(f"--arch {text}: FlashInfer needs a GPU of compute capability 7.5 or newer")
    if suffix and major < 9:
        raise UserError(f"--arch {text}: the suffix {suffix} exists from 9.0 on; write {major}.{minor}")
    return f"{major}.{minor}{suffix or ('a' if major >= 9 else '')}"


def needed(spec: ModelSpec, engine: EngineConfig, archs: Sequence[str], *, decode: bool = False) -> list[ModuleSpec]:
    """The modules for `spec` on GPUs of the compute capabilities `archs`, e.g. ("9.0",).  Raises UserError for a malformed one.

    `decode`: also for decode steps, which the engine asks for with --attention-backend flashinfer.  Empty where FlashInfer is
    not used: float32, other head sizes, attention sinks.
    """
    q = spec.dtype if engine.dtype == "auto" else engine.dtype
    if q not in _SHORT or spec.head_dim not in HEAD_DIMS or spec.sinks or not archs:
        return []
    kv = FP8 if engine.kv_cache_dtype == "fp8" else q
    every = tuple(sorted({parse_arch(a) for a in archs}, key=lambda arch: (int(arch.partition(".")[0]), arch)))
    hopper = tuple(a for a in every if a == "9.0a")
    modules = []
    decode |= engine.attention_backend == "flashinfer"
    groups = {shard.num_heads // shard.num_kv_heads for shard in (Shard.of(spec, r, engine.tp) for r in range(engine.tp))}
    for window in sorted({width > 0 for width in spec.windows or (0,)}):
        kind = {"window": window, "softcap": spec.attn_softcap > 0}
        if hopper:  # over a float8 cache, too, whose pages are widened
            modules.append(ModuleSpec("fa3", spec.head_dim, q, q, hopper, **kind))
        if kv != q or hopper != every or (decode and not groups <= set(CUDA_CORE_GROUPS)):
            modules.append(ModuleSpec("fa2", spec.head_dim, q, kv, every, **kind))
        if decode and groups & set(CUDA_CORE_GROUPS):
            modules.append(ModuleSpec("decode", spec.head_dim, q, kv, every, **kind))
    return modules


@dataclass(frozen=True, slots=True)
class Installation:
    """The installed FlashInfer, looked up without importing it (importing makes directories and takes seconds)."""

    version: str
    aot: Path  # directory of prebuilt modules
    cache: Path  # directory of the modules it has compiled itself, by version and compute capabilities

    def note(self, module: ModuleSpec) -> dict[str, object]:
        """The note of a library of `module` that is compiled here."""
        return {"flashinfer": self.version, "machine": platform.machine(), "archs": list(module.archs)}

    def cached(self, module: ModuleSpec) -> Path:
        """Where FlashInfer's own cache has the library, if it does."""
        archs = "_".join(a.replace(".", "") for a in module.archs)
        return self.cache / self.version / archs / "cached_ops" / module.uri / f"{module.uri}.so"

    def fits(self, module: ModuleSpec, directory: Path) -> bool:
        """Whether the library in `directory`/<uri> is for this FlashInfer and these GPUs; without a note it is trusted."""
        note, ours = read_note(directory / module.uri), self.note(module)
        if note is None:
            return True
        archs = note.get("archs")
        same = all(note.get(key) == ours[key] for key in ("flashinfer", "machine"))
        return same and isinstance(archs, list) and set(module.archs) <= set(map(str, archs))

    def reusable(self, module: ModuleSpec) -> Path | None:
        """A library of `module` on this machine that can be copied: a prebuilt one with a note that fits, or a cached one."""
        prebuilt = self.aot / module.uri / f"{module.uri}.so"
        if prebuilt.exists() and read_note(prebuilt.parent) is not None and self.fits(module, self.aot):
            return prebuilt
        return cached if (cached := self.cached(module)).exists() else None


def installation() -> Installation:
    """Find FlashInfer.  Raises UserError if it is not installed."""
    found = importlib.util.find_spec("flashinfer")
    if found is None or not found.submodule_search_locations:
        raise UserError(f"FlashInfer is not installed: {INSTALL}")
    aot = Path(next(iter(found.submodule_search_locations))) / "data" / "aot"
    if importlib.util.find_spec("flashinfer_jit_cache"):  # the project's own package of prebuilt modules takes its place
        aot = Path(importlib.import_module("flashinfer_jit_cache").get_jit_cache_dir())
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError as e:
        raise UserError(f"FlashInfer at {aot.parent.parent} has no metadata of its version: install it anew: {INSTALL}") from e
    base = os.environ.get("FLASHINFER_WORKSPACE_BASE") or os.path.expanduser("~")
    return Installation(version, aot, Path(base) / ".cache" / "flashinfer")


def read_note(directory: Path) -> dict[str, object] | None:
    """The note in the directory of a library, None if there is none; {} if it cannot be read: nothing fits it."""
    try:
        note = json.loads((directory / NOTE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def status(modules: Iterable[ModuleSpec], directory: Path | None = None) -> dict[ModuleSpec, State]:
    """The state of each module in FlashInfer's directory of prebuilt ones or in `directory`.  Raises UserError."""
    found = installation()
    directory = directory or found.aot
    states = {}
    for module in modules:
        if (directory / module.uri / f"{module.uri}.so").exists():
            states[module] = State.PREBUILT if found.fits(module, directory) else State.STALE
        else:
            states[module] = State.CACHED if found.cached(module).exists() else State.MISSING
    return states


def check_writable(directory: Path) -> None:
    """Make `directory`; UserError if that, or writing into it, is not allowed.  Before compiling for minutes, not after."""
    why = "permission denied"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK | os.X_OK):
            return
    except OSError as e:
        why = (e.strerror or str(e)).lower()
    raise UserError(
        f"cannot write compiled modules to {directory} ({why}): run `python -m minisgl prebuild` as a user who may, "
        "or write them elsewhere with --out DIR and have them installed with --from DIR"
    )


def install(library: Path, uri: str, directory: Path, note: dict[str, object] | None) -> None:
    """Copy `library` to `directory`/<uri>/<uri>.so atomically: other processes may be loading it.  Raises UserError."""
    place = directory / uri
    check_writable(place)
    partial = place / f".{os.getpid()}.partial"
    try:
        shutil.copyfile(library, partial)
        partial.replace(place / f"{uri}.so")  # the library first: a new note next to an old library would be believed
        if note is None:
            (place / NOTE).unlink(missing_ok=True)
        else:
            partial.write_text(json.dumps(note) + "\n", encoding="utf-8")
            partial.replace(place / NOTE)
    except OSError as e:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot copy {library} to {place}: {e.strerror}") from e


def install_from(source: Path) -> list[str]:
    """Install every `source`/<uri>/<uri>.so, as `prebuild --out` writes them, into FlashInfer.  Returns the names.

    All or nothing is installed: UserError if one was made for another FlashInfer or processor, or if there is none.
    """
    found = installation()
    libraries = sorted(p for p in source.glob("*/*.so") if p.stem == p.parent.name)
    if not libraries:
        raise UserError(f"--from {source}: has no <name>/<name>.so; name a directory written by prebuild --out")
    for library in libraries:
        note = read_note(library.parent)
        for key, here in (("flashinfer", found.version), ("machine", platform.machine())):
            if note is not None and note.get(key) != here:
                raise UserError(f"--from {source}: {library.stem} is for {key} {note.get(key)}, and here is {key} {here}")
    for library in libraries:
        install(library, library.stem, found.aot, read_note(library.parent))
    return [library.stem for library in libraries]
