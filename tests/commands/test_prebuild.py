"""Modules of FlashInfer: which a model needs, where they are found and put, and the sentence for each thing that is missing.

Nothing is compiled: a directory stands in for the installed FlashInfer, and text for the libraries.
"""

from __future__ import annotations

import configparser
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import fake_spec
from tiny_models import save_llama

from minisgl.__main__ import main
from minisgl.config import EngineConfig, ModelSpec
from minisgl.errors import UserError
from minisgl.model.cuda.flashinfer import compile as compiling
from minisgl.model.cuda.flashinfer import compile as flashinfer_jit
from minisgl.model.cuda.flashinfer import modules as fm
from minisgl.model.cuda.flashinfer import toolchain
from minisgl.model.cuda.flashinfer.modules import FP8, ModuleSpec, State, needed, parse_arch

ROOT = Path(__file__).parents[2]
HOPPER = ("9.0a",)


def spec(head_dim: int = 128, dtype: str = "bfloat16") -> ModelSpec:
    return replace(fake_spec(), head_dim=head_dim, dtype=dtype)


def with_cache(kind: str) -> EngineConfig:
    """An EngineConfig with that --kv-cache-dtype, whether or not the field exists."""
    engine = EngineConfig()
    values = {name: getattr(engine, name) for name in engine.__slots__}
    return SimpleNamespace(**values | {"kv_cache_dtype": kind})  # type: ignore[return-value]


def kinds(modules: list[ModuleSpec]) -> list[str]:
    return [m.kind for m in modules]


# ---------------- what is needed
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_hopper_needs_the_fa3_kernels_alone(dim: int) -> None:
    assert needed(spec(dim), EngineConfig(), ["9.0"]) == [ModuleSpec("fa3", dim, "bfloat16", "bfloat16", HOPPER)]


@pytest.mark.parametrize(
    ("archs", "cache", "decode", "expected"),
    [
        (["8.0"], "auto", False, ["fa2"]),
        (["10.0a"], "auto", False, ["fa2"]),
        (["9.0a"], "fp8", False, ["fa3", "fa2"]),
        (["9.0a"], "fp8", True, ["fa3", "fa2", "decode"]),
        (["9.0a"], "auto", True, ["fa3", "decode"]),
        (["9.0a", "8.0"], "auto", True, ["fa3", "fa2", "decode"]),
        ([], "auto", True, []),
    ],
)
def test_the_kernels_follow_from_gpu_cache_and_decode(archs: list[str], cache: str, decode: bool, expected: list[str]) -> None:
    modules = needed(spec(), with_cache(cache), archs, decode=decode)
    assert kinds(modules) == expected
    assert {m.kv_dtype for m in modules if m.kind != "fa3"} <= {FP8 if cache == "fp8" else "bfloat16"}
    assert {m.kv_dtype for m in modules if m.kind == "fa3"} <= {"bfloat16"}  # which reads a float8 cache widened


def test_windows_and_soft_caps_are_modules_of_their_own() -> None:
    model = replace(spec(), windows=(0, 8), attn_softcap=50.0)
    modules = needed(model, EngineConfig(), ["9.0"])
    assert [(m.kind, m.window, m.softcap) for m in modules] == [("fa3", False, True), ("fa3", True, True)]
    assert "use_swa_True_use_logits_cap_True_" in modules[1].uri
    assert str(modules[1]).endswith("window, soft cap")
    assert not needed(spec(), EngineConfig(), ["9.0"])[0].window


def test_each_module_names_the_gpus_it_is_for() -> None:
    fa3, fa2, decode = needed(spec(), EngineConfig(), ["10.0", "9.0", "8.0"], decode=True)
    assert fa3.archs == HOPPER
    assert fa2.archs == decode.archs == ("8.0", "9.0a", "10.0a")


@pytest.mark.parametrize(
    ("model", "dtype"), [(spec(80), "auto"), (spec(16), "auto"), (spec(dtype="float32"), "auto"), (spec(), "float32")]
)
def test_float32_and_other_head_sizes_need_nothing(model: ModelSpec, dtype: str) -> None:
    assert needed(model, EngineConfig(dtype=dtype), ["9.0a"], decode=True) == []


def test_the_engines_dtype_wins_over_the_checkpoints() -> None:
    (module,) = needed(spec(dtype="float32"), EngineConfig(dtype="float16"), ["8.6"])
    assert (module.q_dtype, module.kv_dtype) == ("float16", "float16")


def test_modules_have_the_names_that_flashinfer_gives_them() -> None:
    end = "dtype_o_bf16_dtype_idx_i32_head_dim_qk_128_head_dim_vo_128_posenc_0_use_swa_False_use_logits_cap_False"
    prefill, decode = "batch_prefill_with_kv_cache_dtype_q_bf16_dtype_kv_", "batch_decode_with_kv_cache_dtype_q_bf16_dtype_kv_"
    bf16 = ("bfloat16", "bfloat16", HOPPER)
    assert ModuleSpec("fa3", 128, *bf16).uri == f"{prefill}bf16_{end}_f16qk_False_sm90"
    assert ModuleSpec("fa2", 128, *bf16).uri == f"{prefill}bf16_{end}_f16qk_False"
    assert ModuleSpec("fa2", 128, "bfloat16", FP8, HOPPER).uri == f"{prefill}e4m3_{end}_f16qk_False"
    assert ModuleSpec("decode", 128, *bf16).uri == f"{decode}bf16_{end}"


@pytest.mark.parametrize(
    ("text", "arch"),
    [("9.0", "9.0a"), ("9.0a", "9.0a"), ("8.0", "8.0"), ("7.5", "7.5"), ("10.0f", "10.0f"), ("12.1", "12.1a")],
)
def test_a_compute_capability_is_written_as_flashinfer_writes_it(text: str, arch: str) -> None:
    assert parse_arch(text) == arch


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("sm90", "not a compute capability"),
        ("", "not a"),
        ("7.0", "7.5 or newer"),
        ("8.0a", r"write 8\.0"),
        ("9.0 8.0", "not a"),
    ],
)
def test_a_bad_compute_capability_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=f"--arch {text}: .*{complaint}"):
        parse_arch(text)


def test_the_announcement_names_modules_time_and_the_way_out() -> None:
    modules = [*needed(spec(), EngineConfig(), ["9.0"], decode=True), *needed(spec(), with_cache("fp8"), ["8.0"])]
    assert compiling.announce([]) == ""
    assert compiling.announce(modules[:1]).startswith(
        "FlashInfer has to compile 1 module first (fa3 prefill, head size 128, bfloat16):"
    )
    line = compiling.announce(modules)
    for words in (
        "compile 3 modules",
        "decode, head size 128, bfloat16;",
        "fa2 prefill, head size 128, bfloat16, fp8 cache)",
        "about a minute each on 16 cores",
        "`python -m minisgl prebuild`",
    ):
        assert words in line
    assert "\n" not in line


# ---------------- where the libraries are
MODULES = needed(spec(), EngineConfig(), ["9.0"], decode=True)
FA3, DECODE = MODULES


@pytest.fixture
def flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for FlashInfer 0.6.6; returns its directory of prebuilt modules."""
    site = tmp_path / "site"
    (site / "flashinfer").mkdir(parents=True)
    (site / "flashinfer/__init__.py").write_text("raise RuntimeError('imported')\n")
    set_version(site, "0.6.6")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path / "home"))
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "")  # the command sets it; this restores it
    return site / "flashinfer/data/aot"


def set_version(site: Path, version: str) -> None:
    info = site / "flashinfer_python-1.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flashinfer-python\nVersion: {version}\n")


def library(directory: Path, module: ModuleSpec) -> Path:
    return directory / module.uri / f"{module.uri}.so"


def put(path: Path, text: str = "code") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[ModuleSpec]:
    """Stands in for the compiler; records what it was asked for."""
    asked: list[ModuleSpec] = []

    def compile_module(module: ModuleSpec) -> Path:
        asked.append(module)
        return put(tmp_path / "work" / f"{module.uri}.so", f"compiled {module.kind}")

    monkeypatch.setattr(flashinfer_jit, "compile_module", compile_module)
    return asked


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of which only config.json is read: bfloat16, head size 128."""
    path = tmp_path_factory.mktemp("model")
    save_llama(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"head_dim": 128, "dtype": "bfloat16"}))
    return str(path)


def test_a_module_is_prebuilt_cached_or_missing(flashinfer: Path, tmp_path: Path) -> None:
    assert set(fm.status(MODULES).values()) == {State.MISSING}
    put(library(tmp_path / "home/.cache/flashinfer/0.6.6/90a/cached_ops", FA3))
    put(library(flashinfer, DECODE))
    assert fm.status(MODULES) == {FA3: State.CACHED, DECODE: State.PREBUILT}


def test_a_module_that_an_upgrade_of_flashinfer_left_behind_is_stale(flashinfer: Path, compiler: list[ModuleSpec]) -> None:
    compiling.build(DECODE)
    assert fm.status([DECODE]) == {DECODE: State.PREBUILT}
    set_version(flashinfer.parents[2], "0.7.2")
    assert fm.status([DECODE]) == {DECODE: State.STALE}
    compiling.build(DECODE)
    assert fm.status([DECODE]) == {DECODE: State.PREBUILT}


def test_a_module_for_other_gpus_is_stale(flashinfer: Path, compiler: list[ModuleSpec]) -> None:
    both = replace(DECODE, archs=("8.0", "9.0a"))
    compiling.build(DECODE)
    assert fm.status([DECODE, both]) == {DECODE: State.PREBUILT, both: State.STALE}
    compiling.build(both)
    assert fm.status([DECODE, both]) == {DECODE: State.PREBUILT, both: State.PREBUILT}


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"flashinfer": "0.6.6", "machine": 3, "archs": 7}', "\0"])
def test_a_note_that_makes_no_sense_is_not_believed(flashinfer: Path, note: str) -> None:
    put(library(flashinfer, DECODE)).with_name(fm.NOTE).write_text(note)
    assert fm.status([DECODE]) == {DECODE: State.STALE}


def test_building_says_each_module_before_and_after(flashinfer: Path, compiler: list[ModuleSpec]) -> None:
    said: list[str] = []
    compiling.build_all(MODULES, said.append)
    assert compiler == MODULES
    first = "compiling 1 of 2: fa3 prefill, head size 128, bfloat16 ..."
    second = "compiling 2 of 2: decode, head size 128, bfloat16 ..."
    assert said == [first, f"{first} 0 s", second, f"{second} 0 s"]
    assert library(flashinfer, FA3).read_text() == "compiled fa3"
    assert sorted(p.name for p in library(flashinfer, FA3).parent.iterdir()) == [f"{FA3.uri}.so", fm.NOTE]


def test_a_directory_that_cannot_be_written_is_refused_before_anything_is_compiled(
    flashinfer: Path, compiler: list[ModuleSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(flashinfer) not in str(path) and access(path, mode))
    with pytest.raises(UserError, match=rf"cannot write compiled modules to {flashinfer}.* \(permission denied\).*--out DIR"):
        compiling.build(DECODE)
    put(flashinfer.parent / "file")
    with pytest.raises(UserError, match="not a directory"):
        compiling.build(DECODE, flashinfer.parent / "file")
    assert compiler == []


def test_without_flashinfer_the_sentence_says_how_to_get_it(capsys: pytest.CaptureFixture[str], model: str) -> None:
    if importlib.util.find_spec("flashinfer"):
        pytest.skip("FlashInfer is installed")
    assert main(["prebuild", "--arch", "9.0a", "--model", model]) == 2
    error = capsys.readouterr().err
    assert error.startswith("minisgl: FlashInfer is not installed: pip install --no-deps flashinfer-python==")
    assert "apache-tvm-ffi" in error


def test_the_install_sentence_has_the_pins_and_the_packages_of_the_launcher() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for pinned in ("flashinfer-python==", "apache-tvm-ffi=="):
        (pin,) = [p for p in pins if p.startswith(pinned)]
        assert f" {pin} " in fm.INSTALL
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lean = re.split(r"[>=<,\s]+", setup["options.extras_require"]["gpu-lean"])
    said = [word.partition("==")[0] for word in fm.INSTALL.partition("&& pip install ")[2].split()]
    assert set(said) <= set(lean)
    assert len(said) == 9


# ---------------- the command
def test_the_list_shows_every_module_and_compiles_nothing(
    flashinfer: Path, compiler: list[ModuleSpec], model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(library(flashinfer, DECODE))
    assert main(["prebuild", "--list", "--decode", "--arch", "9.0", "--model", model]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.endswith(f" on 9.0a, FlashInfer 0.6.6, {flashinfer}:")
    assert rows[0].split() == ["fa3", "prefill,", "head", "size", "128,", "bfloat16", "missing", FA3.uri]
    assert rows[1].split() == ["decode,", "head", "size", "128,", "bfloat16", "prebuilt", DECODE.uri]
    assert compiler == []


def test_the_list_of_a_model_that_needs_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prebuild", "--list", "--arch", "9.0", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == "SmolLM2-135M-Instruct (float32, head size 64) needs no FlashInfer module\n"


def test_modules_travel_from_one_machine_to_another(
    flashinfer: Path, compiler: list[ModuleSpec], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["prebuild", "--decode", "--arch", "9.0a", "--model", model, "--out", str(out)]
    assert main(command) == 0
    assert compiler == MODULES
    assert not flashinfer.exists()
    assert main(command) == 0
    assert compiler == MODULES, "what is in DIR was compiled again"
    capsys.readouterr()
    assert main(["prebuild", "--from", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == sorted(f"installed {m.uri}" for m in MODULES)
    assert [library(flashinfer, m).read_text() for m in MODULES] == ["compiled fa3", "compiled decode"]
    assert fm.status(MODULES) == dict.fromkeys(MODULES, State.PREBUILT)


def test_only_what_is_missing_is_compiled_and_what_is_cached_is_copied(
    flashinfer: Path, compiler: list[ModuleSpec], model: str, tmp_path: Path
) -> None:
    put(library(tmp_path / "home/.cache/flashinfer/0.6.6/90a/cached_ops", FA3), "cached")
    assert main(["prebuild", "--decode", "--arch", "9.0a", "--model", model]) == 0
    assert compiler == [DECODE]
    assert library(flashinfer, FA3).read_text() == "cached"
    assert os.environ["FLASHINFER_CUDA_ARCH_LIST"] == "9.0a"
    assert main(["prebuild", "--decode", "--arch", "9.0a", "--model", model, "--out", str(tmp_path / "out")]) == 0
    assert compiler == [DECODE], "prebuilt modules can be copied to --out"


def test_modules_of_another_flashinfer_or_processor_are_not_installed(flashinfer: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    note = {"flashinfer": "0.6.6", "machine": platform.machine(), "archs": ["9.0a"]}
    put(library(source, DECODE)).with_name(fm.NOTE).write_text(json.dumps(note))
    bad = put(library(source, FA3)).with_name(fm.NOTE)
    bad.write_text(json.dumps(note | {"flashinfer": "0.5.3"}))
    with pytest.raises(UserError, match=r"--from .*_sm90 is for flashinfer 0\.5\.3, and here is flashinfer 0\.6\.6"):
        fm.install_from(source)
    bad.write_text(json.dumps(note | {"machine": "vax"}))
    with pytest.raises(UserError, match="is for machine vax, and here is machine "):
        fm.install_from(source)
    assert not flashinfer.exists()


def test_an_empty_directory_is_refused(flashinfer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "x/y.so")
    assert main(["prebuild", "--from", str(tmp_path)]) == 2
    assert "--from" in capsys.readouterr().err


def test_without_a_gpu_the_kind_must_be_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(flashinfer_jit.torch.cuda, "is_available", lambda: False)
    assert main(["prebuild"]) == 2
    assert capsys.readouterr().err.startswith("minisgl: no GPU is visible here: name the kind to compile for with --arch")


def test_the_gpus_that_torch_sees_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = flashinfer_jit.torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 3)
    monkeypatch.setattr(cuda, "get_device_capability", lambda i: [(9, 0), (8, 0), (9, 0)][i])
    assert flashinfer_jit.visible_archs() == ("8.0", "9.0a")


def test_the_help_is_instant() -> None:
    code = (
        "import sys\nfrom minisgl.__main__ import main\n"
        "try: main(['prebuild', '--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'aiohttp', 'tokenizers', 'flashinfer'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: minisgl prebuild" in done.stdout


# ---------------- the tools
def tool(path: Path) -> Path:
    put(path, "#!/bin/sh\n").chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing but a toolkit, c++ and ninja in `tmp_path`/bin; no Python packages of NVIDIA's."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name in ("c++", "ninja"):
        tool(tmp_path / "bin" / name)
    tool(tmp_path / "cuda/bin/nvcc")
    for name in ("include/cuda_runtime.h", "include/curand_kernel.h", "lib64/libcudart.so"):
        put(tmp_path / "cuda" / name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(toolchain, "DEFAULT_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(toolchain, "_wheel_directories", list)
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path / "scripts"))
    return tmp_path


FA3_HEADERS = ("curand_kernel.h",)


def test_a_whole_toolkit_is_found(machine: Path) -> None:
    found = toolchain.find_toolchain(FA3_HEADERS)
    assert (found.home, found.cxx, found.ninja) == (str(machine / "cuda"), str(machine / "bin/c++"), str(machine / "bin/ninja"))


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("cuda/bin/nvcc", r"nvcc, the CUDA compiler, was not found: install a CUDA toolkit and set CUDA_HOME, or pip install"),
        ("bin/c++", r"a C\+\+ compiler is needed, and c\+\+ was not found: install one \(on Debian: apt install g\+\+\)"),
        ("bin/ninja", "ninja, which runs the compilers, was not found: pip install ninja"),
        ("cuda/include/curand_kernel.h", r"the header curand_kernel\.h was not found: .* pip install"),
    ],
)
def test_each_missing_tool_has_its_sentence(machine: Path, missing: str, sentence: str) -> None:
    (machine / missing).unlink()
    with pytest.raises(UserError, match=sentence):
        toolchain.find_toolchain(FA3_HEADERS)


def test_variables_that_name_no_tool_are_named(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "clang-99")
    with pytest.raises(UserError, match=r"CXX=clang-99 was not found"):
        toolchain.find_toolchain()
    monkeypatch.setenv("CUDA_HOME", str(machine / "nowhere"))
    with pytest.raises(UserError, match=r"CUDA_HOME=.*nowhere has no bin/nvcc"):
        toolchain.find_toolchain()


def test_an_nvcc_on_the_path_without_headers_is_a_script_and_not_a_toolkit(machine: Path) -> None:
    tool(machine / "bin/nvcc")
    assert toolchain.find_toolchain().home == str(machine / "cuda")


def test_a_ninja_beside_the_interpreter_is_found(machine: Path) -> None:
    (machine / "bin/ninja").unlink()
    tool(machine / "scripts/ninja")
    assert toolchain.find_toolchain().ninja == str(machine / "scripts/ninja")


def test_nvidias_python_packages_are_a_toolkit(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "cuda/bin/nvcc").unlink()
    wheels = machine / "site/nvidia/cu13"
    tool(wheels / "bin/nvcc")
    put(wheels / "include/cuda_runtime.h")
    put(wheels / "lib/libcudart.so.13", "runtime")
    monkeypatch.setattr(toolchain, "_wheel_directories", lambda: [str(wheels)])
    tools = toolchain.find_toolchain()
    assert (tools.home, tools.includes) == (str(wheels), (str(wheels / "include"),))
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/mine")
    with toolchain.compiling(tools):
        link, *rest = os.environ["LIBRARY_PATH"].split(":")
        assert Path(link, "libcudart.so").read_text() == "runtime"
        assert str(wheels / "lib") in rest
        assert os.environ["CUDA_HOME"] == str(wheels)
        assert os.environ["CPLUS_INCLUDE_PATH"] == f"/mine:{wheels / 'include'}"
    assert "CUDA_HOME" not in os.environ
    assert os.environ["CPLUS_INCLUDE_PATH"] == "/mine"
    (wheels / "lib/libcudart.so.13").unlink()
    with pytest.raises(UserError, match=r"libcudart\.so was not found"), toolchain.compiling(tools):
        pass


def test_a_failed_build_is_told_by_its_first_errors() -> None:
    output = "Ninja build failed. Ninja output:\n[1/3] nvcc\n\nx.cu:1: fatal error: curand.h: No such file\n1 error\nend"
    assert flashinfer_jit._reason(output) == "x.cu:1: fatal error: curand.h: No such file | 1 error"
    assert flashinfer_jit._reason("a\nb\nc\nd\n") == "b | c | d"


# ---------------- what the launcher installs
@pytest.mark.parametrize("gpu", [True, False])
def test_the_launcher_installs_flashinfer_without_its_dependencies_where_there_is_a_gpu(tmp_path: Path, gpu: bool) -> None:
    log, python = tmp_path / "log", tmp_path / ".venv/bin/python"
    for name in ("setup.cfg", "constraints.txt", "scripts/env.sh", "scripts/launch.sh"):
        put(tmp_path / name, (ROOT / name).read_text())
    tool(python).write_text(
        f'#!/bin/sh\ncase "$1$2" in\n  -/*) exec {sys.executable} "$@" ;;\n'
        f'  -c*minisgl*) shift 3; echo minisgl "$@" >>{log} ;;\n  -c*) ;;\n  *) echo "$@" >>{log} ;;\nesac\n'
    )
    smi = tool(tmp_path / "fake/nvidia-smi")
    smi.write_text(f"#!/bin/sh\n{'echo GPU 0: NVIDIA H200' if gpu else 'exit 9'}\n")
    path = f"{smi.parent}:{os.environ['PATH']}"
    env = {k: v for k, v in os.environ.items() if k != "MINISGL_PIP_ARGS"} | {"PATH": path}
    for _ in range(2):  # the second start installs nothing
        subprocess.run(["bash", str(tmp_path / "scripts/launch.sh"), "--port", "1"], env=env, capture_output=True, check=True)
    calls = log.read_text().splitlines()
    assert calls[-2:] == ["minisgl --port 1"] * 2
    lean = [c for c in calls if c.endswith(f"--no-deps -c {tmp_path}/constraints.txt flashinfer-python")]
    assert len(lean) == gpu
    wanted = (tmp_path / ".venv/requirements.txt").read_text().split()
    assert ("nvidia-ml-py" in wanted) == gpu
    assert not any("flashinfer" in w for w in wanted)
