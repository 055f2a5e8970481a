"""What routers read of a server: routes and fields by the names that vllm-router, smg, SGLang's router and llm-d look for."""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from processes import eventually
from test_server import CHAT, COMPLETION, USER, ScriptedEngine, Server, ask, check_error, play
from test_system import ServerProcess

from minisgl.api.engine import Prompt, TextPrompt
from minisgl.api.http.router_routes import Rate
from minisgl.errors import RequestError
from minisgl.version import __version__


class Rendering(ScriptedEngine):
    """Its tokens are the bytes of the prompt."""

    def tokenize(self, prompt: Prompt, on_ids: Any, *_: Any) -> int:
        on_ids(tuple(prompt.text.encode() if isinstance(prompt, TextPrompt) else prompt.payload[:4]))
        return 0

    def close(self, uid: int) -> None: ...


def test_render_gives_the_tokens_of_a_request_in_the_shape_of_vllm_and_starts_none() -> None:
    async def scene(engine: Any, http: Server) -> None:
        body = {"messages": USER, "max_tokens": 7, "temperature": 0.5, "stream": True, "priority": -2}
        status, _, raw = await ask(http, f"{CHAT}/render", body)
        assert status == 200
        got = json.loads(raw)
        assert got["token_ids"] == list(b'{"me')
        assert (got["model"], got["stream"], got["priority"]) == ("tiny", True, -2)
        assert got["request_id"]
        assert (got["sampling_params"]["max_tokens"], got["sampling_params"]["temperature"]) == (7, 0.5)
        status, _, raw = await ask(http, f"{COMPLETION}/render", {"prompt": ["ab", "c"]})
        assert status == 200
        assert [r["token_ids"] for r in json.loads(raw)] == [[97, 98], [99]]
        status, _, raw = await ask(http, f"{COMPLETION}/render", {"prompt": [5, 6, 7]})
        assert [r["token_ids"] for r in json.loads(raw)] == [[5, 6, 7]]
        assert not engine.opened
        for path, bad in ((CHAT, {}), (CHAT, {"messages": []}), (COMPLETION, {"prompt": 5})):
            status, headers, raw = await ask(http, f"{path}/render", bad)
            assert status == 400
            check_error(status, headers, raw)
        engine.refuse = RequestError("full", status=429)
        assert (await ask(http, f"{COMPLETION}/render", {"prompt": "ab"}))[0] == 200, "it takes no place in the queue"

    play(scene, Rendering)


@pytest.mark.parametrize("path", ["/v1/loads", "/v1/loads?include=core,disagg,queues,memory"])
def test_loads_are_there_by_the_names_of_sglang(path: str) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stats = {"running_requests": 3, "waiting_requests": 2, "compiling_requests": 1, "total_pages": 10}
        engine.stats |= {"free_pages": 4, "evictable_pages": 1, "prompt_tokens": 40, "cached_tokens": 10}
        status, _, raw = await ask(http, path, method="GET")
        assert status == 200
        got = json.loads(raw)
        assert got["version"] == __version__
        assert got["timestamp"]
        (load,) = got["loads"]
        assert load.pop("utilization") == pytest.approx(3 / 128)
        want = {"dp_rank": 0, "num_running_reqs": 3, "num_waiting_reqs": 3, "num_used_tokens": 80, "max_total_num_tokens": 160}
        want |= {"token_usage": 0.5, "gen_throughput": 0.0, "cache_hit_rate": 0.25, "max_running_requests": 128}
        assert load == want
        engine.stats = {}
        assert json.loads((await ask(http, path, method="GET"))[2])["loads"][0]["token_usage"] == 0.0, "before it is ready"

    play(scene)


def test_a_rate_is_of_a_second_at_least_and_never_negative() -> None:
    now = 0.0
    rate = Rate(lambda: now)
    assert rate(50) == 0.0
    now = 2.0
    assert rate(100) == 50.0
    now = 2.5
    assert rate(500) == 50.0
    now = 4.0
    assert rate(100) == 0.0


def test_the_server_tells_its_model_and_sizes_by_the_names_that_routers_look_for() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stats = {"running_requests": 0, "total_pages": 10}
        for path in ("/model_info", "/get_model_info"):
            got = json.loads((await ask(http, path, method="GET"))[2])
            assert got["model_path"] == got["tokenizer_path"] == got["served_model_name"] == "tiny"
            assert got["is_generation"] is True
        info = json.loads((await ask(http, "/server_info", method="GET"))[2])
        want = {"model": "tiny", "model_path": "tiny", "served_model_name": "tiny", "tp_size": 1, "dp_size": 1}
        want |= {"context_length": 64, "max_total_tokens": 160, "max_running_requests": 128, "version": __version__}
        assert {name: info[name] for name in want} == want
        assert info["kv_events"] is None
        model, *_ = json.loads((await ask(http, "/v1/models", method="GET"))[2])["data"]
        assert {"id", "root", "max_model_len", "owned_by"} <= model.keys()
        assert json.loads((await ask(http, "/version", method="GET"))[2]) == {"version": __version__}

    play(scene)


def test_server_info_says_where_kv_events_are() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        info = json.loads((await ask(http, "/server_info", method="GET"))[2])
        assert info["kv_events"]["endpoint_port_base"] == 5557
        assert info["kv_events"]["replay_endpoint_port_base"] == 5558
        assert info["kv_events"]["block_size"] == 16

    play(scene, kv_events="tcp://*:5557", kv_events_replay="tcp://*:5558")


POLLED = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "sglang:token_usage",
    "sglang:num_running_reqs",
    "sglang:num_queue_reqs",
)


def test_the_metrics_that_routers_poll_are_there_under_their_names() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stats = {"running_requests": 1, "total_pages": 10}
        text = (await ask(http, "/metrics", method="GET"))[2].decode()
        for name in POLLED:
            assert f"\n{name}{{" in text, name

    play(scene)


def test_a_request_keeps_the_id_of_its_router() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for path, body in ((CHAT, {"messages": USER}), (COMPLETION, {"prompt": "a"}), (f"{CHAT}/render", {})):
            headers = (await ask(http, path, body, headers={"X-Request-Id": "router-7"}))[1]
            assert headers["x-request-id"] == "router-7"

    play(scene)


def test_a_router_sees_that_a_server_drains_and_its_last_stream_ends(tmp_path: Path) -> None:
    """SIGTERM: /ready is 503 at once, new requests are refused, and /health is 200 until the stream has ended."""
    server = ServerProcess(tmp_path, "--drain-seconds", "60", "--device", "cpu")
    body = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 1000, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    states: list[tuple[int, int]] = []

    def status(path: str) -> int:
        try:
            with urllib.request.urlopen(f"{server.url}{path}", timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as e:
            return e.code

    with urllib.request.urlopen(request, timeout=60) as stream:
        first = stream.readline()
        assert (status("/ready"), status("/health")) == (200, 200)
        server.proc.send_signal(signal.SIGTERM)
        eventually(lambda: status("/ready") == 503)
        states.append((status("/ready"), status("/health")))
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(request, timeout=30)
        states.append((status("/ready"), status("/health")))
        text = first + stream.read()
    assert states == [(503, 200)] * 2
    assert text.rstrip().endswith(b"data: [DONE]")
    assert text.count(b"data: ") > 10
    assert server.proc.wait(60) == 0
