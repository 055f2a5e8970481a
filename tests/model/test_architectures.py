"""Every architecture against transformers, on tiny random checkpoints, with as many ranks as threads."""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, Driver, config_for, save_architecture

from minisgl.actors.spawn import make_runner
from minisgl.config import RopeScaling
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.common.functional import route
from minisgl.model.common.parallel import Parallel
from minisgl.model.common.registry import HF_ARCHS
from minisgl.model.cpu import runner as runner_module
from minisgl.model.cpu.attention import TorchAttention
from minisgl.model.cpu.layers import CpuLayers
from minisgl.model.cpu.sampler import sample

N = 200  # tokens of every answer
N_SPREAD = 60  # and over several ranks
PROMPT = [int(t) for t in np.random.default_rng(1).integers(3, 203, 90)]
TAIL = [int(t) for t in np.random.default_rng(2).integers(3, 203, 33)]
SHARED = 44  # tokens of the first prompt that the second one begins with: whole pages, beyond most windows


class Threads(Parallel):
    """The collectives of ranks that are threads of one process."""

    def __init__(self, rank: int, size: int, parts: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._parts, self._barrier = rank, size, parts, barrier

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(sum(self._exchange(x))) if self.size > 1 else x

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x))

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._parts[self.rank] = x.clone()
        self._barrier.wait()
        parts = list(self._parts)
        self._barrier.wait()
        return parts

    def close(self) -> None: ...


class Ranks:
    """Runners that take plans together; the logits of all steps that rank 0 sampled from."""

    def __init__(self, path: Path, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits: list[torch.Tensor] = []
        barrier, parts = threading.Barrier(tp, timeout=60), [None] * tp
        monkeypatch.setattr(runner_module, "Parallel", lambda rank, size, _: Threads(rank, size, parts, barrier))
        monkeypatch.setattr(runner_module, "sample", self._spy)
        config = config_for(path, tp=tp, kv_tokens=1024, max_context=512)
        self.runners = [make_runner(config, rank, "") for rank in range(tp)]
        for runner in self.runners:
            runner.allocate(256)
        self.pool = ThreadPoolExecutor(tp)

    def _spy(self, logits: torch.Tensor, rows: Any) -> Any:
        if len(logits) and threading.current_thread().name.endswith("_0"):  # one of the ranks: all have the same logits
            self.logits.append(logits.clone())
        return sample(logits, rows)

    def run(self, plan: Any) -> list[int]:
        results = list(self.pool.map(lambda r: r.launch(plan).result().tokens.tolist(), self.runners))
        assert all(result == results[0] for result in results)
        return results[0]


def answers(ranks: Ranks, n: int = N) -> list[list[int]]:
    """Two greedy answers of `n` tokens: to PROMPT in chunks, and to its beginning, from the cache, with another end."""
    driver = Driver(256, 4)
    driver.join(2)
    ranks.run(driver.plan(prefill=[(2, PROMPT[:37], False)]))
    ranks.run(driver.plan(prefill=[(2, PROMPT[37:70], False)]))
    out = [ranks.run(driver.plan(prefill=[(2, PROMPT[70:], True)])), []]
    driver.join(0, kv_len=SHARED, pages=driver.pages[2][: SHARED // 4])
    first = ranks.run(driver.plan(prefill=[(0, TAIL, True)], decode=[2]))  # beside a row that decodes
    out[0].append(first[1])
    out[1].append(first[0])
    driver_plan = driver.plan(decode=[0, 2])
    while len(out[0]) < n:
        tokens = ranks.run(driver_plan)
        out[1].append(tokens[0])
        out[0].append(tokens[1])
        driver_plan = driver.plan(decode=None, same=[0, 2])
    return out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_text_and_logits_are_those_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_architecture(tmp_path, name)
    ranks = Ranks(tmp_path, 1, monkeypatch)
    got = answers(ranks)
    for row, prompt in enumerate((PROMPT, PROMPT[:SHARED] + TAIL)):
        with torch.inference_mode():
            theirs = model(torch.tensor([prompt + got[row]])).logits[0, len(prompt) - 1 : -1]
        assert got[row] == theirs.argmax(-1).tolist()[: len(got[row])]
        ours = torch.stack([step[1 - row if len(step) > 1 else 0] for step in ranks.logits[row:]])
        assert (ours - theirs[: len(ours)]).abs().max() <= 1e-4 * theirs.abs().max()
    assert len(set(got[0])) > 10  # a text that says something
    for tp in (2, 3):
        spread = answers(Ranks(tmp_path, tp, monkeypatch), N_SPREAD)
        assert spread == [row[: len(start)] for row, start in zip(got, spread, strict=True)], tp


def test_every_architecture_is_tested_and_in_the_list_of_features() -> None:
    features = (Path(__file__).parents[2] / "docs/features.md").read_text()
    assert all(f"`{name}`" in features for name in HF_ARCHS)
    tasks = (
        (prefix, "ConditionalGeneration" if "model_type" in more else "CausalLM") for prefix, more in ARCHITECTURES.values()
    )
    tested = {f"{prefix.removesuffix('Text')}For{task}" for prefix, task in tasks}
    assert tested == set(HF_ARCHS)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["ministral", "gemma2", "gpt-oss"])
def test_random_batches_give_every_row_the_logits_of_its_own_text(
    name: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, cached prefixes of any owner, decodes in any order, slots given to new owners; in groups of one row or in one."""
    model, rng = save_architecture(tmp_path, name, layers=2), random.Random(seed)
    monkeypatch.setattr("minisgl.model.cpu.attention.GATHER_BYTES", 1 if seed else 1 << 30)
    ranks, driver = Ranks(tmp_path, 1, monkeypatch), Driver(256, 4, seed)
    texts: dict[int, list[int]] = {}  # of the slots in use: what is in their cache, and the token sampled last
    waiting: dict[int, list[int]] = {}  # the rest of their prompts
    checked = 0
    for _ in range(14):
        for slot in [s for s in range(6) if s not in texts and rng.random() < 0.5]:
            other = rng.choice([[], *texts])  # type: ignore[call-overload]
            shared = [] if other == [] else driver.pages[other][: rng.randrange(driver.kv_len[other] // 4 + 1)]
            driver.join(slot, kv_len=4 * len(shared), pages=shared)
            texts[slot] = texts[other][: 4 * len(shared)] if shared else []
            waiting[slot] = [rng.randrange(3, 203) for _ in range(rng.randrange(1, 50))]
        prefill = []
        for slot in [s for s in waiting if rng.random() < 0.8]:
            n = rng.randrange(1, 30)
            ids, waiting[slot] = waiting[slot][:n], waiting[slot][n:]
            texts[slot] += ids
            prefill.append((slot, ids, not waiting[slot]))
        decode = [s for s in texts if s not in waiting and rng.random() < 0.8]
        rng.shuffle(decode)
        rows = [slot for slot, _, done in prefill if done] + decode
        tokens = ranks.run(driver.plan(prefill, decode)) if prefill or decode else []
        for row, (slot, token) in enumerate(zip(rows, tokens, strict=True)):
            with torch.inference_mode():
                theirs = model(torch.tensor([texts[slot]])).logits[0, -1]
            assert (ranks.logits[-1][row] - theirs).abs().max() <= 1e-4 * theirs.abs().max()
            texts[slot].append(token)
            waiting.pop(slot, None)
            checked += 1
        for slot in [s for s in texts if s not in waiting and rng.random() < 0.1]:
            del texts[slot]  # its pages stay as they are: others may read them
    assert checked > 25


# ---------------- weights of gpt-oss
def test_experts_in_mxfp4_are_those_that_transformers_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    experts = {"num_local_experts": 3, "intermediate_size": 96, "hidden_size": 64}
    monkeypatch.setitem(ARCHITECTURES, "mxfp4", ("GptOss", {**ARCHITECTURES["gpt-oss"][1], **experts}))
    save_architecture(tmp_path, "mxfp4", layers=2)
    plain, packed = load_file(tmp_path / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in plain if n.endswith(("gate_up_proj", "down_proj"))]:
        number, inputs, outputs = plain[name].shape
        blocks = torch.randint(0, 256, (number, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 126, (number, outputs, inputs // 32), dtype=torch.uint8, generator=generator)
        packed |= {name + "_blocks": blocks, name + "_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    logits = []
    for files in (plain, {n: t for n, t in plain.items() if n + "_blocks" not in packed} | packed):
        save_file(files, tmp_path / "model.safetensors")
        if files is not plain:
            config = json.loads((tmp_path / "config.json").read_text())
            (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
        for tp in (1, 2):  # 48 of 96 inner columns are one and a half blocks
            ranks, driver = Ranks(tmp_path, tp, monkeypatch), Driver(256, 4)
            driver.join(1)
            ranks.run(driver.plan(prefill=[(1, PROMPT, True)]))
            logits.append(ranks.logits[0])
    for other in logits[1:]:
        assert (other - logits[0]).abs().max() <= 1e-4 * logits[0].abs().max()


# ---------------- planted bugs
def _spec(**change: Any) -> Any:
    return lambda patch: patch.setattr(runner_module, "replace", lambda spec, **more: replace(spec, **{**more, **change}))


def _attention(**change: Any) -> Any:
    class Wrong(TorchAttention):
        def __init__(self, spec: Any, *args: Any, **more: Any) -> None:
            super().__init__(replace(spec, **change), *args, **more)

    return lambda patch: patch.setattr("minisgl.model.cpu.backend.TorchAttention", Wrong)


def _replaced(target: str, value: Any) -> Any:
    return lambda patch: patch.setattr(target, value)


def _attends_without_sinks(patch: pytest.MonkeyPatch) -> None:
    call = TorchAttention.__call__
    patch.setattr(TorchAttention, "__call__", lambda self, *args, sinks: call(self, *args))


def _unbounded(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


_ROUTE, _GATED, _PROJECTION = route, CpuLayers.gated, CpuLayers.linear
BUGS = {
    "window one too wide": ("mistral", _attention(windows=(22,) * 3)),
    "window one too narrow": ("mistral", _attention(windows=(20,) * 3)),
    "windows in the wrong layers": ("ministral", _attention(windows=(0, 13, 0))),
    "no biases": (
        "qwen2",
        _replaced("minisgl.model.cpu.layers.CpuLayers.linear", lambda s, *w, **k: _PROJECTION(s, *w)),
    ),
    "yarn without its factor of attention": ("qwen3", _spec(rope_scaling=RopeScaling("linear", factor=4.0))),
    "weights of experts not normalised": (
        "qwen3-moe",
        _replaced("minisgl.model.cpu.layers.route", lambda x, k, _: _ROUTE(x, k, False)),
    ),
    "weights of experts normalised": (
        "qwen3-moe, windows",
        _replaced("minisgl.model.cpu.layers.route", lambda x, k, _: _ROUTE(x, k, True)),
    ),
    "one expert too few": ("mixtral", _replaced("minisgl.model.cpu.layers.route", lambda x, k, n: _ROUTE(x, k - 1, n))),
    "no soft cap of scores": ("gemma2", _attention(attn_softcap=0.0)),
    "no soft cap of logits": ("gemma2", _spec(logit_softcap=0.0)),
    "scaled by the head size": ("gemma2", _attention(attn_scale=0.0)),
    "silu in the place of gelu": (
        "gemma2",
        _replaced("minisgl.model.cpu.layers.CpuLayers.gated", lambda s, a, b, activation: _GATED(s, a, b)),
    ),
    "norms without the one": ("gemma3", _replaced("minisgl.model.architectures.gemma.OnePlus", lambda weights: weights)),
    "embedding not scaled": (
        "gemma3",
        _replaced("minisgl.model.architectures.gemma.Gemma.embed", lambda self, ids: self.embedding(ids)),
    ),
    "one kind of rotation for all layers": ("gemma3", _spec(local_rope_theta=0.0)),
    "short factors beyond the original context": ("phi4-mini", _spec(max_context=64)),
    "no sinks": ("gpt-oss", _attends_without_sinks),
    "activation without its bounds": (
        "gpt-oss",
        _replaced("minisgl.model.cpu.layers.act_mul", lambda x, _: _unbounded(x)),
    ),
    "all layers rotate": ("smollm3", _spec(nope_layers=())),
}


@pytest.mark.parametrize("bug", [None, *BUGS], ids=str)
def test_planted_bugs_are_noticed(bug: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, plant = BUGS[bug] if bug else ("gemma2", lambda patch: None)
    model = save_architecture(tmp_path, name)
    plant(monkeypatch)
    ranks, driver = Ranks(tmp_path, 1, monkeypatch), Driver(256, 4)
    driver.join(1)
    ranks.run(driver.plan(prefill=[(1, PROMPT, True)]))
    with torch.inference_mode():
        theirs = model(torch.tensor([PROMPT])).logits[0, -1]
    wrong = bool((ranks.logits[0][0] - theirs).abs().max() > 1e-4 * theirs.abs().max())
    assert wrong == (bug is not None)


# ---------------- configurations
@pytest.mark.parametrize(("prefix", "more"), sorted({(p, "model_type" in m) for p, m in ARCHITECTURES.values()}))
def test_what_a_config_leaves_unsaid_is_what_transformers_takes_it_to_be(prefix: str, more: bool, tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 12, "vocab_size": 300_000, "max_position_embeddings": 65_536}
    if prefix.startswith("Qwen3"):
        sizes["head_dim"] = 16  # we want it said
    kind = {"Gemma3": "Gemma3Text", "Mistral3": "Mistral"}.get(prefix, prefix)
    theirs = getattr(transformers, f"{kind}Config")(**sizes)
    config: dict[str, Any] = {
        "architectures": [f"{prefix.removesuffix('Text')}For{'ConditionalGeneration' if more else 'CausalLM'}"]
    }
    config |= {"text_config": {**sizes, "model_type": theirs.model_type}} if more else sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    spec = resolve(str(tmp_path))
    rope = theirs.rope_parameters
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 12
    window = getattr(theirs, "sliding_window", None) or 0
    windows = tuple(window if t == "sliding_attention" else 0 for t in types)
    assert (spec.rms_norm_eps, spec.tie_embeddings or more) == (theirs.rms_norm_eps, theirs.tie_word_embeddings or more)
    assert (spec.windows or (0,) * 12) == windows
    assert spec.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert spec.rope_theta == (rope.get("full_attention") or rope)["rope_theta"]
    assert spec.local_rope_theta == (rope.get("sliding_attention") or {"rope_theta": 0})["rope_theta"]
    assert spec.scale == (getattr(theirs, "query_pre_attn_scalar", None) or spec.head_dim) ** -0.5
    assert spec.attn_softcap == (getattr(theirs, "attn_logit_softcapping", None) or 0)
    assert spec.logit_softcap == (getattr(theirs, "final_logit_softcapping", None) or 0)
    rotated = getattr(theirs, "no_rope_layers", None) or [1] * 12
    assert spec.nope_layers == tuple(i for i in range(12) if not rotated[i])
    assert spec.num_experts == getattr(theirs, "num_local_experts", 0)
    if spec.num_experts:
        inner = getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        assert (spec.experts_per_token, spec.expert_size) == (theirs.num_experts_per_tok, inner)
        assert spec.norm_topk == getattr(theirs, "norm_topk_prob", True)
