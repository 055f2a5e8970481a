"""The GPU worker's steps, layers and kernels, run by Triton's interpreter on the CPU, against the CPU worker.

Everything of the GPU worker but streams, events and graphs: uploads, padding, page lookup, fused layers, attention, sampling.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("on a GPU scripts/check/gpu.py does this", allow_module_level=True)
import interpreter  # noqa: F401  before the kernels
import numpy as np
from tiny_models import Driver, config_for, save_architecture, save_llama, save_qwen3

from minisgl.actors.spawn import make_runner
from minisgl.config import Config, EngineConfig
from minisgl.errors import UserError
from minisgl.model.checkpoint.loader import open_weights
from minisgl.model.checkpoint.presets import random_shape
from minisgl.model.common.grammar import Grammars
from minisgl.model.common.interfaces import Build, Model
from minisgl.model.common.parallel import Parallel
from minisgl.model.common.registry import model_class
from minisgl.model.common.shard import Shard
from minisgl.model.cpu.runner import Runner
from minisgl.model.cpu.sampler import sample as cpu_sample
from minisgl.model.cuda import device_state as state_module
from minisgl.model.cuda import step as steps_module
from minisgl.model.cuda.attention.base import AttentionSpec
from minisgl.model.cuda.attention.choose import choose
from minisgl.model.cuda.attention.flashinfer import paging
from minisgl.model.cuda.attention.kv_cache import FP8, KVCache
from minisgl.model.cuda.attention.paged import PagedAttention
from minisgl.model.cuda.attention.requirements import check_float8
from minisgl.model.cuda.attention.torch import TorchReference
from minisgl.model.cuda.attention.triton import TritonAttention
from minisgl.model.cuda.device_state import DeviceState
from minisgl.model.cuda.layers import CudaLayers
from minisgl.model.cuda.memory import GRAPHS, Ledger
from minisgl.model.cuda.step import Steps, bucket_of, launch_bound_tokens
from minisgl.model.kernels.apply_plan import apply_plan
from minisgl.model.kernels.decode_attention import splits_for
from minisgl.model.kernels.prefill_attention import tiles_of
from minisgl.model.kernels.sampling import sample
from minisgl.model.kernels.uploads import Uploads
from minisgl.model.text.vocabulary import vocabulary_of
from minisgl.plan import StepPlan

CPU = torch.device("cpu")
PAGES = 60
SMALL = {"heads": 4, "kv_heads": 2}  # one program does all heads of a token; what more of them do is in test_kernels.py


@pytest.fixture(autouse=True)
def _small_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a second for what a GPU does in a microsecond."""
    monkeypatch.setattr("minisgl.model.cuda.step.SHORT_STEPS", (8, 32))
    monkeypatch.setattr("minisgl.model.cuda.step.FEW_ROWS", 4)


class Reruns:
    """In the place of graphs: runs the step, and counts what would have been captured."""

    def __init__(self) -> None:
        self.keys: set[Hashable] = set()

    def __contains__(self, key: Hashable) -> bool:
        return key in self.keys

    def replay(self, key: Hashable, step: Callable[[], None]) -> None:
        self.keys.add(key)
        step()

    def capture(self, key: Hashable, step: Callable[[], None]) -> None:
        self.keys.add(key)
        step()


class Interpreted:
    """The part of CudaRunner that computes, on CPU tensors."""

    def __init__(
        self, path: Path, *, graphs: bool = True, backend: Any = TritonAttention, fp8: bool = False, **engine: Any
    ) -> None:
        config = config_for(path, **engine)
        spec, shard = config.model, Shard.of(config.model)
        dtype = torch.float32
        kv_dtype = FP8 if fp8 else dtype
        self.heads = AttentionSpec.of(spec, shard, dtype, kv_dtype, 90)
        weights = open_weights(spec, dtype)
        served = replace(spec, max_context=config.max_context)
        model = model_class(spec.architecture)(Build(served, shard, weights, Parallel(), CudaLayers(dtype, CPU)))
        self.steps = Steps(config, model, Grammars(lambda: vocabulary_of(spec)), self.heads, processors=4, device=CPU)
        cache = KVCache(
            layers=spec.num_layers,
            num_pages=PAGES,
            page_size=config.engine.page_size,
            kv_heads=shard.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=kv_dtype,
            device=CPU,
        )
        made = backend(self.heads, cache, self.steps.state.page_table)
        self.graphs = Reruns()
        attention = PagedAttention(self.heads, cache, made, made, made)
        self.steps.use(attention, self.graphs, decode_graphs=graphs, short_graphs=graphs)
        self.logits: list[torch.Tensor] = []
        self.steps._model = self._spy(model)

    def _spy(self, model: Model) -> Any:
        def call(*args: Any) -> torch.Tensor:
            self.logits.append(model(*args))
            return self.logits[-1]

        return call

    def run(self, plan: StepPlan) -> list[int]:
        with torch.inference_mode():
            count = self.steps.run(plan)
        return self.steps.tokens[:count].tolist()


def cpu_runner(path: Path) -> Runner:
    runner: Runner = make_runner(config_for(path), 0, "")
    runner.allocate(PAGES)
    return runner


def random_plans(seed: int, steps: int) -> list[StepPlan]:
    """Prompts in chunks, decodes that come and go, slots given to new owners, batches that stay the same (SAME)."""
    rng, driver = random.Random(seed), Driver(PAGES, 4, seed)
    decoding: list[int] = []
    unfinished: dict[int, list[int]] = {}
    plans, last = [], None
    for _ in range(steps):
        prefill = []
        for slot in [s for s in range(8) if s not in decoding and s not in unfinished]:
            if rng.random() < 0.3 and len(driver.free) > 20:
                driver.join(slot)
                unfinished[slot] = [rng.randrange(203) for _ in range(rng.randrange(1, 30))]
        for slot in list(unfinished):
            n = rng.randrange(1, 20)
            ids, unfinished[slot] = unfinished[slot][:n], unfinished[slot][n:]
            prefill.append((slot, ids, not unfinished[slot]))
        gone = [s for s in decoding if rng.random() < 0.08 or driver.kv_len[s] > 100]
        decode = [s for s in decoding if s not in gone]
        for slot in gone:
            driver.free.extend(driver.pages[slot])
        same = decode == last
        plans.append(driver.plan(prefill, None if same else decode, decode))
        last = decode
        decoding = decode + [s for s, _, done in prefill if done]
        for slot, _, done in prefill:
            if done:
                del unfinished[slot]
    return plans


@pytest.mark.parametrize(("seed", "graphs"), [(0, True), (1, True), (1, False)])
def test_random_plans_give_the_tokens_of_the_cpu_worker(tmp_path: Path, seed: int, graphs: bool) -> None:
    save = save_qwen3 if seed else save_llama
    save(tmp_path, **SMALL)
    ours, theirs = Interpreted(tmp_path, graphs=graphs), cpu_runner(tmp_path)
    sampled = 0
    for plan in random_plans(seed, 10):
        want = theirs.launch(plan).result().tokens.tolist()
        assert ours.run(plan) == want
        sampled += len(want)
    assert sampled > 20
    assert len(ours.graphs.keys) > 1 if graphs else not ours.graphs.keys


@pytest.mark.parametrize("name", ["qwen2", "qwen3-moe, windows", "gemma2", "gemma3", "gpt-oss", "phi4-mini", "smollm3"])
def test_what_architectures_differ_in_gives_the_logits_of_the_cpu_worker(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases, experts, windows, soft caps, norms, partly rotated heads: a prompt in chunks beside others, and decodes."""
    save_architecture(tmp_path, name, layers=2)
    ours, theirs = Interpreted(tmp_path, graphs=False), cpu_runner(tmp_path)
    logits: list[torch.Tensor] = []
    monkeypatch.setattr("minisgl.model.cpu.runner.sample", lambda x, rows: (logits.append(x), cpu_sample(x, rows))[1])
    driver, ids = Driver(PAGES, 4), [int(t) for t in np.random.default_rng(4).integers(3, 203, 26)]
    driver.join(1)
    driver.join(3)
    for plan in (
        driver.plan([(1, ids[:15], False), (3, ids[:3], True)], []),
        driver.plan([(1, ids[15:], True)], [3]),
        driver.plan([], [1, 3]),
    ):
        assert ours.run(plan) == theirs.launch(plan).result().tokens.tolist()
        assert (ours.logits[-1] - logits[-1]).abs().max() < 1e-4 * logits[-1].abs().max()


def test_a_batch_that_stays_the_same_is_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path, layers=1, **SMALL)
    worker, driver = Interpreted(tmp_path), Driver(PAGES, 4)
    for slot in range(3):
        driver.join(slot)
    worker.run(driver.plan([(s, [1, 2, 3, 4, 5], True) for s in range(3)], []))
    worker.run(driver.plan([], [0, 1, 2]))
    sent: list[int] = []
    for ring in (worker.steps.state._plans, worker.steps.state._rows, worker.steps._inputs):
        send = ring.send
        monkeypatch.setattr(ring, "send", lambda *a, send=send, **k: (sent.append(1), send(*a, **k))[1])
    for _ in range(2):
        worker.run(driver.plan([], None, [0, 1, 2]))  # no page boundary is crossed
    assert not sent
    worker.run(driver.plan([], None, [0, 1, 2]))
    assert len(sent) == 1  # the new pages, for position 8


def test_preparing_graphs_touches_no_slot_and_no_page_of_others(tmp_path: Path) -> None:
    save_llama(tmp_path, layers=1, **SMALL)
    a, b, plans = Interpreted(tmp_path), cpu_runner(tmp_path), random_plans(3, 6)
    prepared = 0
    for plan in plans:
        with torch.inference_mode():
            while prepared < 40 and a.steps.capture_ahead():
                prepared += 1
        assert a.run(plan) == b.launch(plan).result().tokens.tolist()
    assert prepared > 5


def test_steady_state_captures_nothing_after_what_is_captured_ahead(tmp_path: Path) -> None:
    save_llama(tmp_path, layers=1, **SMALL)
    worker = Interpreted(tmp_path)
    worker.graphs.capture = lambda key, step: worker.graphs.keys.add(key)  # type: ignore[method-assign]
    while worker.steps.capture_ahead():
        pass
    ahead = set(worker.graphs.keys)
    for plan in random_plans(1, 8):
        worker.run(plan)
    assert worker.graphs.keys == ahead


def test_every_way_to_cut_rows_is_captured_ahead_and_compiled_with_it(tmp_path: Path) -> None:
    """Steps that are launched kernel by kernel cut their rows in the same ways: whatever their lengths, nothing is compiled."""
    save_llama(tmp_path, **SMALL)
    steps = Interpreted(tmp_path).steps
    ahead = set(steps._expected_graphs())
    rng = random.Random(0)
    for rows in range(1, 9):
        for _ in range(40):
            lens = [rng.randrange(1, rng.choice((20, 4000))) for _ in range(rows)]
            bucket = bucket_of(rows)
            assert (bucket, steps._splits(bucket, rows, max(lens), sum(lens))) in ahead


def test_longer_steps_are_graphs_where_launches_take_longer_than_kernels() -> None:
    small, large = (Config(random_shape(name), EngineConfig()) for name in ("qwen3-0.6b", "qwen3-14b"))
    assert launch_bound_tokens(small) > 4096
    assert launch_bound_tokens(large) < 1024
    halves = Config(large.model, EngineConfig(device="cuda", tp=2))
    assert launch_bound_tokens(halves) == pytest.approx(2 * launch_bound_tokens(large), abs=2)


@pytest.mark.parametrize("group_heads", [(6, 3), (4, 1)])
def test_the_torch_backend_agrees_with_the_kernels(tmp_path: Path, group_heads: tuple[int, int]) -> None:
    save_llama(tmp_path, layers=1, heads=group_heads[0], kv_heads=group_heads[1])
    ours, reference = Interpreted(tmp_path, graphs=False), Interpreted(tmp_path, graphs=False, backend=TorchReference)
    for plan in random_plans(5, 4):
        assert ours.run(plan) == reference.run(plan)
        error = (ours.logits[-1] - reference.logits[-1]).norm() / reference.logits[-1].norm()
        assert not error > 1e-5  # NaN only where no row samples


def test_over_a_float8_cache_the_kernels_agree_with_the_torch_backend(tmp_path: Path) -> None:
    save_llama(tmp_path, layers=1, **SMALL)
    ours = Interpreted(tmp_path, graphs=False, fp8=True)
    reference = Interpreted(tmp_path, graphs=False, fp8=True, backend=TorchReference)
    exact = Interpreted(tmp_path, graphs=False)
    for plan in random_plans(2, 3):
        for worker in (ours, reference, exact):
            worker.run(plan)
    error = float((ours.logits[0] - reference.logits[0]).norm() / reference.logits[0].norm())
    assert error < 5e-3  # float16 products
    assert float((ours.logits[0] - exact.logits[0]).norm()) > 0


def test_the_largest_step_runs_before_anything_else_and_leaves_no_trace(tmp_path: Path) -> None:
    save_llama(tmp_path, layers=1, **SMALL)
    used, fresh = Interpreted(tmp_path, step_tokens=20), cpu_runner(tmp_path)
    with torch.inference_mode():
        used.steps.run_largest()
    for plan in random_plans(6, 4):
        assert used.run(plan) == fresh.launch(plan).result().tokens.tolist()


# ---------------- sizes
def test_buckets_are_never_smaller_than_the_batch_and_waste_little() -> None:
    for rows in range(1, 1000):
        assert rows <= bucket_of(rows) <= max(2 * rows - 1, rows + 7, rows + rows // 4 + 16)


def heads(**change: Any) -> AttentionSpec:
    base = {
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 128,
        "dtype": torch.bfloat16,
        "kv_dtype": torch.bfloat16,
        "capability": 90,
    }
    return AttentionSpec(**{**base, **change})


def test_rows_are_cut_into_parts_only_where_there_are_too_few_of_them() -> None:
    assert splits_for(256, 8, 4096, 132, 2) == 1
    assert [splits_for(16, 8, 4096, 132, kv_bytes) for kv_bytes in (1, 2)] == [8, 16]
    assert splits_for(1, 8, 100, 132, 2) == 1  # one part of a short context
    assert splits_for(1, 8, 1 << 20, 132, 2) == 64


def test_ranks_of_uneven_shards_choose_the_same_graphs(tmp_path: Path) -> None:
    """A rank that captures while another replays runs its collectives once more than the other."""
    save_llama(tmp_path)  # 3 KV heads: 2 and 1
    config = config_for(tmp_path, tp=2)
    ranks = []
    for rank in range(2):
        shard = Shard.of(config.model, rank, 2)
        mine = heads(num_heads=shard.num_heads, num_kv_heads=shard.num_kv_heads)
        ranks.append(Steps(config, None, None, mine, processors=132, device=CPU))  # type: ignore[arg-type]
    assert ranks[0]._heads != ranks[1]._heads
    for rows, longest, others in ((80, 5000, 50), (256, 5000, 200), (128, 5000, 200), (1, 9, 9)):
        a, b = (steps._splits(bucket_of(rows), rows, longest, longest + (rows - 1) * others) for steps in ranks)
        assert a == b


def test_a_row_with_a_long_context_keeps_a_short_step_out_of_the_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps_module, "SHORT_CONTEXT", 20)
    save_llama(tmp_path, layers=1, **SMALL)
    worker, theirs, driver = Interpreted(tmp_path), cpu_runner(tmp_path), Driver(PAGES, 4)
    driver.join(0)
    for n, graphs in ((18, 1), (5, 1), (2, 1)):
        plan = driver.plan([(0, list(range(n)), True)], [])
        assert worker.run(plan) == theirs.launch(plan).result().tokens.tolist()
        assert len(worker.graphs.keys) == graphs


def test_paging_lists_the_pages_that_hold_tokens() -> None:
    pages = np.array([[3, 9, 9], [5, 6, 7]], np.int32)
    indptr, indices, last = paging(np.array([4, 9], np.int32), pages, 4)
    assert indptr.tolist() == [0, 1, 4]
    assert indices.tolist() == [3, 5, 6, 7]
    assert last.tolist() == [4, 1]


def ledger(**change: int) -> Ledger:
    gib = 1 << 30
    return Ledger(
        **{"total": 80 * gib, "other": gib, "weights": 28 * gib, "step": 2 * gib, "page": 1 << 20, "page_size": 16, **change}
    )


def test_the_cache_gets_its_share_of_what_is_left() -> None:
    assert ledger().room == (48 << 30)
    assert GRAPHS == 1 << 30
    assert ledger().pages(0, 0.5, 0) == 24 << 10
    assert ledger().pages(1000, 0.5, 0) == 63


@pytest.mark.parametrize(
    ("entries", "tokens", "named"),
    [
        ({}, 1 << 30, "--kv-tokens 1073741824"),
        ({"weights": 79 << 30}, 0, "--quantization fp8"),
        ({"step": 60 << 30}, 0, "--step-tokens"),
    ],
)
def test_an_impossible_cache_is_refused_with_the_numbers_to_change(entries: dict[str, int], tokens: int, named: str) -> None:
    with pytest.raises(UserError) as refused:
        ledger(**entries).pages(tokens, 0.9, 3)
    assert named in str(refused.value)
    assert "GPU 3" in str(refused.value)
    assert "GiB" in str(refused.value)


# ---------------- the choice of a backend
def nothing() -> None:
    """FlashInfer is compiled already."""


def test_flashinfer_does_prefill_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    choice = choose("auto", heads(), nothing)
    assert (choice.prefill, choice.decode, choice.remark) == ("flashinfer", "triton", "")


@pytest.mark.parametrize(
    ("change", "why"),
    [({"head_dim": 80}, "head size of 80"), ({"dtype": torch.float32}, "float32"), ({}, "not installed")],
)
def test_without_flashinfer_one_line_says_why(change: dict[str, Any], why: str) -> None:
    choice = choose("auto", heads(**change), nothing)
    assert (choice.prefill, choice.decode) == ("triton", "triton")
    assert why in choice.remark


def test_a_gpu_that_no_kernel_serves_falls_back_to_torch_and_says_so() -> None:
    choice = choose("auto", heads(capability=70), nothing)
    assert (choice.prefill, choice.decode) == ("torch", "torch")
    assert "plain torch" in choice.remark
    assert "8.0" in choice.remark


@pytest.mark.parametrize(
    ("settings", "dtype", "capability", "named"),
    [
        ({"quantization": "fp8"}, "bfloat16", 80, "--quantization fp8.*8.0"),
        ({"kv_cache_dtype": "fp8"}, "bfloat16", 86, "--kv-cache-dtype fp8.*8.6"),
        ({"quantization": "fp8"}, "float16", 90, "--dtype bfloat16"),
    ],
)
def test_float8_is_refused_where_it_cannot_be_computed(
    settings: dict[str, str], dtype: str, capability: int, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        check_float8(EngineConfig(device="cuda", **settings), dtype, capability)
    check_float8(EngineConfig(device="cuda", **settings), "bfloat16", 90)


def test_float8_wants_sizes_that_the_library_can_multiply() -> None:
    with pytest.raises(UserError, match=r"--quantization fp8.*--tp 3.*4779"):
        check_float8(EngineConfig(device="cuda", quantization="fp8", tp=3), "bfloat16", 90, [4096, 4779])


def test_uploads_larger_than_their_buffer_arrive_too() -> None:
    uploads, target = Uploads(4, 2, CPU), torch.zeros(6, dtype=torch.int32)
    parts = [np.arange(3, dtype=np.int32), np.arange(3, 6, dtype=np.int32)]
    assert uploads.send(parts).tolist() == [0, 1, 2, 3, 4, 5]
    assert uploads.send(parts, into=target) is target
    assert target.tolist() == [0, 1, 2, 3, 4, 5]
    assert uploads.send(parts[:1]).tolist() == [0, 1, 2]


def test_kernels_that_cannot_be_compiled_are_done_without_unless_they_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())

    def fails() -> None:
        raise UserError("nvcc is missing")

    assert "nvcc is missing" in choose("auto", heads(), fails).remark
    with pytest.raises(UserError, match="nvcc is missing"):
        choose("flashinfer", heads(), fails)


@pytest.mark.parametrize(
    ("asked", "change"), [("flashinfer", {"head_dim": 96}), ("triton", {"head_dim": 512}), ("triton", {"capability": 75})]
)
def test_a_backend_that_cannot_do_the_work_is_refused_by_name(asked: str, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--attention-backend {asked} cannot do"):
        choose(asked, heads(**change), nothing)


# ---------------- planted bugs
def _decode_rows_are_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    send, sent = DeviceState.set_decode, []
    monkeypatch.setattr(DeviceState, "set_decode", lambda *a: None if sent else (sent.append(1), send(*a))[1])


def _tokens_go_to_the_sorted_places(monkeypatch: pytest.MonkeyPatch) -> None:
    send = DeviceState.set_decode
    monkeypatch.setattr(DeviceState, "set_decode", lambda s, slots, order: send(s, slots[order], np.arange(len(order))))


def _lengths_do_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "sample", lambda *a, advance, **k: sample(*a, advance=False, **k))


def _grants_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        state_module, "apply_plan", lambda words, new_slots, page_grants, *a: apply_plan(words, new_slots, 0, *a)
    )


def _padding_writes_to_a_page_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    send = DeviceState.set_decode

    def set_decode(self: DeviceState, slots: Any, order: Any) -> None:
        self.page_table[self.spare] = self.page_table[int(slots[0])]
        send(self, slots, order)

    monkeypatch.setattr(DeviceState, "set_decode", set_decode)


def _a_chunk_starts_at_its_own_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "tiles_of", lambda lens, slots, kv, *a, **k: tiles_of(lens, slots, lens, *a, **k))


@pytest.mark.parametrize(
    "plant",
    [
        _decode_rows_are_not_sent_again,
        _tokens_go_to_the_sorted_places,
        _lengths_do_not_grow,
        _grants_are_lost,
        _padding_writes_to_a_page_of_others,
        _a_chunk_starts_at_its_own_beginning,
    ],
)
def test_planted_bugs_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    save_llama(tmp_path, layers=1, **SMALL)
    plant(monkeypatch)
    ours, theirs = Interpreted(tmp_path), cpu_runner(tmp_path)
    noticed = False
    for plan in random_plans(0, 16):
        want = theirs.launch(plan).result().tokens.tolist()
        if noticed := ours.run(plan) != want:
            break
    assert noticed
