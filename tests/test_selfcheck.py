"""`minisgl selfcheck` on a small checkpoint: it agrees with transformers, and names the first layer that a bug spoils."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_gguf import write_gguf
from test_quantized import FP8, channel_fp8, quantise
from tiny_models import save_byte_tokenizer, save_llama

from minisgl import selfcheck
from minisgl.__main__ import main
from minisgl.config import Config, EngineConfig
from minisgl.errors import UserError
from minisgl.model import runner
from minisgl.model.attention import TorchAttention
from minisgl.model.jobs import work, write_job
from minisgl.model.loader import open_weights
from minisgl.model.resolve import resolve

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
    monkeypatch.setattr(selfcheck, "_answers", lambda *_: answers or {})
    config = Config(resolve(str(path)), EngineConfig(quantization="none", threads=1, page_size=4, **engine))
    code = selfcheck.check(config, {}, TOKENS, jobs)
    return code, capfd.readouterr().out


def test_everything_agrees_on_two_ranks_and_in_the_whole_engine(checkpoint, monkeypatch, capfd):
    """Ranks and engine are real processes; what needs no company is done here, which saves the imports."""
    real = selfcheck._processes
    monkeypatch.setattr(selfcheck, "_processes", lambda kind, a: (in_process if len(a) == 1 else real)(kind, a))
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

    quantise(folder, load_file(checkpoint / "model.safetensors"), channel_fp8()[0], layer)
    code, out = checked(folder, monkeypatch, capfd)
    assert code == 0, out
    from transformers import AutoModelForCausalLM

    gguf = write_gguf(tmp_path / "m.gguf", AutoModelForCausalLM.from_pretrained(checkpoint))
    monkeypatch.setattr(selfcheck, "prompts", lambda *_: [list(range(9, 60)), [5, 6, 7]])
    code, out = checked(gguf, monkeypatch, capfd)
    assert code == 0, out


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
        ((runner, "open_weights", perturbed("model.layers.1.self_attn.k_proj.weight")), "transformers: layer 1"),
        ((runner, "open_weights", perturbed("model.layers.2.post_attention_layernorm.weight")), "transformers: layer 2"),
        ((runner, "open_weights", perturbed("model.embed_tokens.weight")), "transformers: embedding"),
        ((runner, "open_weights", perturbed("lm_head.weight")), "transformers: logits"),
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


def test_ranks_that_disagree_are_found(checkpoint, monkeypatch, capfd):
    """The job of two ranks is done by one whose layer 2 is wrong."""

    def jobs(kind: str, arguments: list[list[str]]) -> None:
        if len(arguments) == 2:
            file = Path(arguments[0][0]) / "job.json"
            job = json.loads(file.read_text())
            job["engine"]["tp"] = 1
            file.write_text(json.dumps(job))
            monkeypatch.setattr(runner, "open_weights", perturbed("model.layers.2.mlp.up_proj.weight"))
        in_process(kind, arguments[:1])

    code, out = checked(checkpoint, monkeypatch, capfd, jobs=jobs, tp=2)
    assert code == 1
    assert re.search(r"selfcheck: tp 2: layer 2 is the first that differs, by \S+ \(1.0e-04/1.0e-04 allowed\)", out)


def test_an_engine_that_says_something_else_is_found(checkpoint, monkeypatch, capfd):
    code, out = checked(checkpoint, monkeypatch, capfd, answers={"warm": [[7] * TOKENS] * 3})
    assert code == 1
    assert re.search(r"greedy \(warm cache\): prompt \d differs at token \d of 6: 7 is no choice", out)


def test_a_perplexity_that_is_off_is_found(checkpoint, monkeypatch, capfd):
    monkeypatch.setattr(selfcheck, "ROUNDING", 1.0)  # the layers say nothing
    monkeypatch.setattr(runner, "open_weights", perturbed("lm_head.weight", 1.1))
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
        selfcheck.check(config, {}, TOKENS)


def test_a_rank_that_fails_ends_the_others_which_wait_for_it(checkpoint, tmp_path):
    config = Config(resolve(str(checkpoint)), EngineConfig(quantization="none", threads=1, tp=2, kv_tokens=512))
    write_job(tmp_path, config, [[1, 2, 3]], 0)
    with pytest.raises(UserError, match=r"the probe ended with code 1:\n[\s\S]*list index out of range"):
        selfcheck._processes("probe", [[str(tmp_path), "0"], [str(tmp_path), "7"]])
