"""The edges of the API: the last token of the context, values at the end of their range, paths as clients write them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from conftest import World, fake_config, fake_spec
from scripted import CHATML, save_scripted, serve
from scripted import Server as LiveServer
from test_server import ScriptedEngine, Server, ask, play
from tiny_models import save_byte_tokenizer, save_llama

from minisgl import LLM, SamplingParams
from minisgl.api.endpoints.table import ENDPOINTS
from minisgl.api.engine import TokenPrompt
from minisgl.api.requests.fields import Support
from minisgl.api.requests.unknown_fields import ignored_header
from minisgl.config import Config, EngineConfig, ServerConfig
from minisgl.errors import RequestError
from minisgl.sampling_params import Finish, RequestOptions
from minisgl.version import __version__

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
    async def scene(engine: ScriptedEngine, http: Server) -> None:
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


# ---------------- values and fields at the edge, in a real server with a scripted model
CHAT, EMBED = "/v1/chat/completions", "/v1/embeddings"
HELLO = [{"role": "user", "content": "hi"}]
SHOUT = "{% for m in messages %}{{ m.content | upper }}{% endfor %}{{ '!' }}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    cut = ["<tool_call>", '{"name": "f", "arguments": ', '{"city": "', "Par", 'is"}}', "</tool_call>"]
    scripts = {"\n": ["Hello", " world", " again"], "!": ["Louder"], "?": cut}
    model = save_scripted(tmp_path_factory.mktemp("scripted"), CHATML, scripts)
    flags = ("--trust-request-chat-template", "--tool-call-parser", "hermes", "--max-context", "256", "--page-size", "4")
    with serve("--model", model, *flags) as live:
        yield live


def said(server: LiveServer, **fields: Any) -> str:
    body = {"messages": HELLO, "temperature": 0, "max_tokens": 20, **fields}
    content: str = server.post(CHAT, body)["choices"][0]["message"]["content"]
    assert server.streamed(body)["content"] == content
    return content


def test_an_answer_can_go_on_with_the_last_message(server: LiveServer) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Hello"}]
    assert said(server, messages=begun, continue_final_message=True) == " world again"
    assert said(server, messages=begun) == "Hello world again"
    raw = server.post("/v1/messages", {"max_tokens": 20, "temperature": 0, "messages": begun})
    assert [block["text"] for block in raw["content"]] == [" world again"]
    n = server.post("/v1/messages/count_tokens", {"messages": begun})["input_tokens"]
    assert n == raw["usage"]["input_tokens"] + raw["usage"]["cache_read_input_tokens"]
    both = {"continue_final_message": True, "add_generation_prompt": True}
    status, error = server.refused(CHAT, {"messages": begun, **both})
    assert (status, error["error"]["param"]) == (400, "continue_final_message")
    lengths = [
        len(server.post("/tokenize", {"messages": begun, **kw})["tokens"]) for kw in ({}, {"continue_final_message": True})
    ]
    assert lengths[1] == n < lengths[0]


def test_a_prompt_can_end_with_the_last_message(server: LiveServer) -> None:
    with_turn, without = (server.post("/tokenize", {"messages": HELLO, "add_generation_prompt": a}) for a in (True, False))
    assert with_turn["tokens"][: without["count"]] == without["tokens"] != with_turn["tokens"]


def test_a_request_brings_a_template_where_the_operator_trusts_them(server: LiveServer) -> None:
    assert said(server, chat_template=SHOUT) == "Louder"
    assert server.post("/tokenize", {"messages": HELLO, "chat_template": SHOUT})["count"] == len("HI!")
    for broken in ("{% if %}", "{{ raise_exception('no') }}"):
        status, error = server.refused(CHAT, {"messages": HELLO, "chat_template": broken})
        assert (status, error["error"]["type"]) == (400, "invalid_request_error")
    for path, body in LEAST.items():
        if "chat_template" in {f.name for f in ENDPOINTS[path].fields.having(Support.SUPPORTED)} and path != EMBED:
            with pytest.raises(RequestError, match="--trust-request-chat-template"):
                ENDPOINTS[path].parse(fake_config(), {**body, "chat_template": SHOUT})


def test_a_call_that_was_cut_off_can_be_sent_back(server: LiveServer) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    ask = {"messages": HELLO, "tools": tools, "chat_template": CHATML + "?", "temperature": 0, "max_tokens": 4}
    choice = server.post(CHAT, ask)["choices"][0]
    assert choice["finish_reason"] == "length"
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"city": "Par'
    told = [*HELLO, choice["message"], *HELLO]
    assert server.post(CHAT, {**ask, "messages": told})["choices"][0]["finish_reason"] == "length"
    prompt = server.post("/detokenize", {"tokens": server.post("/tokenize", {"messages": told})["tokens"]})["prompt"]
    assert '{"name": "f", "arguments": {"city": "Par}' in prompt  # as text: this template knows no calls
    flat = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    ask = {"input": HELLO, "tools": [flat], "chat_template": CHATML + "?", "temperature": 0, "max_output_tokens": 4}
    answer = server.post("/v1/responses", ask)
    assert answer["status"] == "incomplete"
    assert server.post("/v1/responses", {**ask, "input": [*HELLO, *answer["output"], *HELLO]})["status"] == "incomplete"


def test_top_p_of_zero_takes_the_likeliest_token() -> None:
    params = SamplingParams(top_p=0, temperature=1.3)
    assert (params.temperature, params.top_p) == (0.0, 1.0)
    request = ENDPOINTS["/v1/responses"].parse(fake_config(), {"input": "hi", "top_p": 0})
    assert request.chat.params.temperature == 0
    assert request.echoed["top_p"] == 0


def test_inputs_to_embed_are_cut_at_the_context_where_that_is_asked_for(server: LiveServer) -> None:
    def vectors(**body: Any) -> tuple[list[list[float]], int]:
        answer = server.post(EMBED, body)
        return [d["embedding"] for d in answer["data"]], answer["usage"]["prompt_tokens"]

    long = "0123456789" * 3000  # far beyond four contexts
    for value in (long, [long, long], [48 + i % 10 for i in range(300)], [[50] * 300, [51] * 2]):
        status, error = server.refused(EMBED, {"input": value})
        assert (status, error["error"]["code"], error["error"]["param"]) == (400, "context_length_exceeded", "input")
    found, n = vectors(input=[long, long[:256], "0"], truncate_prompt_tokens=-1)
    assert n == 2 * 256 + 1
    assert found[0] == found[1]
    assert vectors(input=long, truncate_prompt_tokens=7) == vectors(input=long[:7])
    ids = server.post("/tokenize", {"prompt": long[:256]})["tokens"]
    assert vectors(input=[*ids, 9], truncate_prompt_tokens=-1)[0] == [found[0]]
    chat = [{"role": "user", "content": [{"type": "text", "text": long}]}]
    assert vectors(messages=chat, truncate_prompt_tokens=-1)[1] == 256
    for bad in (0, -2, 257):
        status, error = server.refused(EMBED, {"input": "a", "truncate_prompt_tokens": bad})
        assert (status, error["error"]["param"]) == (400, "truncate_prompt_tokens")


def test_a_conversation_can_be_embedded(server: LiveServer) -> None:
    ids = server.post("/tokenize", {"messages": HELLO, "add_generation_prompt": False})["tokens"]
    by_messages, by_ids = (server.post(EMBED, body) for body in ({"messages": HELLO}, {"input": ids}))
    assert by_messages["data"] == by_ids["data"]
    assert by_messages["usage"]["prompt_tokens"] == len(ids)
    for body in ({}, {"input": "a", "messages": HELLO}):
        assert server.refused(EMBED, body)[0] == 400


def test_the_tokens_of_a_response_are_those_that_it_reports(server: LiveServer) -> None:
    body = {"input": HELLO, "instructions": "Be brief."}
    told = server.post("/v1/responses/input_tokens", body)
    assert told == {"object": "response.input_tokens", "input_tokens": told["input_tokens"]}
    usage = server.post("/v1/responses", {**body, "max_output_tokens": 1})["usage"]
    assert usage["input_tokens"] == told["input_tokens"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/input_tokens", EMBED, "/v1/completions", CHAT, "/generate"])
def test_what_the_engine_refuses_is_named_by_the_clients_field(server: LiveServer, path: str) -> None:
    field = {CHAT: "messages", "/v1/completions": "prompt", "/generate": "text"}.get(path, "input")
    long = "0123456789" * 27
    many = long * 100  # refused before it is tokenized
    for text in (long, long * 5, many):
        if path == "/v1/responses/input_tokens" and text != many:
            continue  # it counts what would be refused
        status, error = server.refused(path, {field: [{"role": "user", "content": text}] if field == "messages" else text})
        assert (status, error["error"]["param"], error["error"]["code"]) == (400, field, "context_length_exceeded")
        assert f"length of the {field} or" in error["error"]["message"]
    if field == "input" and path != EMBED:
        body = {"input": "hi", "chat_template": "{{ raise_exception('no') }}"}
        assert server.refused(path, body)[1]["error"]["param"] == "input"


# ---------------- paths as clients write them
def test_paths_may_end_with_a_slash() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for path in ("/v1/models", "/v1/models/tiny", "/health", "/version"):
            for slash in ("", "/", "//"):
                assert (await ask(http, path + slash, method="GET"))[0] == 200, path + slash
        for path, body in LEAST.items():
            if path not in (EMBED, "/v1/messages/count_tokens", "/v1/responses/input_tokens"):
                assert (await ask(http, path + "/", body))[0] == 200
        assert (await ask(http, "/v1/messages/?beta=true", LEAST["/v1/messages"]))[0] == 200
        for path, status in (("/v1/nothing/", 404), ("/v1/docs/", 404), (CHAT + "/", 405)):
            got, _, raw = await ask(http, path, method="GET")
            assert (got, json.loads(raw)["error"]["type"]) == (status, "invalid_request_error")
        metrics = (await ask(http, "/metrics", method="GET"))[2].decode()
        assert '"/v1/models"' in metrics
        assert '/"' not in metrics.replace('"/"', "")

    play(scene)

    async def locked(engine: ScriptedEngine, http: Server) -> None:
        assert (await ask(http, "/v1/models/", method="GET"))[0] == 401

    play(locked, api_keys=("k",))


def test_a_load_balancer_can_ask_for_life_and_a_client_for_the_version() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for method in ("GET", "POST"):
            assert (await ask(http, "/ping", method=method))[0] == 200
        assert json.loads((await ask(http, "/version", method="GET"))[2]) == {"version": __version__}
        engine.state = "dead"
        assert (await ask(http, "/ping", method="GET"))[0] == 503

    play(scene, api_keys=())


def test_models_have_anthropics_fields_for_anthropics_clients() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        version = {"anthropic-version": "2023-06-01"}
        page = json.loads((await ask(http, "/v1/models", method="GET", headers=version))[2])
        assert (page["has_more"], page["first_id"], page["last_id"]) == (False, "tiny", "org/alias")
        for model in page["data"]:
            assert (model["type"], model["display_name"], model["lifecycle"]) == ("model", model["id"], "active")
            assert datetime.fromisoformat(model["created_at"].replace("Z", "+00:00"))
            one = json.loads((await ask(http, f"/v1/models/{model['id']}", method="GET", headers=version))[2])
            assert one == model
        status, _, raw = await ask(http, "/v1/models/claude", method="GET", headers=version)
        assert (status, json.loads(raw)["error"]["type"]) == (404, "not_found_error")
        plain = json.loads((await ask(http, "/v1/models", method="GET"))[2])
        assert plain["object"] == "list"
        assert "has_more" not in plain

    play(scene)


# ---------------- the prefix cache, where clients look for it
def test_cached_tokens_are_told_in_every_dialect_and_form(server: LiveServer) -> None:
    text = "a prompt that is long enough for several pages of four tokens"
    bodies: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": text}], "max_tokens": 2},
        "/v1/completions": {"prompt": text, "max_tokens": 2},
        "/v1/responses": {"input": text, "max_output_tokens": 2},
        "/v1/messages": {"messages": [{"role": "user", "content": text}], "max_tokens": 2},
        "/generate": {"text": text, "sampling_params": {"max_new_tokens": 2}},
    }

    def cached(path: str, last: dict[str, Any]) -> int:
        if path == "/generate":
            return int(last["meta_info"]["cached_tokens"])
        usage = last.get("response", last)["usage"]
        if path == "/v1/messages":
            return int(usage["cache_read_input_tokens"])
        return int(usage["input_tokens_details" if "responses" in path else "prompt_tokens_details"]["cached_tokens"])

    for path, body in bodies.items():
        server.post(path, body)
        n = cached(path, server.post(path, body))
        assert n >= 40, path
        options = {"stream_options": {"include_usage": True}} if path in (CHAT, "/v1/completions") else {}
        status, raw, _ = server.raw("POST", path, {**body, "stream": True, **options})
        events = [json.loads(line[6:]) for line in raw.decode().splitlines() if line.startswith("data: {")]
        counted = [e for e in events if e.get("response", e).get("usage") or "meta_info" in e]
        assert (status, cached(path, counted[-1])) == (200, n)
    assert cached("/generate", server.post("/generate", bodies["/generate"])) == n


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("options", [{}, {"include_usage": True}, {"continuous_usage_stats": True}])
def test_sglangs_benchmark_finds_the_cache_in_an_event_with_a_choice(path: str, options: dict[str, bool]) -> None:
    """It reads choices[0] of every event of a completion, and the details from whatever event has them."""

    async def scene(engine: ScriptedEngine, http: Server) -> None:
        told = {"cached_tokens_details": {"device": 2, "host": 0}}
        body = {**LEAST[path], "return_cached_tokens_details": True, "n": 2}
        assert json.loads((await ask(http, path, body))[2])["sglext"] == told
        _, _, raw = await ask(http, path, {**body, "stream": True, "stream_options": options})
        events = [json.loads(line[6:]) for line in raw.decode().splitlines() if line.startswith("data: {")]
        [found] = [e for e in events if "sglext" in e]
        assert found["sglext"] == told
        assert found["choices"][0]["index"] == 0
        assert found["choices"][0]["finish_reason"] == "stop"
        assert all(e["choices"] for e in events[:-1])
        for streaming in (False, True):
            _, _, raw = await ask(http, path, {**LEAST[path], "stream": streaming})
            assert b"sglext" not in raw

    play(scene)
