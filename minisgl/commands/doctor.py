"""Runs `minisgl doctor`: says for every feature whether what it needs is here, and which command mends what is missing.

Standard library only, so that it also runs where nothing is installed.  Whatever a check meets becomes a row of the table.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minisgl.commands.embedded import MODEL, MODULE, install_command
from minisgl.commands.parser import Parser
from minisgl.config import gpu_count

# Module -> requirement: install_requires of setup.cfg.
PACKAGES = {
    "torch": "torch>=2.11",
    "transformers": "transformers>=5.0",
    "tokenizers": "tokenizers>=0.22",
    "numpy": "numpy>=1.26",
    "zmq": "pyzmq>=26",
    "msgpack": "msgpack>=1.0.8",
    "aiohttp": "aiohttp>=3.11,<4",
    "prometheus_client": "prometheus_client>=0.20",
    "setproctitle": "setproctitle>=1.3",
    "gguf": "gguf>=0.17",
    "safetensors": "safetensors>=0.5",
    "huggingface_hub": "huggingface_hub>=1.0",
    "jinja2": "jinja2>=3.1.6",
    "llguidance": "llguidance>=1.6,<2",
    "tqdm": "tqdm>=4.66",
    "typing_extensions": "typing_extensions>=4.5",
    "rich": "rich>=13",
}
_INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "asimddp": "NEON dot product",
    "i8mm": "NEON int8 matrices",
}
_TORCH = "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda, torch.cuda.is_available()]))"
_CONNECTIONS = 4096  # the default of --max-open-requests
_SECONDS = 120  # for importing torch from a slow disk
_GB = 1 << 30


class Missing(Exception):
    """Something is missing; `mend` is the command that mends it."""

    def __init__(self, found: str, mend: str = "") -> None:
        super().__init__(found)
        self.found, self.mend = found, mend


@dataclass(frozen=True, slots=True)
class Row:
    """One feature.  needed: without it no model can be served."""

    feature: str
    state: str  # "ok" | "missing"
    found: str
    mend: str
    needed: bool


def run(argv: list[str]) -> int:
    """Print the table.  Returns 0 if a model can be served here, else 1."""
    p = Parser(
        prog="minisgl doctor",
        description="Say what is missing here, for which feature, and how to get it.  Exit code 1 if no model can be served.",
    )
    p.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    p.add_argument("--port", type=int, default=8000, metavar="PORT", help="the port that a server would take (%(default)s)")
    args = p.parse_args(argv)
    rows = list(examine(args.port))
    blocking = [row.feature for row in rows if row.needed and row.state != "ok"]
    if args.json:
        print(json.dumps({"ok": not blocking, "checks": [asdict(row) for row in rows]}, indent=2))
        return 1 if blocking else 0
    width = max(len(row.feature) for row in rows)
    print(f"{'feature':<{width}}  state    found")
    for row in rows:
        print(f"{row.feature:<{width}}  {row.state:<7}  {row.found}")
        if row.mend:
            print(f"{'':<{width}}           mend: {row.mend}")
    print(f"a model cannot be served here: {', '.join(blocking)}" if blocking else "a model can be served here")
    return 1 if blocking else 0


def examine(port: int) -> Iterator[Row]:
    """All rows, in the order of the table."""
    torch, gpus = _Torch(), _gpus()
    checks: tuple[tuple[str, bool, Callable[[], str]], ...] = (
        ("Python", True, _python),
        ("packages", True, _packages),
        ("torch", True, torch.version),
        ("shared memory between processes", True, _memfd),
        ("sockets between processes", True, _sockets),
        ("embedded model", False, _embedded),
        ("kernels for this CPU", False, _kernels),
        ("GPU", False, lambda: _gpu(gpus)),
        ("torch for GPUs", gpus > 0, lambda: torch.cuda(gpus)),
        ("FlashInfer (GPU)", False, _flashinfer),
        ("compiling for GPUs", False, _toolchain),
        ("several GPUs: /dev/shm", False, _dev_shm),
        ("plots", False, _plots),
        ("4,096 connections", False, _open_files),
        ("disk for kernels", False, _kernel_cache),
        ("disk for models", False, _model_cache),
        (f"port {port}", False, lambda: _port(port)),
    )
    for feature, needed, check in checks:
        state, mend = "ok", ""
        try:
            found = check()
        except Missing as e:
            state, found, mend = "missing", e.found, e.mend
        except Exception as e:  # also what no check thinks of ends as a row
            state, found = "missing", f"{type(e).__name__}: {e}"
        yield Row(feature, state, " ".join(found.split())[:300], mend, needed)


def _pip(*packages: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", "install", *packages])


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# ---------------- what serving needs
def _python() -> str:
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.platform != "linux":
        raise Missing(f"{found}; minisgl runs on Linux")
    return found


def _packages() -> str:
    missing = [name for name in PACKAGES if not _has(name)]
    if missing:
        raise Missing(f"not installed: {', '.join(missing)}", _pip(*(PACKAGES[name] for name in missing)))
    return f"all {len(PACKAGES)}"


class _Torch:
    """What torch says of itself, in a process of its own: importing it may fail in any way, and takes seconds."""

    def __init__(self) -> None:
        self._answer: list[Any] | None = None

    def version(self) -> str:
        """Its version.  Raises Missing where it cannot be imported."""
        if not _has("torch"):
            raise Missing("not installed", _pip(PACKAGES["torch"]))
        code = f"import sys; sys.path[:] = {sys.path!r}; {_TORCH}"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
            raise Missing(f"cannot be imported: {last}", _pip("--force-reinstall", PACKAGES["torch"]))
        self._answer = json.loads(done.stdout.splitlines()[-1])
        return str(self._answer[0])

    def cuda(self, gpus: int) -> str:
        """The CUDA version that it is built for.  Raises Missing where it cannot use the GPUs."""
        if self._answer is None:
            raise Missing("torch does not work")
        version, cuda, usable = self._answer
        if not cuda:
            mend = f"{_pip('--force-reinstall', PACKAGES['torch'])}, or serve with --device cpu" if gpus else ""
            raise Missing(f"torch {version} is a build for CPUs" + ("" if gpus else ": enough where there is no GPU"), mend)
        if gpus and not usable:
            raise Missing(f"torch {version} for CUDA {cuda} finds no GPU: the driver may be too old", "nvidia-smi")
        return f"CUDA {cuda}"


def _memfd() -> str:
    with os.fdopen(os.memfd_create("minisgl-doctor"), "wb") as file:
        file.truncate(1 << 20)
    from minisgl.model.common.host import available_bytes

    return f"{available_bytes() / _GB:.1f} GiB of memory available"


def _sockets() -> str:
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    parent = base if base and os.access(base, os.W_OK) else None
    try:
        with tempfile.TemporaryDirectory(prefix="minisgl-", dir=parent) as folder, socket.socket(socket.AF_UNIX) as sock:
            sock.bind(f"{folder}/detokenizer")
            return str(Path(folder).parent)
    except OSError as e:
        raise Missing(f"no socket can be made in {parent or tempfile.gettempdir()}: {e}", "export XDG_RUNTIME_DIR=/tmp") from e


# ---------------- models and kernels
def _embedded() -> str:
    if not _has(MODULE):
        raise Missing(f"{MODEL} is not installed: --model has to name one", shlex.join(install_command()))
    from minisgl.model.checkpoint.resolve import embedded_model

    return os.path.basename(embedded_model())


def _kernels() -> str:
    from minisgl.model.cpu.build import NoKernels, load_kernels, processor

    try:
        load_kernels()
    except NoKernels as e:
        raise Missing(f"answers on the CPU are several times slower: {e}", "apt install gcc") from e
    have = set(processor().split())
    sets = [name for flag, name in _INSTRUCTIONS.items() if flag in have]
    return f"{os.environ.get('CC', 'cc')}, {', '.join(sets) or 'no vector instructions that they use'}"


def _gpus() -> int:
    try:
        return gpu_count()
    except Exception:  # a broken driver library
        return 0


def _gpu(gpus: int) -> str:
    if not gpus:
        raise Missing("no NVIDIA GPU is visible: models run on the CPU", "nvidia-smi, where there is one: it tests the driver")
    version = Path("/proc/driver/nvidia/version")
    driver = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", version.read_text()) if version.exists() else None
    return f"{gpus} visible" + (f", driver {driver[1]}" if driver else "")


def _flashinfer() -> str:
    from minisgl.model.cuda.flashinfer.modules import INSTALL, installation

    if not _has("flashinfer"):
        pip = shlex.join([sys.executable, "-m", "pip"])
        raise Missing("not installed: our own kernels do its work", INSTALL.replace("pip install", f"{pip} install"))
    return installation().version


def _toolchain() -> str:
    from minisgl.errors import UserError
    from minisgl.model.cuda.flashinfer.toolchain import find_toolchain

    try:
        tools = find_toolchain()
    except UserError as e:
        found, _, mend = str(e).rpartition(": ")
        raise Missing(found or str(e), mend if found else "") from e
    return f"nvcc in {tools.home}, {tools.cxx}, ninja"


def _dev_shm() -> str:
    total = shutil.disk_usage("/dev/shm").total
    if total < _GB:
        raise Missing(f"{total >> 20} MiB: NCCL may run out of it with --tp above 1", "docker run --shm-size=1g ...")
    return f"{total / _GB:.1f} GiB"


# ---------------- the rest
def _plots() -> str:
    if not _has("matplotlib"):
        raise Missing("matplotlib is not installed: no `minisgl simulate --plot`", _pip("matplotlib"))
    return "matplotlib"


def _open_files() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _CONNECTIONS + 256:
        most = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
        raise Missing(f"{soft} files may be open at a time", f"ulimit -n {most}")
    return f"{'any number of' if soft == resource.RLIM_INFINITY else soft} open files"


def _kernel_cache() -> str:
    from minisgl.model.cpu.build import cache_directory

    return _room(cache_directory(), 0.1, "XDG_CACHE_HOME")


def _model_cache() -> str:
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return _room(Path(home).expanduser(), 5.0, "HF_HOME")


def _room(folder: Path, least: float, variable: str) -> str:
    """The space in `folder`, which may not exist yet.  least: GiB; variable: what moves the folder."""
    place = next(p for p in (folder, *folder.parents) if p.exists())
    mend = f"export {variable}=/a/folder/with/space"
    if not os.access(place, os.W_OK):
        raise Missing(f"{folder} cannot be written", mend)
    free = shutil.disk_usage(place).free / _GB
    if free < least:
        raise Missing(f"{free:.1f} GiB free in {folder}", mend)
    return f"{free:.1f} GiB free in {folder}"


def _port(port: int) -> str:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as e:
            raise Missing(f"it cannot be taken ({e}); something may be listening there", "minisgl --port 0") from e
    return "free"
