"""The edges of the API: the last token of the context, values at the end of their range, paths as clients write them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import World, fake_config
from tiny_models import save_byte_tokenizer, save_llama

from minisgl import LLM, SamplingParams
from minisgl.api.engine import TokenPrompt
from minisgl.errors import RequestError
from minisgl.sampling_params import Finish, RequestOptions

# ---------------- the end of the context
CONTEXT = 64
IDS = [int(t) for t in np.random.default_rng(5).integers(1, 20, CONTEXT + 1)]
ALONE: dict[str, tuple[dict[str, Any], RequestOptions]] = {  # prompts that are not continued
    "echo": ({"max_tokens": 0, "echo": True}, RequestOptions()),
    "mean": ({"max_tokens": 1}, RequestOptions(pooling="mean")),
    "last": ({"max_tokens": 1}, RequestOptions(pooling="last")),
}


@pytest.mark.parametrize("lag", [1, 2])
@pytest.mark.parametrize("kv_tokens", [CONTEXT, 160])  # the KV cache holds the context and nothing else, or more
@pytest.mark.parametrize("kind", ALONE)
def test_a_prompt_alone_may_fill_the_context_to_its_last_token(lag: int, kv_tokens: int, kind: str) -> None:
    world = World(0, fake_config(kv_tokens=kv_tokens, lag=lag, tp=1))
    params, options = ALONE[kind]
    for n in (CONTEXT - 1, CONTEXT, CONTEXT):  # also with the pages of the one before in the cache
        uid = world.submit(IDS[:n], options=options, **params)
        world.system.run()
        assert world.ends[uid] in (Finish.LENGTH, Finish.STOP), n
    with pytest.raises(RequestError, match="maximum context"):
        world.submit(IDS, options=options, **params)
    uid = world.submit(IDS[: CONTEXT - 1], 1)
    world.system.run()
    assert world.ends[uid] in (Finish.LENGTH, Finish.STOP)
    with pytest.raises(RequestError, match="maximum context"):  # an answer needs room
        world.submit(IDS[:CONTEXT], 1)
    world.close()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, LLM]]:
    """A tiny Llama with a context of CONTEXT tokens and a KV cache that has no more, and with twice of both."""
    path = tmp_path_factory.mktemp("tiny")
    save_llama(path)
    save_byte_tokenizer(path)
    sizes = [{"max_context": n, "kv_tokens": n, "step_tokens": 24, "max_running": 8} for n in (CONTEXT, 2 * CONTEXT)]
    small, large = (LLM(str(path), processes=False, quantization="none", **size) for size in sizes)
    yield small, large
    small.close()
    large.close()


def test_the_scores_of_a_prompt_that_fills_the_context_are_those_in_a_larger_one(engines: tuple[LLM, LLM]) -> None:
    params = SamplingParams(max_tokens=0, echo=True, logprobs=1)
    for n in (CONTEXT, CONTEXT - 1):
        full, free = (engine.generate([IDS[:n]], params)[0] for engine in engines)
        assert full.error is None
        assert full.prompt_tokens == n
        assert len(full.logprobs) == n
        assert [t.logprob for t in full.logprobs[1:]] == pytest.approx([t.logprob for t in free.logprobs[1:]], abs=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_vector_of_a_prompt_that_fills_the_context_is_that_in_a_larger_one(engines: tuple[LLM, LLM], pooling: str) -> None:
    vectors = []
    for engine in engines:
        said: list[Any] = []
        engine.system.gateway.open(
            TokenPrompt(tuple(IDS[:CONTEXT])), SamplingParams(max_tokens=1), said.append, RequestOptions(pooling=pooling)
        )
        while engine.system.gateway.open_requests:
            engine.system.pump(1.0)
        assert not isinstance(said[-1], RequestError), said[-1].message
        vectors.append(said[-1].vector)
    np.testing.assert_allclose(*vectors, atol=1e-5)
