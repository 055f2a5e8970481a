"""Finds what compiling CUDA code needs on this machine: nvcc, headers, libraries, a C++ compiler, ninja.  No torch.

Made for machines that have NVIDIA's Python packages instead of a CUDA toolkit, and for those without a driver: the library
`libcuda.so` is the driver's, and linking needs no more of it than its name.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from minisgl.errors import UserError

DEFAULT_HOME = "/usr/local/cuda"
_WHEELS = 'pip install "cuda-toolkit[nvcc,cccl,cudart,curand]==13.0.*"'  # the major version of torch's CUDA


@dataclass(frozen=True, slots=True)
class Toolchain:
    """Paths of the tools.  `includes` and `libraries` are directories, searched after the toolkit's own."""

    home: str  # the CUDA toolkit: bin/nvcc, include, lib64 or lib
    cxx: str
    ninja: str
    includes: tuple[str, ...]
    libraries: tuple[str, ...]


def find_toolchain(headers: tuple[str, ...] = ()) -> Toolchain:
    """Find every tool, and `headers`.  Raises UserError naming the first thing that is missing and how to get it."""
    home = _cuda_home()
    cxx = shutil.which(os.environ.get("CXX", "c++"))
    if cxx is None:
        name = f"CXX={os.environ['CXX']}" if "CXX" in os.environ else "c++"
        raise UserError(f"a C++ compiler is needed, and {name} was not found: install one (on Debian: apt install g++)")
    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if ninja is None:
        raise UserError("ninja, which runs the compilers, was not found: pip install ninja")
    wheels = _wheel_directories()
    includes = tuple(d for w in wheels if os.path.isdir(d := os.path.join(w, "include")))
    own = _parts(home, "include")
    for header in ("cuda_runtime.h", *headers):
        if not any(os.path.exists(os.path.join(d, header)) for d in (*own, *includes)):
            raise UserError(f"nvcc is in {home}, but the header {header} was not found: install a whole toolkit, or {_WHEELS}")
    libraries = (*_parts(home, "lib64"), *_parts(home, "lib"), *(os.path.join(w, "lib") for w in wheels))
    return Toolchain(home, cxx, ninja, includes, tuple(d for d in libraries if os.path.isdir(d)))


@contextmanager
def compiling(tools: Toolchain) -> Iterator[None]:
    """Inside, the environment of this process makes FlashInfer's build find everything.  Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="minisgl-link-") as link:
        _stub(tools.cxx, link)
        _unversioned_runtime(tools, link)
        values = {
            "CUDA_HOME": tools.home,
            "PATH": _joined(os.path.dirname(tools.ninja), os.environ.get("PATH", "")),
            "LIBRARY_PATH": _joined(link, *tools.libraries, os.environ.get("LIBRARY_PATH", "")),
            # Not CPATH, which comes before the toolkit's own directory: headers of two versions would be mixed.
            "CPLUS_INCLUDE_PATH": _joined(os.environ.get("CPLUS_INCLUDE_PATH", ""), *tools.includes),
        }
        before = dict(os.environ)
        os.environ.update(values)
        try:
            yield
        finally:
            for name in values:
                del os.environ[name]
            os.environ.update(before)


def _joined(*parts: str) -> str:
    return os.pathsep.join(p for p in parts if p)


def _parts(home: str, name: str) -> list[str]:
    """The directories `name` of a toolkit; conda and cross toolkits keep theirs by target."""
    return [os.path.join(home, name), *glob.glob(os.path.join(home, "targets", "*", name))]


def _wheel_directories() -> list[str]:
    """Directories of NVIDIA's Python packages: nvidia/cu13 (everything, CUDA 13) or nvidia/cuda_runtime, nvidia/curand, ..."""
    found = importlib.util.find_spec("nvidia")
    places = (found.submodule_search_locations or ()) if found else ()
    return sorted(d for place in places for d in glob.glob(os.path.join(place, "*")))


def _has_nvcc(home: str) -> bool:
    return os.access(os.path.join(home, "bin", "nvcc"), os.X_OK)


def _cuda_home() -> str:
    """CUDA_HOME, the home of the nvcc on PATH, DEFAULT_HOME, then NVIDIA's Python packages."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            if not _has_nvcc(home):
                raise UserError(f"{name}={home} has no bin/nvcc: set it to a CUDA toolkit, or unset it")
            return home
    nvcc = shutil.which("nvcc")
    homes = [os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))] if nvcc else []
    for home in (*homes, DEFAULT_HOME):  # an nvcc on PATH may be a script that calls the real one
        if _has_nvcc(home) and any(os.path.exists(os.path.join(d, "cuda_runtime.h")) for d in _parts(home, "include")):
            return home
    for home in _wheel_directories():
        if _has_nvcc(home):
            return home
    raise UserError(f"nvcc, the CUDA compiler, was not found: install a CUDA toolkit and set CUDA_HOME, or {_WHEELS}")


def _stub(cxx: str, link: str) -> None:
    """An empty libcuda.so with the driver's name inside."""
    command = [cxx, "-shared", "-x", "c++", os.devnull, "-Wl,-soname,libcuda.so.1", "-o", os.path.join(link, "libcuda.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the C++ compiler {cxx} cannot make a shared library: {done.stderr.strip()[-300:]}")


def _unversioned_runtime(tools: Toolchain, link: str) -> None:
    """libcudart.so, which the linker needs and NVIDIA's Python packages leave out."""
    candidates = [c for d in tools.libraries for c in sorted(glob.glob(os.path.join(d, "libcudart.so*")))]
    if not candidates:
        raise UserError(f"nvcc is in {tools.home}, but libcudart.so was not found: install a whole toolkit, or {_WHEELS}")
    os.symlink(candidates[0], os.path.join(link, "libcudart.so"))
