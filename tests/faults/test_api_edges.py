"""The edges of the API: the last token of the context, values at the end of their range, paths as clients write them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import World, fake_config, fake_spec
from test_server import FakeEngine, Server, ask, play
from tiny_models import save_byte_tokenizer, save_llama

from minisgl import LLM, SamplingParams
from minisgl.api.endpoints.table import ENDPOINTS
from minisgl.api.engine import TokenPrompt
from minisgl.api.requests.fields import Support
from minisgl.api.requests.unknown_fields import ignored_header
from minisgl.config import Config, EngineConfig, ServerConfig
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


# ---------------- every field of the SDKs is supported, reported as ignored, or refused
OPENAI = {  # path -> the request's type in openai
    "/v1/chat/completions": "chat.completion_create_params.CompletionCreateParamsStreaming",
    "/v1/completions": "completion_create_params.CompletionCreateParamsStreaming",
    "/v1/responses": "responses.response_create_params.ResponseCreateParamsStreaming",
    "/v1/responses/input_tokens": "responses.input_token_count_params.InputTokenCountParams",
    "/v1/embeddings": "embedding_create_params.EmbeddingCreateParams",
}
ANTHROPIC = {  # path -> the fields in anthropic 2.14, the beta included
    "/v1/messages": (
        "betas billing_policy cache_control compaction container context_management diagnostics fallback_credit_token "
        "fallbacks inference_geo max_tokens mcp_servers messages metadata model output_config service_tier speed "
        "stop_sequences stream system thinking thread tool_choice tools user_profile_id workspace_id"
    ),
    "/v1/messages/count_tokens": (
        "betas billing_policy cache_control compaction context_management mcp_servers messages model output_config speed "
        "system thinking tool_choice tools user_profile_id workspace_id"
    ),
}
LEAST: dict[str, dict[str, Any]] = {  # the smallest bodies
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/responses/input_tokens": {"input": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/v1/messages": {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
}


def type_of(package: str, name: str) -> set[str]:
    """The fields of a TypedDict."""
    module, _, kind = f"{package}.types.{name}".rpartition(".")
    found = getattr(importlib.import_module(module), kind)
    return set(found.__required_keys__ | found.__optional_keys__)


@pytest.mark.parametrize("path", OPENAI)
def test_every_field_of_openais_requests_is_declared(path: str) -> None:
    assert not type_of("openai", OPENAI[path]) - {field.name for field in ENDPOINTS[path].fields}


@pytest.mark.parametrize("path", ANTHROPIC)
def test_every_field_of_anthropics_requests_is_declared(path: str) -> None:
    declared = {field.name for field in ENDPOINTS[path].fields}
    assert not set(ANTHROPIC[path].split()) - declared
    pytest.importorskip("anthropic")
    name = "CountTokens" if "count" in path else "Create"
    module = "message_count_tokens_params" if "count" in path else "message_create_params"
    for beta in ("", "beta."):
        kind = f"Message{name}Params{'' if 'count' in path else 'Streaming'}"
        assert not type_of("anthropic", f"{beta}{module}.{kind}") - declared


@pytest.mark.parametrize("path", LEAST)
def test_a_refused_field_is_named_and_its_neutral_values_are_not_refused(path: str) -> None:
    endpoint = ENDPOINTS[path]
    for field in endpoint.fields.having(Support.REFUSED):
        with pytest.raises(RequestError) as e:
            endpoint.parse(fake_config(), {**LEAST[path], field.name: {"type": "x"}})
        assert e.value.param == field.name
        assert field.name in e.value.message
        assert e.value.status == 400
        for value in (None, *field.neutral):
            assert endpoint.parse(fake_config(), {**LEAST[path], field.name: value}).ignored == ()


@pytest.mark.parametrize("path", LEAST)
def test_a_harmless_field_is_reported_as_ignored_also_with_strict(path: str) -> None:
    endpoint = ENDPOINTS[path]
    names = [f.name for f in endpoint.fields.having(Support.HARMLESS) if path != "/v1/messages/count_tokens"]
    for name in names or ["cache_control"]:
        parsed = endpoint.parse(fake_config(), {**LEAST[path], name: True if name == "store" else "x"})
        assert parsed.ignored == (name,)
        strict = Config(fake_spec(), EngineConfig(), ServerConfig(strict=True))
        assert ignored_header(strict, endpoint.fields, parsed.ignored) == {"X-Ignored-Params": name}
    with pytest.raises(RequestError, match="colour"):
        ignored_header(strict, endpoint.fields, (*parsed.ignored, "colour"))


@pytest.mark.parametrize("thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_thread_is_refused_with_the_details_that_have_the_sdks_send_the_whole_history(
    thread: dict[str, Any], stream: bool
) -> None:
    async def scene(engine: FakeEngine, http: Server) -> None:
        for path in ("/v1/messages", "/v1/messages?beta=true"):
            status, _, raw = await ask(http, path, {**LEAST["/v1/messages"], "stream": stream, "thread": thread})
            error = json.loads(raw)["error"]
            assert (status, json.loads(raw)["type"], error["type"]) == (400, "error", "invalid_request_error")
            assert error["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
            assert "thread" in error["message"]
            assert (await ask(http, path, {**LEAST["/v1/messages"], "thread": None}))[0] == 200

    play(scene)


@pytest.mark.parametrize("field", ["allowed_token_ids", "stop_regex", "prompt_embeds", "thinking_token_budget", "moderation"])
def test_what_other_servers_know_and_this_one_does_not_is_not_ignored(field: str) -> None:
    for path in ("/v1/chat/completions", "/v1/responses") + (
        () if field == "moderation" else ("/v1/completions", "/v1/messages")
    ):
        with pytest.raises(RequestError, match=field):
            ENDPOINTS[path].parse(fake_config(), {**LEAST[path], field: [1]})


def test_verbosity_is_reported_unless_it_asks_for_nothing() -> None:
    parse, body = ENDPOINTS["/v1/chat/completions"].parse, LEAST["/v1/chat/completions"]
    assert [parse(fake_config(), {**body, "verbosity": v}).ignored for v in ("low", "medium", None)] == [("verbosity",), (), ()]
    with pytest.raises(RequestError, match="verbosity must be one of"):
        parse(fake_config(), {**body, "verbosity": "loud"})
