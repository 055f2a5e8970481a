"""Asks the NVIDIA driver what it has, without torch, and the kernel why there is no driver."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from glob import glob

from minisgl.commands.doctor.rows import read

_ERRORS = {
    100: "it finds no device",
    101: "no valid device",
    802: "the GPUs are not initialised yet (is nvidia-fabricmanager running?)",
    803: "its library and its kernel module are of different versions: restart the machine, or the container's image is older",
    804: "this GPU does not support the forward compatibility of a container's newer library",
    999: "an unknown error (a suspended or crashed driver)",
}
_MAJOR, _MINOR = 75, 76  # attributes of cuDeviceGetAttribute


@dataclass(frozen=True, slots=True)
class Gpu:
    """One visible GPU.  capability: 90 for compute capability 9.0."""

    name: str
    capability: int
    gib: float


@dataclass(frozen=True, slots=True)
class Driver:
    """What the driver's library said.  cuda: the newest CUDA it supports, (12, 4); error: why there are no GPUs."""

    gpus: tuple[Gpu, ...] = ()
    cuda: tuple[int, int] = (0, 0)
    library: bool = False
    error: str = ""


def ask() -> Driver:
    """Load the driver's library and list the GPUs.  Never raises."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Driver()
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    cuda = version.value // 1000, version.value % 1000 // 10
    if failed := library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        return Driver((), cuda, True, _ERRORS.get(failed, f"error {failed}"))
    return Driver(tuple(_gpu(library, i) for i in range(count.value)), cuda, True)


def _gpu(library: ctypes.CDLL, index: int) -> Gpu:
    name, size, major, minor = ctypes.create_string_buffer(96), ctypes.c_size_t(0), ctypes.c_int(0), ctypes.c_int(0)
    device = ctypes.c_int(0)
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    library.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    library.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return Gpu(name.value.decode(errors="replace"), 10 * major.value + minor.value, size.value / (1 << 30))


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the operating system shows.  module: version of the driver's kernel module, "" without it."""

    on_bus: int  # NVIDIA's display devices on the PCI bus
    nodes: int  # /dev/nvidia0, ...
    module: str
    container: bool
    visible: str | None  # CUDA_VISIBLE_DEVICES


def look(root: str = "/", env: Mapping[str, str] = os.environ) -> Surroundings:
    """root: a stand-in for the root directory in tests."""
    on_bus = 0
    for device in glob(os.path.join(root, "sys/bus/pci/devices/*")):
        on_bus += read(f"{device}/vendor") == "0x10de" and read(f"{device}/class")[:4] == "0x03"
    module = read(os.path.join(root, "proc/driver/nvidia/version"))
    words = [w for w in module.split() if w[:1].isdigit() and "." in w]
    marks = (os.path.join(root, ".dockerenv"), os.path.join(root, "run/.containerenv"))
    container = any(map(os.path.exists, marks)) or "kubepods" in read(os.path.join(root, "proc/1/cgroup"))
    nodes = len(glob(os.path.join(root, "dev/nvidia[0-9]*")))
    return Surroundings(on_bus, nodes, words[0] if words else "", container, env.get("CUDA_VISIBLE_DEVICES"))
