"""One request must not harm another: what a request makes of its own numbers stays with it, and is told as an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import eventually
from safetensors.torch import load_file, save_file
from scripted import Server, serve
from tiny_models import ARCHITECTURES, Driver, config_for, needs_compiler, save_architecture, save_byte_tokenizer, save_llama

from minisgl import LLM, SamplingParams
from minisgl.actors.spawn import make_runner
from minisgl.errors import UserError
from minisgl.model.cpu.runner import Runner

BAD = 7  # the token whose keys and values are no numbers
DIM = 5  # of the hidden states, that token BAD alone has
OTHERS = [[int(t) for t in np.random.default_rng(i).integers(20, 200, n)] for i, n in enumerate((3, 9, 17, 30, 45))]
POISON = [[11, 12, BAD, *range(30, 100)] for _ in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the weights of a checkpoint in place."""
    file = str(path / "model.safetensors")
    weights = {name: t.clone() for name, t in load_file(file).items()}
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def row(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """The embedding of BAD is `value`."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        next(t for name, t in weights.items() if "embed_tokens" in name)[BAD] = value

    return change


def overflow(big: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """Every weight is a finite number, and the values of BAD in the first layer are none."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        embedding = next(t for name, t in weights.items() if "embed_tokens" in name)
        embedding[:, DIM] = 0
        embedding[BAD] = 0
        embedding[BAD, DIM] = 1
        [v] = [t for name, t in weights.items() if name.endswith("layers.0.self_attn.v_proj.weight")]
        v[:, DIM] = big

    return change


KINDS = {"not a number": row(math.nan), "infinite": row(math.inf), "overflow": overflow(3e38)}


# ---------------- in one worker: every arithmetic
def run(runner: Runner, driver: Driver, prompts: list[list[int]], steps: int = 5) -> list[list[int]]:
    """Greedy answers: all prompts in one step, then decodes of rows of every length together."""
    for slot in range(len(prompts)):
        driver.join(slot)
    plan = driver.plan(prefill=[(slot, ids, True) for slot, ids in enumerate(prompts)])
    said = [[t] for t in runner.launch(plan).result().tokens.tolist()]
    order = sorted(range(len(prompts)), key=lambda s: -len(prompts[s]))
    for step in range(steps):
        plan = driver.plan(decode=order if step == 0 else None, same=order)
        for slot, token in zip(order, runner.launch(plan).result().tokens.tolist(), strict=True):
            said[slot].append(token)
    return said


def later_answers(path: Path, poison: bool, **engine: Any) -> list[list[int]]:
    """What others are answered on the pages that a request has left, in a worker of its own."""
    runner = make_runner(config_for(path, **engine), 0, "")
    assert isinstance(runner, Runner)
    runner.allocate(runner.max_pages())
    size = engine.get("page_size", 4)
    if poison:
        for seed in range(3):
            run(runner, Driver(runner.max_pages(), size, seed), POISON, 2)
    try:
        return run(runner, Driver(runner.max_pages(), size, 99), OTHERS)
    finally:
        runner.close()


SETTINGS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "pages of 16": {"page_size": 16},
    "8 bits, attention in torch": {"quantization": "int8"},
    "pages of one": {"page_size": 1},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_numbers_that_are_none_do_not_outlive_their_request(tmp_path: Path, setting: str, kind: str) -> None:
    save_llama(tmp_path)
    edit(tmp_path, overflow(6e4) if (setting, kind) == ("float16", "overflow") else KINDS[kind])
    try:
        fresh = later_answers(tmp_path, False, **SETTINGS[setting])
    except UserError as e:
        assert "embed_tokens" in str(e) or "v_proj" in str(e), "a model that is refused, is refused with a tensor's name"  # noqa: PT017
        return
    assert later_answers(tmp_path, True, **SETTINGS[setting]) == fresh


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) & {"mistral", "gemma2", "gpt-oss", "qwen3", "gemma3", "phi3"}))
def test_in_every_kind_of_attention(tmp_path: Path, name: str) -> None:
    save_architecture(tmp_path, name)
    edit(tmp_path, lambda weights: weights.update({n: t.contiguous() for n, t in weights.items()}) or row(math.nan)(weights))  # type: ignore[func-returns-value]
    if name in ("gemma2", "gemma3"):  # whose head is its table of tokens: the row would be in every answer

        def untie(weights: dict[str, torch.Tensor]) -> None:
            embedding = next(t for n, t in weights.items() if "embed_tokens" in n)
            embedding[BAD] = 3e38

        edit(tmp_path, untie)
    assert later_answers(tmp_path, True) == later_answers(tmp_path, False)


@needs_compiler
def test_on_the_kernels_of_the_default_too(tmp_path: Path) -> None:
    save_llama(tmp_path)
    edit(tmp_path, overflow(1e6))
    engine = {"page_size": 16, "quantization": "auto"}
    try:
        fresh = later_answers(tmp_path, False, **engine)
    except UserError:
        return
    assert later_answers(tmp_path, True, **engine) == fresh


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-oss"])
@pytest.mark.parametrize("quantization", ["none", pytest.param("auto", marks=needs_compiler)])
def test_tokens_before_a_bad_one_in_the_same_chunk_stay_clean(tmp_path: Path, name: str, quantization: str) -> None:
    save_llama(tmp_path) if name == "llama" else save_architecture(tmp_path, name)
    edit(tmp_path, overflow(3e38) if quantization == "none" else overflow(1e30))
    ids = [*range(20, 36), 50, 51, BAD, 52, 53]

    def after(first: list[int]) -> list[int]:
        """What a prompt is answered that shares the first page, whose keys and values `first` has computed."""
        runner = make_runner(config_for(tmp_path, page_size=16, quantization=quantization), 0, "")
        runner.allocate(runner.max_pages())
        driver = Driver(runner.max_pages(), 16)
        driver.join(0)
        runner.launch(driver.plan(prefill=[(0, first, False)])).result()
        driver.join(1, kv_len=16, pages=driver.pages[0][:1])
        said = runner.launch(driver.plan(prefill=[(1, [60, 61, 62], True)])).result().tokens.tolist()
        for step in range(4):
            said += runner.launch(driver.plan(decode=[1] if step == 0 else None, same=[1])).result().tokens.tolist()
        runner.close()
        return said

    clean = after(ids[:16])
    assert min(clean) >= 0
    assert after(ids) == clean


# ---------------- through the engine
def engine(path: Path, **settings: Any) -> LLM:
    """All actors in this process, unless the settings say otherwise."""
    save_byte_tokenizer(path)
    defaults = {"processes": False, "threads": 1, "quantization": "none", "kv_tokens": 512, "max_context": 128, "page_size": 4}
    return LLM(str(path), **{**defaults, **settings})


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("poisoned")
    save_llama(path, vocab=256)
    edit(path, overflow(3e38))
    return path


def test_a_request_that_makes_no_numbers_ends_with_an_error_that_says_so(poisoned: Path) -> None:
    with engine(poisoned) as llm:
        [fresh] = llm.generate([OTHERS[2]], GREEDY)
        bad, good = llm.generate([POISON[0], OTHERS[2]], GREEDY, errors="return")
        assert bad.error is not None
        assert (bad.error.status, bad.error.code) == (500, "nan_logits")
        assert bad.finish_reason is None
        assert good.token_ids == fresh.token_ids


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "top_p": 0.5, "top_k": 20, "seed": 1},
        {"logprobs": 3},
        {"repetition_penalty": 1.3},
        {"logit_bias": ((9, 100.0),)},
        {"min_tokens": 3},
    ],
    ids=lambda p: next(iter(p)),
)
def test_however_it_is_sampled(poisoned: Path, params: dict[str, Any]) -> None:
    with engine(poisoned) as llm:
        [bad] = llm.generate([POISON[0]], SamplingParams(max_tokens=4, **{"temperature": 0.0, **params}), errors="return")
        assert bad.error is not None
        assert bad.error.code == "nan_logits"


def test_the_pages_of_a_request_that_made_no_numbers_are_not_shared(poisoned: Path) -> None:
    with engine(poisoned) as llm:
        ids = [*range(20, 40), BAD, *range(40, 60)]  # five pages of numbers, then some of none
        llm.generate([ids], GREEDY, errors="return")
        [again] = llm.generate([ids], GREEDY, errors="return")
        assert again.cached_tokens <= 20, "pages that hold no numbers were kept for others"
        [clean] = llm.generate([[*range(20, 40), *range(100, 110)]], GREEDY)
    with engine(poisoned) as llm:
        [fresh] = llm.generate([[*range(20, 40), *range(100, 110)]], GREEDY)
    assert clean.token_ids == fresh.token_ids


def test_nor_those_of_a_prompt_in_many_chunks(poisoned: Path) -> None:
    with engine(poisoned, step_tokens=9, max_running=4) as llm:
        ids = [BAD, *range(20, 90)]
        llm.generate([ids], GREEDY, errors="return")
        [again] = llm.generate([ids], GREEDY, errors="return")
        assert again.cached_tokens == 0


def test_nor_on_several_ranks(poisoned: Path) -> None:
    """Two worker processes: a rank's own keys may be numbers where another's are none, and all must forget the same pages."""
    shared = list(range(20, 40))
    with engine(poisoned, tp=2, processes=True) as llm:
        fresh = [out.token_ids for out in llm.generate(OTHERS, GREEDY)]
        *bad, good = llm.generate([*POISON, OTHERS[2]], GREEDY, errors="return")
        assert {out.error.code if out.error else "" for out in bad} == {"nan_logits"}
        assert good.token_ids == fresh[2]
        llm.generate([[*shared, BAD, *range(40, 60)]], GREEDY, errors="return")
        [again] = llm.generate([[*shared, BAD, *range(40, 60)]], GREEDY, errors="return")
        assert again.cached_tokens <= len(shared)
        assert [out.token_ids for out in llm.generate(OTHERS, GREEDY)] == fresh
        many = [[*range(60 + i, 100 + i)] for i in range(12)]  # they take every page that was left
        llm.generate(many, GREEDY)
        assert [out.token_ids for out in llm.generate(OTHERS, GREEDY)] == fresh


@pytest.fixture(scope="module")
def server(poisoned: Path) -> Iterator[Server]:
    save_byte_tokenizer(poisoned)
    with serve("--model", str(poisoned), "--quantization", "none", "--page-size", "4") as running:
        yield running


def test_over_http_it_is_a_500_with_a_code_and_a_count(server: Server) -> None:
    status, body = server.refused("/v1/completions", {"prompt": POISON[0], "max_tokens": 4, "temperature": 0})
    assert (status, body["error"]["code"]) == (500, "nan_logits")
    _, raw, _ = server.raw("POST", "/v1/completions", {"prompt": POISON[0], "max_tokens": 4, "stream": True})
    assert b"nan_logits" in raw

    def counted() -> bool:
        lines = server.raw("GET", "/metrics")[1].decode().splitlines()
        return any(line.startswith("minisgl_nan_requests_total") and float(line.split()[-1]) >= 2 for line in lines)

    eventually(counted)
    answer = server.post("/v1/completions", {"prompt": OTHERS[1], "max_tokens": 4, "temperature": 0, "logprobs": 1})
    assert all(value > -9000 for value in answer["choices"][0]["logprobs"]["token_logprobs"])


def test_a_prompt_whose_log_probabilities_are_none_is_an_error(server: Server) -> None:
    ask = {"prompt": POISON[0], "max_tokens": 0, "echo": True, "logprobs": 1}
    status, body = server.refused("/v1/completions", ask)
    assert (status, body["error"]["code"]) == (500, "nan_logits")


# ---------------- the default's narrow numbers
def answer_or_name(path: Path, *names: str, **settings: Any) -> list[float] | None:
    """Log probabilities of an answer on the default path; None if the model is refused by the name of a tensor."""
    try:
        with engine(path, quantization="auto", page_size=16, **settings) as llm:
            [out] = llm.generate(
                [OTHERS[3]], SamplingParams(temperature=0, max_tokens=8, logprobs=2, ignore_eos=True), errors="return"
            )
    except UserError as e:
        assert any(name in str(e) for name in names), f"refused, but not by the tensor's name: {e}"  # noqa: PT017
        return None
    assert out.error is None, out.error
    values = [entry.logprob for entry in out.logprobs]
    assert all(v is not None and -1000 < v <= 0 for v in values), values
    return [float(v) for v in values if v is not None]


@needs_compiler
@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
@pytest.mark.parametrize("kind", ["auto", "int8", "q4"])
def test_keys_and_values_beyond_half_precision_are_served_or_refused_by_name(
    tmp_path: Path, projection: str, kind: str
) -> None:
    save_llama(tmp_path, vocab=256)

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[f"model.layers.0.self_attn.{projection}.weight"].mul_(2.0**18)
        weights["model.layers.0.self_attn." + ("q_proj" if projection == "k_proj" else "o_proj") + ".weight"].mul_(2.0**-18)

    edit(tmp_path, change)
    save_byte_tokenizer(tmp_path)
    try:
        with LLM(str(tmp_path), processes=False, threads=1, quantization=kind, kv_tokens=512) as llm:
            [out] = llm.generate(
                [OTHERS[3]], SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True), errors="return"
            )
    except UserError as e:
        assert projection in str(e)  # noqa: PT017
        return
    assert out.error is None
    assert all(entry.logprob is not None and entry.logprob > -1000 for entry in out.logprobs)


@needs_compiler
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["mlp.down_proj", "self_attn.q_proj", "input_layernorm"])
@pytest.mark.parametrize("kind", ["auto", "int8", "q4"])
def test_weights_that_are_no_numbers_are_refused_at_load(tmp_path: Path, name: str, value: float, kind: str) -> None:
    save_llama(tmp_path, vocab=256)

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[f"model.layers.1.{name}.weight"].view(-1)[3] = value

    edit(tmp_path, change)
    save_byte_tokenizer(tmp_path)
    for processes in (False, True)[: 1 + (name == "mlp.down_proj" and value == math.inf and kind == "q4")]:
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            LLM(str(tmp_path), processes=processes, threads=1, quantization=kind, kv_tokens=512)


@needs_compiler
@pytest.mark.parametrize("kind", ["auto", "int8", "q4"])
@pytest.mark.parametrize("power", [-40, -26, -20, 20, 24, 40])
def test_small_and_large_groups_keep_their_precision(tmp_path: Path, power: int, kind: str) -> None:
    """Scaled by a power of two, and back by the next matrix: the same model."""

    def logprobs(path: Path) -> list[float] | None:
        return answer_or_name(path, "up_proj", "down_proj") if kind == "auto" else named(path)

    def named(path: Path) -> list[float] | None:
        try:
            with LLM(str(path), processes=False, threads=1, quantization=kind, kv_tokens=512) as llm:
                [out] = llm.generate([OTHERS[3]], SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True))
        except UserError as e:
            assert "up_proj" in str(e) or "down_proj" in str(e)  # noqa: PT017
            return None
        assert out.error is None, out.error
        return [float(entry.logprob or 0) for entry in out.logprobs]

    save_llama(tmp_path / "plain", vocab=256)
    save_llama(tmp_path / "scaled", vocab=256)

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"].mul_(2.0**power)
        weights["model.layers.0.mlp.down_proj.weight"].mul_(2.0**-power)

    edit(tmp_path / "scaled", change)
    for path in (tmp_path / "plain", tmp_path / "scaled"):
        save_byte_tokenizer(path)
    if (scaled := logprobs(tmp_path / "scaled")) is not None:
        assert scaled == pytest.approx(logprobs(tmp_path / "plain"), abs=1e-3)
