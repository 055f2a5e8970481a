"""The Llama model against transformers, as Llama and as Qwen3: logits, and greedy tokens of the embedded checkpoint."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA3_ROPE, Driver, config_for, save_llama, save_qwen3

from minisgl.actors.spawn import make_runner
from minisgl.config import Config, EngineConfig
from minisgl.errors import UserError
from minisgl.model.checkpoint.gguf_file import GGUFFile
from minisgl.model.checkpoint.gguf_weights import halves_from_pairs
from minisgl.model.checkpoint.loader import open_weights
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.cpu import runner as runner_module
from minisgl.model.cpu.layers import Linear
from minisgl.model.cpu.quantized_layers import QuantizedLayers
from minisgl.selfcheck import command, compare
from minisgl.selfcheck.probe import observe
from minisgl.selfcheck.reference import round_weights, states

PROMPT = [int(t) for t in np.random.default_rng(1).integers(3, 203, 43)]
VARIANTS = {
    "untied": (save_llama, {}),
    "tied": (save_llama, {"tied": True}),
    "llama3 rope": (save_llama, {"rope": LLAMA3_ROPE}),
    "linear rope": (save_llama, {"rope": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "no groups": (save_llama, {"heads": 3, "kv_heads": 3}),
    "one kv head": (save_llama, {"heads": 4, "kv_heads": 1}),
    "qwen3 untied": (save_qwen3, {}),
    "qwen3 tied": (save_qwen3, {"tied": True}),
    "qwen3 groups of five": (save_qwen3, {"heads": 10, "kv_heads": 2}),
    "qwen3 one kv head": (save_qwen3, {"heads": 4, "kv_heads": 1}),
}
ARCHITECTURES = pytest.mark.parametrize("save", [save_llama, save_qwen3], ids=["llama", "qwen3"])


class Spy:
    """Stands in for the sampler: keeps the logits of every step and lets the test choose what was sampled."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []
        self.forced: list[list[int]] = []

    def __call__(self, logits: torch.Tensor, rows: object) -> np.ndarray:
        self.logits.append(logits.clone())
        return np.array(self.forced.pop(0), np.int32)


def start(path, monkeypatch, **engine):
    spy = Spy()
    monkeypatch.setattr(runner_module, "sample", spy)
    config = config_for(path, **engine)
    runner = make_runner(config, 0, "")
    runner.allocate(runner.max_pages())
    return runner, spy, Driver(runner.max_pages(), config.engine.page_size)


def reference(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_prefill_and_decode_give_the_logits_of_transformers(variant, tmp_path, monkeypatch):
    save, settings = VARIANTS[variant]
    model = save(tmp_path, **settings)
    theirs = reference(model, PROMPT)
    runner, spy, driver = start(tmp_path, monkeypatch)
    driver.join(3)
    spy.forced = [[PROMPT[40]], [PROMPT[41]], [PROMPT[42]], [0]]
    runner.launch(driver.plan(prefill=[(3, PROMPT[:40], True)]))
    runner.launch(driver.plan(decode=[3]))
    runner.launch(driver.plan(decode=None, same=[3]))
    runner.launch(driver.plan(decode=None, same=[3]))
    for i, logits in enumerate(spy.logits):
        assert close(logits[0], theirs[39 + i]), i


@ARCHITECTURES
@pytest.mark.parametrize("sizes", [[1, 42], [17, 9, 17], [4, 4, 35]])
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(sizes, save, tmp_path, monkeypatch):
    theirs = reference(save(tmp_path), PROMPT)
    runner, spy, driver = start(tmp_path, monkeypatch)
    driver.join(0)
    spy.forced = [[], [], [0]][-len(sizes) :]
    at = 0
    for n in sizes:
        runner.launch(driver.plan(prefill=[(0, PROMPT[at : at + n], at + n == len(PROMPT))]))
        at += n
    assert spy.logits[0].shape == (0, 203)
    assert close(spy.logits[-1][0], theirs[-1])


@ARCHITECTURES
def test_rows_of_a_mixed_batch_do_not_see_each_other(save, tmp_path, monkeypatch):
    model = save(tmp_path)
    prompts = [PROMPT[:5], PROMPT[5:30], PROMPT[30:32]]
    runner, spy, driver = start(tmp_path, monkeypatch)
    for slot in range(3):
        driver.join(slot)
    driver.join(6)
    spy.forced = [[7, 8, 9], [10, 11, 12, 13]]
    runner.launch(driver.plan(prefill=[(s, p, True) for s, p in enumerate(prompts)]))
    # Decode rows in another order than their lengths, beside a new prompt.
    runner.launch(driver.plan(prefill=[(6, PROMPT[:20], True)], decode=[2, 0, 1]))
    for row, ids in enumerate((PROMPT[:20], [*prompts[2], 9], [*prompts[0], 7], [*prompts[1], 8])):
        assert close(spy.logits[1][row], reference(model, ids)[-1]), row


def test_many_groups_of_decode_rows_give_the_same_logits_as_one(tmp_path, monkeypatch):
    save_llama(tmp_path)
    seen = []
    for budget in (1, 1 << 30):
        monkeypatch.setattr("minisgl.model.cpu.attention.GATHER_BYTES", budget)
        runner, spy, driver = start(tmp_path, monkeypatch)
        for slot in range(5):
            driver.join(slot)
        spy.forced = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
        runner.launch(driver.plan(prefill=[(s, PROMPT[: 4 * s + 1], True) for s in range(5)]))
        runner.launch(driver.plan(decode=[4, 1, 0, 3, 2]))
        seen.append(spy.logits[1])
    assert close(seen[0], seen[1])


def _double(weights, name):
    weights[name] = 2 * weights[name]


def _swap(weights, first, second):
    weights[first], weights[second] = weights[second], weights[first]


Q_NORM, K_NORM = (f"model.layers.1.self_attn.{part}_norm.weight" for part in "qk")


@pytest.mark.parametrize(
    "change",
    [
        lambda w: _double(w, Q_NORM),
        lambda w: _double(w, K_NORM),
        lambda w: _swap(w, Q_NORM, K_NORM),
        lambda w: _swap(w, Q_NORM, Q_NORM.replace("layers.1", "layers.0")),
    ],
    ids=["queries", "keys", "swapped", "of another layer"],
)
def test_the_norms_of_queries_and_keys_are_used_where_they_belong(change, tmp_path, monkeypatch):
    model = save_qwen3(tmp_path)
    theirs = reference(model, PROMPT)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    runner, spy, driver = start(tmp_path, monkeypatch)
    driver.join(0)
    spy.forced = [[0]]
    runner.launch(driver.plan(prefill=[(0, PROMPT, True)]))
    assert (spy.logits[0][0] - theirs[-1]).abs().max() > 1e-2 * theirs[-1].abs().max()
    assert close(spy.logits[0][0], reference(type(model).from_pretrained(tmp_path), PROMPT)[-1])


@ARCHITECTURES
def test_a_cached_prefix_is_read_from_the_pages_of_its_first_owner(save, tmp_path, monkeypatch):
    model = save(tmp_path)
    runner, spy, driver = start(tmp_path, monkeypatch)
    driver.join(0)
    spy.forced = [[1], [2]]
    runner.launch(driver.plan(prefill=[(0, PROMPT[:20], True)]))
    driver.join(1, kv_len=12, pages=driver.pages[0][:3])
    tail = PROMPT[25:40]
    runner.launch(driver.plan(prefill=[(1, tail, True)]))
    assert close(spy.logits[1][0], reference(model, PROMPT[:12] + tail)[-1])


def test_a_new_owner_of_a_slot_never_sees_the_pages_of_the_former(tmp_path, monkeypatch):
    model = save_llama(tmp_path)
    runner, spy, driver = start(tmp_path, monkeypatch)
    runner._attention._by_token[:] = torch.nan  # whatever is read before it is written shows
    driver.join(0)
    spy.forced = [[1], [2], [3]]
    runner.launch(driver.plan(prefill=[(0, PROMPT[:40], True)]))
    runner._attention._by_token[:] = 1e4
    driver.join(0)
    runner.launch(driver.plan(prefill=[(0, PROMPT[:6], True)]))
    runner.launch(driver.plan(decode=[0]))
    assert close(spy.logits[2][0], reference(model, [*PROMPT[:6], 2])[-1])


def test_a_sharded_half_precision_checkpoint_with_an_index_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    model = save_llama(tmp_path / "whole").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    weights = open_weights(resolve(str(tmp_path / "parts")), torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "parts").state_dict()
    for name, tensor in theirs.items():
        assert torch.equal(weights.take(name, tuple(tensor.shape)), tensor.float())
    weights.finish()


def test_rows_and_columns_of_a_weight_are_read_alone(tmp_path):
    model = save_llama(tmp_path)
    weights = open_weights(resolve(str(tmp_path)), torch.float32)
    name, whole = "model.layers.1.mlp.down_proj.weight", model.model.layers[1].mlp.down_proj.weight
    rows = weights.take(name, (48, 71), rows=(5, 9))
    cols = weights.take(name, (48, 71), cols=(30, 71))
    assert torch.equal(rows, whole[5:9])
    assert torch.equal(cols, whole[:, 30:])
    assert cols.untyped_storage().nbytes() == cols.nbytes


@pytest.mark.parametrize(
    ("save", "change", "complaint"),
    [
        (
            save_llama,
            lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
            "lacks the tensor model.layers.1.mlp.up_proj.weight",
        ),
        (
            save_llama,
            lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}),
            "no place for: model.layers.0",
        ),
        (save_llama, lambda w: w.update({K_NORM: torch.ones(16)}), f"no place for: {K_NORM}"),
        (save_llama, lambda w: w.update({"model.norm.weight": torch.zeros(7)}), r"model.norm.weight has shape \(7,\)"),
        (
            save_llama,
            lambda w: w.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}),
            "model.norm.weight has dtype I8",
        ),
        (save_qwen3, lambda w: w.pop(Q_NORM), f"lacks the tensor {Q_NORM}"),
        (save_qwen3, lambda w: w.update({K_NORM: torch.ones(48)}), rf"{K_NORM} has shape \(48,\), .* \(16,\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_the_name_of_the_tensor(save, change, complaint, tmp_path):
    save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=complaint):
        make_runner(config_for(tmp_path), 0, "")


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path):
    save_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(weights, tmp_path / "model.safetensors")
    make_runner(config_for(tmp_path), 0, "").close()


def test_a_truncated_safetensors_file_is_refused_by_name(tmp_path):
    save_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or damaged"):
        make_runner(config_for(tmp_path), 0, "")


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_a_packed_linear_layer_multiplies_like_the_plain_one(rows):
    torch.manual_seed(0)
    weight, x = torch.randn(70, 48), torch.randn(rows, 48)
    assert close(Linear(weight[:30], weight[30:])(x), x @ weight.T)
    half = Linear(weight.bfloat16())(x.bfloat16())
    assert half.dtype == torch.bfloat16


def test_pairs_become_halves():
    # Two heads of four dimensions; the entries say which dimension of the rotate-half layout they are.
    pairs = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7])[:, None]
    assert halves_from_pairs(pairs, 4)[:, 0].tolist() == list(range(8))


# ---------------------------------------------------------------- the embedded model
PROMPTS = (
    "The Ġcapital Ġof ĠFrance Ġis",
    "Once Ġupon Ġa Ġtime , Ġthere Ġwas",
    "<|im_start|> user Ċ Hello Ġthere <|im_end|> Ċ <|im_start|> ass istant Ċ",
)


@pytest.fixture(scope="module")
def embedded():
    """The spec of the embedded file and transformers' model of it; skipped where the package is not installed."""
    try:
        spec = resolve(None)
    except UserError as e:
        pytest.skip(str(e))
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        skeleton = LlamaForCausalLM(_hf_config(LlamaConfig, spec))
    loaded = load_gguf_checkpoint(spec.path, return_tensors=True, model_to_load=skeleton)
    model = LlamaForCausalLM(_hf_config(LlamaConfig, spec)).eval()
    missing, unexpected = model.load_state_dict(loaded["tensors"], strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return spec, model


def _hf_config(cls, spec):
    return cls(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        max_position_embeddings=spec.max_context,
        rms_norm_eps=spec.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        tie_word_embeddings=spec.tie_embeddings,
    )


def test_the_embedded_model_loads_the_weights_that_transformers_loads(embedded):
    spec, model = embedded
    weights = open_weights(spec, torch.float32)
    for name, theirs in model.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(weights.take(name, tuple(theirs.shape)), theirs), name
    weights.finish()


def test_the_embedded_model_says_what_transformers_says(embedded):
    spec, model = embedded
    vocabulary = {t: i for i, t in enumerate(GGUFFile(spec.path).fields["tokenizer.ggml.tokens"])}
    prompts = [[vocabulary[t] for t in p.split()] for p in PROMPTS]
    n = 12
    theirs = []
    for p in prompts:
        ids = torch.tensor([p])  # the mask is given because generate() would take <|im_end|>, its padding, out of the prompt
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, eos_token_id=None)
        theirs.append(out[0, len(p) :].tolist())
    # float32 is the point here and below: the default is compared in tests/model/test_cpu_quantized.py.
    config = Config(spec, EngineConfig(kv_tokens=512, max_running=4, max_context=128, quantization="none"))
    runner = make_runner(config, 0, "")
    runner.allocate(runner.max_pages())
    driver = Driver(runner.max_pages(), config.engine.page_size)
    for slot in range(3):
        driver.join(slot)
    steps = [runner.launch(driver.plan(prefill=[(s, p, True) for s, p in enumerate(prompts)])).result().tokens]
    steps.append(runner.launch(driver.plan(decode=[0, 1, 2])).result().tokens)
    while len(steps) < n:
        steps.append(runner.launch(driver.plan(decode=None, same=[0, 1, 2])).result().tokens)
    assert np.stack(steps).T.tolist() == theirs


def test_the_reference_keeps_the_bits_that_a_gguf_file_has(embedded):
    spec, model = embedded
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert round_weights(model, spec, QuantizedLayers("auto", None)) == {}
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    eight = copy.deepcopy(model)
    changed = round_weights(eight, spec, QuantizedLayers("int8", None))
    assert list(changed) == [8]
    assert 0.004 < changed[8] < 0.01  # of bell-shaped weights it would be 0.005
    assert torch.equal(eight.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_the_embedded_model_has_the_perplexity_that_transformers_computes(embedded, capsys):
    """Through the self-check's own comparison: the same to a thousandth, and the states of every layer."""
    spec, model = embedded
    ids = command.prompts(Config(spec), 2)[0][:64]
    config = Config(spec, EngineConfig(kv_tokens=512, max_running=4, max_context=256, quantization="none"))
    ours = {name: t.numpy() for name, t in observe(config, [ids], 0).items()}
    hidden, logits = states(model, ids)
    theirs = {"0.float32.hidden": hidden.numpy(), "0.float32.logits": logits.numpy()}
    assert compare.perplexity(ids, ours, theirs, compare.Yardstick()) == []
    assert compare.rows_of(ours, theirs, "0.prefill", "0.float32").max() < compare.ROUNDING
    ours["0.prefill.logits"] = ours["0.prefill.logits"] * 1.01
    assert len(compare.perplexity(ids, ours, theirs, compare.Yardstick())) == 1
    assert "perplexity of a text of 64 tokens" in capsys.readouterr().out
