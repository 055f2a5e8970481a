"""`minisgl selfcheck` on a small checkpoint: it agrees with transformers, and names the first layer that a bug spoils."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_gguf import write_gguf
from test_quantized import FP8, channel_fp8
from test_quantized import quantise as save_quantised
from tiny_models import needs_compiler, save_architecture, save_byte_tokenizer, save_llama

from minisgl.__main__ import main
from minisgl.config import Config, EngineConfig
from minisgl.errors import UserError
from minisgl.model.checkpoint import loader
from minisgl.model.checkpoint.loader import open_weights
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.common.gguf_blocks import Groups
from minisgl.model.common.interfaces import Rotation
from minisgl.model.common.memory import BLOCK_BYTES
from minisgl.model.cpu import quantized_layers
from minisgl.model.cpu.attention import TorchAttention
from minisgl.model.cpu.attention_c import KernelAttention
from minisgl.model.cpu.kernels import Kernels
from minisgl.model.cpu.packing import quantise
from minisgl.selfcheck import command, compare, reference
from minisgl.selfcheck.job import work, write_job

TOKENS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("selfcheck") / "tiny"
    save_llama(path, layers=3)
    save_byte_tokenizer(path)
    return path


def in_process(kind: str, arguments: list[list[str]]) -> None:
    for a in arguments:
        work(kind, *a)


def checked(
    path: Path | str, monkeypatch, capfd, *, answers: Any = None, jobs: Any = in_process, **engine: Any
) -> tuple[int, str]:
    """Exit code and table, without the engine's answers, which need processes."""
    monkeypatch.setattr(command, "_answers", lambda *_: answers or {})
    config = Config(resolve(str(path)), EngineConfig(**{"quantization": "none", "threads": 1, "page_size": 4, **engine}))
    code = command.check(config, TOKENS, jobs)
    return code, capfd.readouterr().out


def test_everything_agrees_on_two_ranks_and_in_the_whole_engine(checkpoint, monkeypatch, capfd):
    """Ranks and engine are real processes; what needs no company is done here, which saves the imports."""
    real = command._processes
    monkeypatch.setattr(command, "_processes", lambda kind, a: (in_process if len(a) == 1 else real)(kind, a))
    assert (
        main(
            [
                "selfcheck",
                "--model",
                str(checkpoint),
                "--tp",
                "2",
                "--tokens",
                "4",
                "--kv-tokens",
                "2048",
                "--threads",
                "2",
                "--quantization",
                "none",
            ]
        )
        == 0
    )
    out = capfd.readouterr().out
    assert "selfcheck: everything agrees" in out
    header, *rows = (line.split() for line in out.splitlines()[1:7])
    assert header == ["transformers", "decode", "cached", "tp", "2", "limits"]
    assert [" ".join(row[:-5]) for row in rows] == ["embedding", "layer 0", "layer 1", "layer 2", "logits"]
    assert all(float(n) < 2e-5 for row in rows for cell in row[-5:-1] for n in cell.split("/"))
    assert rows[0][-5:-1] == ["0.0e+00/0.0e+00"] * 4  # no arithmetic yet
    assert all(float(n) > 0 for n in rows[4][-5].split("/"))  # but there: the numbers are measured
    assert out.count("12 of 12 are those of transformers") == 2
    apart = r"\(0\.000 % apart, of which 0\.000 % may be chance\)"
    assert re.search(rf"perplexity of a text of 252 tokens: [\d.]+, transformers [\d.]+ {apart}", out)


def test_other_dtypes_are_judged_by_what_they_cost_transformers(checkpoint, monkeypatch, capfd):
    code, out = checked(checkpoint, monkeypatch, capfd, dtype="bfloat16")
    assert code == 0, out
    typical, largest = map(float, out.splitlines()[6].split()[-1].split("/"))
    assert 1e-3 < typical < largest < 0.5


def test_gguf_files_and_quantised_checkpoints_have_a_reference(checkpoint, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "fp8"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())

    def layer(w: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = w.abs().amax(1, keepdim=True) / 448
        return {"weight": (w / scale).to(FP8), "weight_scale": scale}

    save_quantised(folder, load_file(checkpoint / "model.safetensors"), channel_fp8()[0], layer)
    code, out = checked(folder, monkeypatch, capfd)
    assert code == 0, out
    from transformers import AutoModelForCausalLM

    gguf = write_gguf(tmp_path / "m.gguf", AutoModelForCausalLM.from_pretrained(checkpoint))
    monkeypatch.setattr(command, "prompts", lambda *_: [list(range(9, 60)), [5, 6, 7]])
    code, out = checked(gguf, monkeypatch, capfd)
    assert code == 0, out


def test_the_reference_parses_a_gguf_file_once_and_takes_the_cores_that_a_quota_leaves(checkpoint, tmp_path, monkeypatch):
    import gguf
    from transformers import AutoModelForCausalLM

    path = write_gguf(tmp_path / "m.gguf", AutoModelForCausalLM.from_pretrained(checkpoint))
    parsed, threads, reader = [], [], gguf.GGUFReader

    def counting(file: str) -> Any:
        parsed.append(file)
        return reader(file)

    config = Config(resolve(str(path)), EngineConfig(quantization="none", page_size=4, kv_tokens=64, max_context=16))
    write_job(tmp_path, config, [[1, 2, 3]], 2)
    in_process("probe", [[str(tmp_path), "0"]])
    monkeypatch.setattr(gguf, "GGUFReader", counting)
    monkeypatch.setattr(reference, "usable_cores", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    in_process("reference", [[str(tmp_path)]])
    assert (parsed, threads) == ([str(path)], [3])
    assert gguf.GGUFReader is counting


# ---------------- planted bugs
def perturbed(name: str, factor: float = 1.01) -> Callable[..., Any]:
    """open_weights with one tensor slightly wrong."""

    def opened(*args: Any, **options: Any) -> Any:
        weights = open_weights(*args, **options)
        take = weights.take

        def wrong(asked: str, *a: Any, **k: Any) -> torch.Tensor:
            return take(asked, *a, **k) * (factor if asked == name else 1)

        weights.take = wrong  # type: ignore[method-assign]
        return weights

    return opened


PREFILL, DECODE = TorchAttention._prefill, TorchAttention._decode


def wrong_prefill(self: Any, layer: int, chunk: Any, *rest: Any) -> torch.Tensor:
    return PREFILL(self, layer, chunk, *rest) * (1.001 if layer == 1 and chunk.pages is not None else 1)


def wrong_decode(self: Any, layer: int, *rest: Any) -> torch.Tensor:
    return DECODE(self, layer, *rest) * (1.001 if layer == 1 else 1)


@pytest.mark.parametrize(
    ("bug", "complaint"),
    [
        ((loader, "open_weights", perturbed("model.layers.1.self_attn.k_proj.weight")), "transformers: layer 1"),
        ((loader, "open_weights", perturbed("model.layers.2.post_attention_layernorm.weight")), "transformers: layer 2"),
        ((loader, "open_weights", perturbed("model.embed_tokens.weight")), "transformers: embedding"),
        ((loader, "open_weights", perturbed("lm_head.weight")), "transformers: logits"),
        ((TorchAttention, "_decode", wrong_decode), "decode: layer 1"),
        ((TorchAttention, "_prefill", wrong_prefill), "cached: layer 1"),
    ],
)
def test_a_planted_bug_is_found_and_its_layer_named(bug, complaint, checkpoint, monkeypatch, capfd):
    monkeypatch.setattr(*bug)
    code, out = checked(checkpoint, monkeypatch, capfd)
    assert code == 1
    assert f"selfcheck: {complaint} is the first that differs, by " in out
    assert "selfcheck: FAILED" in out
    assert "!" in out
    others = {"transformers", "decode", "cached"} - {complaint.partition(":")[0]}
    assert not any(f"selfcheck: {name}:" in out for name in others)


def two_ranks(monkeypatch: pytest.MonkeyPatch, product: str) -> Callable[[str, list[list[str]]], None]:
    """Jobs of which that of two ranks is done by one, with a product of layer 2 slightly wrong."""

    def jobs(kind: str, arguments: list[list[str]]) -> None:
        if len(arguments) == 2:
            file = Path(arguments[0][0]) / "job.json"
            job = json.loads(file.read_text())
            job["engine"]["tp"] = 1
            file.write_text(json.dumps(job))
            monkeypatch.setattr(loader, "open_weights", perturbed(f"model.layers.2.mlp.{product}_proj.weight"))
        in_process(kind, arguments[:1])

    return jobs


def test_ranks_that_disagree_are_found(checkpoint, monkeypatch, capfd):
    """The job of two ranks is done by one whose layer 2 is wrong."""
    code, out = checked(checkpoint, monkeypatch, capfd, jobs=two_ranks(monkeypatch, "up"), tp=2)
    assert code == 1
    assert re.search(r"selfcheck: tp 2: layer 2 is the first that differs, by \S+ \(1.0e-04/1.0e-04 allowed\)", out)


# ---------------- weights in 4 or 8 bits on a CPU
@pytest.fixture(params=["auto", "int8", "q4"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@needs_compiler
@pytest.mark.parametrize("page_size", [16, 4])
def test_rounded_weights_are_compared_as_closely_as_their_activations_allow(page_size, kind, checkpoint, monkeypatch, capfd):
    """And what rounding costs is told apart from it.  With pages of 4 attention is torch's."""
    code, out = checked(checkpoint, monkeypatch, capfd, quantization=kind, page_size=page_size)
    assert code == 0, out
    assert "weights in 4 or 8 bits, also those of transformers" in out
    limits = [float(n) for line in out.splitlines()[2:7] for n in line.split()[-1].split("/")]
    assert max(limits) < 0.03
    assert re.search(rf"weights rounded to {4 if kind == 'q4' else 8} bits: no matrix changes by more than \d", out)


@needs_compiler
def test_a_token_that_rounding_sends_to_another_expert_is_no_fault(tmp_path, monkeypatch, capfd):
    """Its vector changes by a tenth, the others' by a thousandth, which is what is judged; not every random model has one."""
    for seed in range(12):
        save_architecture(tmp_path, "qwen3-moe, windows", seed=seed)
        save_byte_tokenizer(tmp_path)
        code, out = checked(tmp_path, monkeypatch, capfd, quantization="q4", page_size=16)
        assert code == 0, out
        (typical, largest), (limit, far) = (
            map(float, c.rstrip("!").split("/")) for c in np.take(out.splitlines()[6].split(), [1, -1])
        )
        assert typical < limit < 0.006
        if limit < largest:
            break
    assert limit < largest < far == 1


@pytest.mark.parametrize(("inner", "agree"), [(31, True), (71, False), (128, False)])
def test_ranks_may_differ_by_what_rounding_costs_only_where_they_cut_its_groups(inner, agree, tmp_path, monkeypatch, capfd):
    """31 columns are one group of 32, and 16 + 15 for two ranks.  71 are cut between groups, and 128 are two for each."""
    save_llama(tmp_path, layers=3, inner=inner)
    save_byte_tokenizer(tmp_path)
    engine = {"quantization": "int8", "tp": 2}
    code, out = checked(tmp_path, monkeypatch, capfd, jobs=two_ranks(monkeypatch, "down"), **engine)
    assert (code == 0) == agree, out
    assert ("selfcheck: tp 2: layer 2 is the first that differs" in out) != agree


PACK, ATTEND = Kernels.pack, KernelAttention.__call__
SCALES = {8: (512,), 4: (256, 288)}  # where a block has its scales and offsets, f16[16] each


def wrong_scales(product: int, rows: slice, factor: float = 1.02) -> Callable[..., torch.Tensor]:
    """`Kernels.pack` with the scales of some tiles of 16 rows of one product slightly wrong; a layer has four products."""
    count = iter(range(1000))

    def pack(self: Kernels, parts: Any, inputs: int, bits: int, **options: Any) -> torch.Tensor:
        out = PACK(self, parts, inputs, bits, **options)
        if next(count) == product:
            for at in SCALES[bits]:
                scales = out[rows, :, at : at + 32].contiguous().view(torch.float16)
                out[rows, :, at : at + 32] = (scales.float() * factor).half().view(torch.uint8)
        assert out.shape[-1] == BLOCK_BYTES[bits]
        return out

    return pack


def attend(change: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """Attention of layer 1 on something else."""

    def call(self: KernelAttention, layer: int, *given: Any, **options: Any) -> torch.Tensor:
        return ATTEND(self, layer, *(change(self, *given) if layer == 1 else given), **options)

    return call


def swapped(self: KernelAttention, qkv: torch.Tensor, *rest: Any) -> Any:
    """The first two KV heads' values."""
    layer = self._layers[1]
    order = np.arange(qkv.shape[1])
    values = (layer.heads + layer.kv_heads) * layer.dim
    order[values : values + 2 * layer.dim] = np.roll(order[values : values + 2 * layer.dim], layer.dim)
    return qkv[:, order].contiguous(), *rest


def one_late(self: KernelAttention, qkv: torch.Tensor, rotation: Rotation, *rest: Any) -> Any:
    """A decode at the position of the token before."""
    now = tuple(x[-1:].clone() for x in rotation)
    if len(qkv) == 1:
        rotation = self.before  # type: ignore[attr-defined]
    self.before = now  # type: ignore[attr-defined]
    return qkv, rotation, *rest


@needs_compiler
@pytest.mark.parametrize(
    ("bug", "told"),
    [
        (lambda: (Kernels, "pack", wrong_scales(7, slice(None))), ("transformers: layer 1", False)),
        (lambda: (Kernels, "pack", wrong_scales(5, slice(0, 1))), ("transformers: layer 1", False)),
        (lambda: (Kernels, "pack", wrong_scales(12, slice(None))), ("transformers: logits", False)),
        (lambda: (KernelAttention, "__call__", attend(swapped)), ("transformers: layer 1", True)),
        (lambda: (KernelAttention, "__call__", attend(one_late)), ("decode: layer 1", False)),
    ],
    ids=["all scales of down", "sixteen rows of o", "scales of the head", "values of two KV heads", "positions of decodes"],
)
def test_a_bug_planted_in_the_kernels_of_few_bits_is_found(bug, told, checkpoint, monkeypatch, capfd):
    """Most of them move nothing by a fifth, which a limit for exact weights would have to allow (`told`: what does)."""
    complaint, much = told
    monkeypatch.setattr(*bug())
    code, out = checked(checkpoint, monkeypatch, capfd, quantization="auto", page_size=16)
    assert code == 1
    assert f"selfcheck: {complaint} is the first that differs, by " in out
    errors = [float(n) for line in out.splitlines()[2:7] for cell in line.split()[-4:-1] for n in cell.rstrip("!").split("/")]
    assert (max(errors) > 0.2) == much


def test_activations_of_one_byte_are_found(checkpoint, monkeypatch, capfd):
    """In the torch arithmetic, where a test can take the second byte away."""

    def one_byte(x: torch.Tensor) -> torch.Tensor:
        return quantise(x, 8).values()

    monkeypatch.setenv("CC", "no-such-compiler")
    assert checked(checkpoint, monkeypatch, capfd, quantization="int8")[0] == 0
    monkeypatch.setattr(quantized_layers, "round_trip", one_byte)
    code, out = checked(checkpoint, monkeypatch, capfd, quantization="int8")
    assert code == 1
    assert "selfcheck: transformers: layer 0 is the first that differs" in out


def test_a_rounding_that_is_coarser_than_its_bits_is_found_though_both_sides_share_it(checkpoint, monkeypatch, capfd):
    def coarse(w: torch.Tensor, bits: int) -> Groups:
        whole = quantise(w, bits)
        return Groups(whole.numbers // 16 * 16, whole.scale, whole.offset)

    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(quantized_layers, "quantise", coarse)
    monkeypatch.setattr(reference, "quantise", coarse)
    code, out = checked(checkpoint, monkeypatch, capfd, quantization="int8")
    assert code == 1
    assert re.search(r"selfcheck: rounding to 8 bits changes a matrix by [\d.]+ % \(2\.3 % allowed\)", out)
    assert "is the first that differs" not in out


def test_limits_of_8_bit_floats_on_a_gpu_are_wide(checkpoint):
    spec = resolve(str(checkpoint))
    for settings, floor in (({"quantization": "fp8"}, 0.2), ({"kv_cache_dtype": "fp8"}, 0.2), ({}, 1e-4)):
        yard = compare.Yardstick.of(Config(spec, EngineConfig(device="cuda", **settings)), {})
        assert (yard.exact, yard.floor) == ("float32", floor)


def test_phases_say_how_long_they_took(capfd):
    with command.phase("layers, one rank"):
        pass
    first, last = capfd.readouterr().err.splitlines()
    assert first == "selfcheck: layers, one rank ..."
    assert re.fullmatch(r"selfcheck: layers, one rank: \d+\.\d s", last)


def test_an_engine_that_says_something_else_is_found(checkpoint, monkeypatch, capfd):
    code, out = checked(checkpoint, monkeypatch, capfd, answers={"warm": [[7] * TOKENS] * 3})
    assert code == 1
    assert re.search(r"greedy \(warm cache\): prompt \d differs at token \d of 6: 7 is no choice", out)


def test_a_perplexity_that_is_off_is_found(checkpoint, monkeypatch, capfd):
    monkeypatch.setattr(loader, "open_weights", perturbed("lm_head.weight", 1.1))
    code, out = checked(checkpoint, monkeypatch, capfd)
    assert code == 1
    assert re.search(r"selfcheck: perplexity is [\d.]+ % off \(0\.10 % allowed\)", out)


def test_what_cannot_be_checked_is_a_sentence(checkpoint, tmp_path, capfd):
    assert main(["selfcheck", "--model", str(checkpoint), "--tokens", "999"]) == 2
    assert "--tokens must be between 2 and 254" in capfd.readouterr().err
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (damaged / name).write_bytes((checkpoint / name).read_bytes()[: -100 if name == "model.safetensors" else None])
    config = Config(resolve(str(damaged)), EngineConfig(quantization="none", threads=1))
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or damaged"):
        command.check(config, TOKENS)


def test_a_rank_that_fails_ends_the_others_which_wait_for_it(checkpoint, tmp_path):
    config = Config(resolve(str(checkpoint)), EngineConfig(quantization="none", threads=1, tp=2, kv_tokens=512))
    write_job(tmp_path, config, [[1, 2, 3]], 0)
    with pytest.raises(UserError, match=r"the probe ended with code 1:\n[\s\S]*list index out of range"):
        command._processes("probe", [[str(tmp_path), "0"], [str(tmp_path), "7"]])
