"""`minisgl fit`: what it predicts is what an engine takes, and every remedy that it names makes the load fit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import needs_compiler

from minisgl.__main__ import main
from minisgl.actors.spawn import make_runner
from minisgl.commands.fit.bounds import Bounds
from minisgl.commands.fit.estimate import Load, estimate
from minisgl.commands.fit.hardware import GPUS
from minisgl.config import Config, EngineConfig
from minisgl.errors import UserError
from minisgl.model.checkpoint.presets import SHAPES, random_shape
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.common import host
from minisgl.model.cpu import runner as cpu_runner

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


def fit(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["fit", *flags, "--json"])
    said = capsys.readouterr()
    assert not said.err, said.err
    return code, json.loads(said.out)


@needs_compiler
def test_the_engine_on_a_cpu_starts_with_the_ledger_that_was_predicted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(host, "available_bytes", lambda: 2 * GIB)
    assert main(["fit", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    weights = found["bytes"]["weights_total"]
    monkeypatch.setattr(cpu_runner, "available_bytes", lambda: 2 * GIB - weights)
    caplog.set_level("INFO")
    runner = make_runner(Config(resolve(None), EngineConfig(threads=1)), 0, str(tmp_path))
    pages = runner.max_pages()
    runner.allocate(pages)
    runner.close()
    line = caplog.text
    said = re.search(r"CPU: ([\d.]+) GiB weights, then ([\d.]+) GiB .* may take ([\d.]+) \((\d+) tokens\)", line)
    assert said is not None, line
    assert 16 * pages == int(said[4]) == found["kv_tokens"]
    assert float(said[1]) == pytest.approx(weights / GIB, rel=0.25, abs=0.02)  # measured, with what loading left behind
    assert float(said[3]) == pytest.approx(found["bytes"]["kv_cache"] / GIB, abs=0.01)


CASES = st.fixed_dictionaries(
    {
        "model": st.sampled_from(sorted(SHAPES)),
        "gpu": st.sampled_from(sorted(GPUS)),
        "users": st.sampled_from([1, 7, 64, 300]),
        "context": st.sampled_from([512, 5000, 40_960]),
        "gpus": st.sampled_from([1, 2]),
        "fp8": st.booleans(),
    }
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(CASES)
def test_every_remedy_makes_the_load_fit(case: dict[str, Any]) -> None:
    flags = [f"random:{case['model']}", "--gpu", case["gpu"], "--gpus", str(case["gpus"])]
    if case["fp8"] and GPUS[case["gpu"]].capability >= 89:
        flags += ["--kv-cache-dtype", "fp8"]
    flags += ["--users", str(case["users"]), "--context", str(case["context"])]
    code, found = _run(flags)
    assert (code == 0) == found["fits"]
    assert found["fits"] == (not found["why_not"])
    for remedy in found["remedies"]:
        better, with_it = _run([*flags, *remedy["flags"].split()])
        assert better == 0, remedy
        assert with_it["kv_tokens"] == remedy["kv_tokens"]
        assert with_it["bytes"]["weights_total"] == remedy["weights"]
    most = found["max_running"][str(case["context"])]
    for users in (most, most + 1):
        if users:
            assert _run([*flags, "--users", str(users)])[0] == (users > most)


def _run(flags: list[str]) -> tuple[int, dict[str, Any]]:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["fit", *flags, "--json"])
    return code, json.loads(out.getvalue())


def test_bounds_are_those_of_a_plain_calculation() -> None:
    spec = random_shape("qwen3-14b")
    found = estimate(spec, EngineConfig(device="cuda", max_running=256, step_tokens=8192), GPUS["h200"])
    bounds = Bounds(found)
    layer = 5120 * (40 + 2 * 8) * 128 + 40 * 128 * 5120 + 3 * 5120 * 17408
    work = bounds.decode(8, 1000)
    kv = 40 * 2 * 8 * 128 * 2
    assert work.bytes == 2 * (40 * layer + 5120 * 151_936) + 8 * 1000 * kv
    assert work.flops == 2 * 8 * (40 * layer + 5120 * 151_936) + 8 * 4 * 1000 * 40 * 128 * 40
    assert bounds.seconds(work) == work.bytes / 4.8e12
    prompt = bounds.prefill(20_000)
    pairs = sum(i + 1 for i in range(20_000))
    assert prompt.flops == 2 * 20_000 * 40 * layer + 2 * 5120 * 151_936 + 4 * pairs * 40 * 128 * 40
    assert prompt.bytes == 3 * 2 * 40 * layer + 2 * 5120 * 151_936 + 20_000 * kv
    assert bounds.seconds(prompt) == prompt.flops / 989e12


def test_experts_in_float8_take_a_byte_for_each_number_and_a_scale_for_each_output() -> None:
    engine = EngineConfig(device="cuda", quantization="fp8")
    found = estimate(random_shape("qwen3-30b-a3b"), engine, GPUS["h100"])
    inner, hidden, router = 768, 2048, 2 * 2048
    each = 2 * inner * (hidden + 4) + hidden * (inner + 4) + router
    assert found.weights["experts"] == 48 * 128 * each


def test_a_window_and_experts_bound_what_a_step_reads(tmp_path: Path) -> None:
    from dataclasses import replace

    engine = EngineConfig(device="cuda", max_running=8, step_tokens=256)
    dense = random_shape("llama-3.2-1b")
    narrow = replace(dense, windows=(100, 0) * 8)
    far, near = (Bounds(estimate(s, engine, GPUS["h100"])) for s in (dense, narrow))
    token = 2 * 8 * 64 * 2
    assert far.decode(1, 1000).bytes - near.decode(1, 1000).bytes == 8 * 900 * token
    naive = sum(min(i + 1, 100) + i + 1 for i in range(1000)) * 8
    head = 2 * dense.hidden_size * dense.vocab_size
    assert near.prefill(1000).flops - far.prefill(1000).flops == 4 * 32 * 64 * (naive - 16 * 1000 * 1001 // 2)
    assert head > 0
    moe = Bounds(estimate(random_shape("qwen3-30b-a3b"), engine, GPUS["h100"]))
    one, many = moe.decode(1, 1).bytes, moe.decode(500, 1).bytes
    experts = 48 * 128 * 3 * 768 * 2048 * 2
    assert many - one - 499 * 48 * 2 * 4 * 128 * 2 == pytest.approx(experts * (1 - 8 / 128), rel=1e-6)


def test_a_rank_has_its_share_and_the_ledger_is_of_the_one_with_the_most(capsys: pytest.CaptureFixture[str]) -> None:
    one, two, three = (fit(capsys, "random:qwen3-8b", "--gpu", "h100", "--gpus", n)[1]["bytes"] for n in "123")
    assert two["weights_total"] == pytest.approx(one["weights_total"] / 2, rel=0.01)
    assert two["kv_token"] == one["kv_token"] // 2
    assert three["kv_token"] == one["kv_token"] * 3 // 8  # 8 heads of keys and values are 3 + 3 + 2


def test_what_the_engine_would_refuse_is_refused_in_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, named in (
        (["random:qwen3-8b", "--gpu", "a100", "--quantization", "fp8"], "compute capability 8.0"),
        (["random:qwen3-8b", "--gpu", "b9000"], "--gpu must be one of h200"),
        (["random:qwen3-8b", "--gpu", "h100", "--gpus", "33"], "--tp 33"),
        (["random:qwen3-8b", "--context", "99999999"], "--context 99999999: qwen3-8b has a context of 40960"),
        (["random:qwen3-8b", "--users", "0"], "--users must be between 1"),
        (["random:qwen3-8b", "--gpu-memory", "nan"], "--gpu-memory must be between 1"),
        (["random:qwen3-8b", "--gpu", "h100", "--step-tokens", "100"], "--step-tokens (100) must be larger"),
        (["fake"], "--model fake"),
        (["a", "--model", "b"], "two models"),
        (["/not/there"], "no such file"),
    ):
        assert main(["fit", *flags]) == 2
        assert named in capsys.readouterr().err


def test_the_text_says_clearly_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "random:qwen3-32b", "--gpu", "h100", "--users", "16", "--context", "32768"]) == 1
    said = capsys.readouterr().out
    assert "IT DOES NOT FIT" in said
    assert re.search(r"--gpus 4 +16 x 32768 tokens take 32\.00 GiB of a cache of \d+ tokens, weights 15\.\d+", said)
    assert "NVIDIA H100 data sheet" in said
    assert main(["fit", "random:qwen3-0.6b", "--gpu-memory", "20"]) == 0
    said = capsys.readouterr().out
    assert "it fits" in said
    assert "no rates are known" in said
    assert main(["fit", "random:qwen3-0.6b", "--gpu-memory", "20", "--bandwidth", "1000"]) == 0
    assert "a decode step of 1 at" in capsys.readouterr().out


def test_it_needs_neither_weights_nor_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 300,
                "max_position_embeddings": 512,
                "rms_norm_eps": 1e-5,
                "torch_dtype": "bfloat16",
            }
        )
    )
    code = "import sys; sys.modules['torch'] = None; from minisgl.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "fit", str(tmp_path), "--gpu", "l4", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["bytes"]["weights"]["attention"] == 2 * 2 * 64 * 64 * 3


def test_a_load_holds_only_whole_pages() -> None:
    found = estimate(random_shape("qwen3-0.6b"), EngineConfig(device="cuda", max_running=9, step_tokens=64), GPUS["l4"])
    assert found.pages_of(Load(3, 17)) == 6
    with pytest.raises(UserError):
        estimate(random_shape("qwen3-0.6b"), EngineConfig(device="cuda", quantization="fp8", dtype="float16"), GPUS["l4"])
