"""What the operator sees: load lines while there is load, refusals with their reasons, a line a request on demand."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from test_batches import Stored, request_line, submit
from test_batches import serve as serve_stored
from test_malformed_http import say as say_bytes
from test_server import CHAT, COMPLETION, DIED, OVERLOADED, TEXT, ScriptedEngine, Server, ask, play

from minisgl import logs
from minisgl.api.caller import Callers
from minisgl.api.engine import Chunk, TextPrompt
from minisgl.api.http.load import SECONDS, LoadLines
from minisgl.api.http.metrics import Metered
from minisgl.api.request_log import RequestLog
from minisgl.errors import RequestError
from minisgl.sampling_params import Finish, SamplingParams

SECRET = "the-secret-of-the-prompt"
CHAT_BODY = {"messages": [{"role": "user", "content": SECRET}]}


# ---------------- what was said
class Heard(logging.Handler):
    """Keeps the records, and renders each in both formats."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def of(self, event: str) -> list[dict[str, Any]]:
        return [r.fields for r in self.records if getattr(r, "event", "") == event]  # type: ignore[attr-defined]

    def texts(self, event: str) -> list[str]:
        return [logs.TextLines(False).format(r)[9:] for r in self.records if getattr(r, "event", "") == event]

    def everything(self) -> str:
        return "\n".join(f(r) for r in self.records for f in (logs.TextLines(False).format, logs.JsonLines().format))


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler = Heard()
    logs.LOGGER.addHandler(handler)
    logs.LOGGER.setLevel(logging.INFO)
    yield handler
    logs.LOGGER.removeHandler(handler)
    logs.LOGGER.setLevel(logging.NOTSET)


# ---------------- load
class Clock:
    """Time that only the test moves, and the event loop's timer."""

    def __init__(self) -> None:
        self.now, self.timers = 100.0, []

    def __call__(self) -> float:
        return self.now

    def later(self, seconds: float, call: Callable[[], None]) -> Any:
        timer = Timer(self.now + seconds, call)
        self.timers.append(timer)
        return timer

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while due := sorted((t for t in self.timers if t.at <= end), key=lambda t: t.at):
            self.now = due[0].at
            self.timers.remove(due[0])
            if not due[0].cancelled:
                due[0].call()
        self.now = end


class Timer:
    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at, self.call, self.cancelled = at, call, False

    def cancel(self) -> None:
        self.cancelled = True


class Loaded:
    """A metered engine whose statistics the test sets."""

    def __init__(self) -> None:
        self.engine, self.clock = ScriptedEngine(), Clock()
        self.engine.stats = dict.fromkeys(
            ("running_requests", "prefill_tokens", "prompt_tokens", "cached_tokens", "retractions", "warmups"), 0
        ) | {"total_pages": 100, "free_pages": 100, "evictable_pages": 0}
        self.metered, self.request_log = Metered(self.engine), RequestLog(now=self.clock)
        self.lines = LoadLines(self.metered, self.request_log, self.clock.later)

    def begin(self) -> Any:
        """A request that is open until the returned function is called."""
        context = self.request_log.request("POST /v1/x", "http", "id")
        account = context.__enter__()
        uid = len(self.engine.live)
        self.engine.live[uid] = lambda _: None

        def end(status: int = 200, error: RequestError | None = None) -> None:
            account.status = status
            if error is not None:
                account.fail(error)
            del self.engine.live[uid]
            context.__exit__(None, None, None)

        return end


def test_an_idle_server_says_nothing_and_has_no_timer(heard: Heard) -> None:
    loaded = Loaded()
    loaded.clock.advance(1000)
    assert not loaded.clock.timers
    assert not heard.records


def test_load_is_a_line_every_five_seconds_and_a_last_one(heard: Heard) -> None:
    loaded = Loaded()
    stats, metrics = loaded.engine.stats, loaded.metered.metrics
    stats |= {"prefill_tokens": 1000, "prompt_tokens": 900, "cached_tokens": 90}  # of earlier load
    end, end_other = loaded.begin(), loaded.begin()
    stats |= {"running_requests": 1, "prefill_tokens": 1500, "prompt_tokens": 1900, "cached_tokens": 590}
    stats |= {"free_pages": 60, "evictable_pages": 30, "retractions": 2}
    metrics.generation_tokens += 100
    loaded.clock.advance(SECONDS)
    metrics.generation_tokens += 30
    loaded.clock.advance(SECONDS)
    loaded.clock.advance(2)
    metrics.generation_tokens += 7
    stats |= {"running_requests": 0}  # of the pages the scheduler has not told yet
    end()
    end_other()
    loaded.clock.advance(1000)
    first, second, last = heard.of("load")
    assert (first["running"], first["waiting"]) == (1, 1)
    assert (first["prompt_tokens_per_s"], first["generated_tokens_per_s"]) == (100.0, 20.0)
    assert (first["cache_hit_share"], first["kv_filled_share"], first["kv_used_share"]) == (0.5, 0.4, 0.1)
    assert (first["preemptions"], second["preemptions"]) == (2, 0)
    assert (second["prompt_tokens_per_s"], second["generated_tokens_per_s"], second["cache_hit_share"]) == (0.0, 6.0, None)
    assert (last["running"], last["waiting"], last["idle"], last["load_seconds"]) == (0, 0, True, 12.0)
    assert (last["seconds"], last["generated_tokens_per_s"]) == (2.0, 3.5), "the rate is that of the time with load"
    assert heard.texts("load") == [
        "load: 1 running, 1 waiting, 100 tok/s in, 20 tok/s out, cache hits 50 %, KV cache 40 % filled, 10 % in use, "
        "2 preempted",
        "load: 1 running, 1 waiting, 0 tok/s in, 6 tok/s out, KV cache 40 % filled, 10 % in use",
        "load: 0 running, 0 waiting, 0 tok/s in, 3.5 tok/s out, KV cache 40 % filled, 0 % in use, idle after 12.0 s",
    ]
    assert not loaded.clock.timers


def test_load_that_ends_without_another_token_has_its_last_line_too(heard: Heard) -> None:
    loaded = Loaded()
    end = loaded.begin()
    loaded.clock.advance(SECONDS + 1)
    end(499)
    loaded.clock.advance(60)
    assert [line["idle"] for line in heard.of("load")] == [False, True]


def test_one_short_request_is_one_line_with_its_own_rate(heard: Heard) -> None:
    loaded = Loaded()
    end = loaded.begin()
    loaded.clock.advance(0.5)
    loaded.metered.metrics.generation_tokens += 50
    end()
    loaded.clock.advance(60)
    assert [line["generated_tokens_per_s"] for line in heard.of("load")] == [100.0]


def test_requests_that_compute_nothing_are_no_load(heard: Heard) -> None:
    loaded = Loaded()
    for _ in range(20):
        loaded.begin()()
        loaded.clock.advance(1)
    assert not heard.records
    assert len(loaded.clock.timers) <= 1


def test_a_server_that_stops_says_what_it_has_not_said(heard: Heard) -> None:
    loaded = Loaded()
    end = loaded.begin()
    loaded.metered.metrics.generation_tokens += 5
    loaded.clock.advance(1)
    end()
    loaded.lines.close()
    loaded.begin()()
    loaded.clock.advance(60)
    assert [line["generated_tokens_per_s"] for line in heard.of("load")] == [5.0]


def test_refusals_are_summed_up_at_most_every_five_seconds(heard: Heard) -> None:
    loaded = Loaded()
    too_long = RequestError("x", code="context_length_exceeded")
    for error in [OVERLOADED] * 38 + [too_long] * 2 + [None] * 3:
        loaded.begin()(error.status if error else 200, error)
        loaded.clock.advance(0.1)
    loaded.begin()(499)  # a client that has left was not refused
    loaded.begin()(404)  # without a reason
    loaded.clock.advance(60)
    assert heard.texts("refused") == [
        "refused 41: 38 x 429 server_overloaded, 2 x 400 context_length_exceeded, 1 x 404",
    ]
    (fields,) = heard.of("refused")
    assert fields["total"] == 41
    assert fields["reasons"][0] == {"status": 429, "code": "server_overloaded", "count": 38}
    loaded.begin()(429, OVERLOADED)
    loaded.clock.advance(60)
    assert heard.texts("refused")[1:] == ["refused 1: 1 x 429 server_overloaded"]


def test_many_kinds_of_refusals_are_still_one_line(heard: Heard) -> None:
    loaded = Loaded()
    for i in range(30):
        loaded.begin()(400, RequestError("x", code=f"code{i}"))
    loaded.clock.advance(60)
    (text,) = heard.texts("refused")
    assert text.count(" x 400") == 8
    assert text.endswith("22 for other reasons")


# ---------------- requests
def test_without_the_flag_a_token_costs_nothing_more() -> None:
    def on_chunk(_: Any) -> None: ...

    with RequestLog().request("r", "http", "id") as account:
        assert account.watch(TextPrompt("x"), on_chunk) is on_chunk


def test_choices_of_a_prompt_count_its_tokens_once(heard: Heard) -> None:
    with RequestLog(each=True).request("POST /r", "http", "id") as account:
        one, other = TextPrompt("same"), TextPrompt("same")
        for prompt in (one, one, other):
            watch = account.watch(prompt, lambda _: None)
            watch(Chunk("a", (1,), Finish.NONE, 10, 4))
            watch(Chunk("b", (2, 3), Finish.LENGTH if prompt is one else Finish.STOP, 10, 4))
        account.status = 200
    (line,) = heard.of("request")
    assert (line["prompt_tokens"], line["cached_tokens"], line["completion_tokens"]) == (20, 8, 9)
    assert line["finish_reason"] == "length+stop"


def test_a_request_is_one_line_with_its_numbers(heard: Heard) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for body in (CHAT_BODY, CHAT_BODY | {"stream": True}, CHAT_BODY | {"n": 2}):
            status, headers, _ = await ask(http, CHAT, body)
            assert status == 200
            ids.append(headers["x-request-id"])
        await ask(http, CHAT, CHAT_BODY, headers={"x-request-id": "mine-7"})
        await ask(http, "/v1/models", method="GET")
        for probe in ("/health", "/metrics"):
            await ask(http, probe, method="GET")

    ids: list[str] = []
    play(scene, log_requests=True)
    plain, streamed, two, mine, models = heard.of("request")
    assert [line["id"] for line in (plain, streamed, two, mine)] == [*ids, "mine-7"]
    for line in (plain, streamed):
        assert (line["route"], line["status"], line["code"], line["finish_reason"]) == (f"POST {CHAT}", 200, None, "stop")
        assert (line["prompt_tokens"], line["completion_tokens"], line["cached_tokens"]) == (3, 4, 2)
        assert 0 <= line["ttft_ms"] <= line["total_ms"]
    assert (plain["kind"], streamed["kind"]) == ("http", "stream")
    assert (two["prompt_tokens"], two["completion_tokens"]) == (3, 8)
    assert (models["route"], models["prompt_tokens"], models["finish_reason"]) == ("GET /v1/models", None, None)
    number = r"\d+ ms"
    assert re.fullmatch(
        rf"{ids[0]} POST {CHAT} 200, 3 \+ 4 tokens, 2 cached, TTFT {number}, {number}, stop", heard.texts("request")[0]
    )
    assert SECRET not in heard.everything()
    assert TEXT[:3] not in heard.everything()
    assert not heard.of("refused")


def test_a_refused_request_is_forgotten_with_its_body_at_once(heard: Heard) -> None:
    """An exception that is kept would hold it through its frames until garbage is collected: some hundred megabytes later."""

    def requests() -> int:
        return sum(isinstance(thing, web.BaseRequest) for thing in gc.get_objects())

    async def scene(engine: ScriptedEngine, http: Server) -> None:
        gc.collect()
        before = requests()
        for body in (CHAT_BODY | {"temperature": "hot"}, b"{", CHAT_BODY | {"messages": 7, "stream": True}) * 3:
            assert (await ask(http, CHAT, body))[0] == 400
        left.append(requests() - before)

    left: list[int] = []
    gc.disable()
    try:
        play(scene, log_requests=True)
    finally:
        gc.enable()
    assert left[0] <= 1, "more than the latest"


def test_refusals_are_lines_with_a_reason_and_without_the_clients_words(heard: Heard) -> None:
    forged = "x\nready in 0.0 s: http://evil/v1\x1b[31m"

    async def scene(engine: ScriptedEngine, http: Server) -> None:
        key = {"Authorization": "Bearer a key of twenty characters"}
        await ask(http, CHAT, CHAT_BODY)
        await ask(http, "/nowhere/" + SECRET, method="GET", headers=key)
        await ask(http, CHAT, CHAT_BODY | {"temperature": SECRET}, headers=key)
        await ask(http, CHAT, CHAT_BODY | {forged: 1}, headers=key)
        await ask(http, CHAT, CHAT_BODY | {"pad": "x" * 5000}, headers=key)
        engine.refuse = OVERLOADED
        await ask(http, CHAT, CHAT_BODY, headers=key)
        engine.refuse = ValueError(SECRET)
        await ask(http, CHAT, CHAT_BODY, headers=key)
        engine.refuse = None
        await ask(http, CHAT, CHAT_BODY, method="PUT", headers=key)

    play(scene, log_requests=True, strict=True, api_keys=("a key of twenty characters",))
    lines = heard.of("request")
    assert [(line["status"], line["code"]) for line in lines] == [
        (401, "invalid_api_key"),
        (404, "unknown_path"),
        (400, "invalid_type"),
        (400, "unknown_parameter"),
        (413, "body_too_large"),
        (429, "server_overloaded"),
        (500, "internal_error"),
        (405, "method_not_allowed"),
    ]
    assert {line["finish_reason"] for line in lines} == {"error"}
    assert lines[2]["param"] == "temperature"
    texts = heard.texts("request")
    assert "400 invalid_type (temperature)" in texts[2]
    assert all(text.isprintable() for text in texts)
    assert not any(text.startswith("ready") for text in texts)
    assert SECRET not in "\n".join(texts)


def test_bytes_that_are_not_http_are_lines_too(heard: Heard) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        _, headers, _ = await say_bytes(http, b"GARBAGE " + SECRET.encode() + b"\r\n\r\n")
        ids.append(headers["x-request-id"])

    ids: list[str] = []
    play(scene, log_requests=True)
    (line,) = heard.of("request")
    assert (line["id"], line["route"], line["status"], line["code"]) == (ids[0], "unknown", 400, "invalid_http")
    assert SECRET not in heard.everything()


def test_a_stream_whose_client_leaves_is_an_abort_and_one_that_fails_an_error(heard: Heard) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stall, engine.after = True, 1
        body = CHAT_BODY | {"stream": True}
        async with aiohttp.ClientSession() as session, session.post(http.make_url(CHAT), json=body) as response:
            await response.content.readany()
            ids.append(response.headers["x-request-id"])
        while engine.live:  # noqa: ASYNC110
            await asyncio.sleep(0)
        engine.stall, engine.error = False, DIED
        status, _, _ = await ask(http, COMPLETION, {"prompt": SECRET, "stream": True})
        assert status == 200

    ids: list[str] = []
    play(scene, log_requests=True)
    left, failed = heard.of("request")
    assert (left["id"], left["status"], left["finish_reason"], left["completion_tokens"]) == (ids[0], 499, "abort", 1)
    assert (failed["status"], failed["code"], failed["finish_reason"]) == (200, "engine_error", "error")
    assert failed["kind"] == "stream"


def test_a_stream_that_fails_is_counted_by_the_status_it_could_not_have(heard: Heard) -> None:
    seen: list[RequestLog] = []

    async def main() -> None:
        engine = ScriptedEngine()
        engine.error, engine.after = DIED, 1
        http = Server(engine)
        seen.append(http.request_log)
        await http.start()
        try:
            await ask(http, COMPLETION, {"prompt": "x", "stream": True})
            await say_bytes(http, b"GARBAGE\r\n\r\n")
        finally:
            await http.close()

    asyncio.run(main())
    assert seen[0].refused == {(500, "engine_error"): 1, (400, "invalid_http"): 1}
    assert not heard.of("request")


def test_lines_of_batches_name_their_kind(heard: Heard, tmp_path: Path) -> None:
    content = b"".join(request_line(f"q{i}", **({"temperature": 9} if i == 2 else {})) for i in range(3))

    async def scene(engine: ScriptedEngine, server: Stored) -> None:
        async with server.sdk() as sdk:
            batch = await submit(sdk, content)
            await server.until(batch.id, "completed")

    serve_stored(tmp_path, scene, ScriptedEngine(log_requests=True))
    lines = [line for line in heard.of("request") if line["kind"] == "batch"]
    assert (
        sorted((line["status"], line["code"], line["completion_tokens"]) for line in lines if line["status"] == 200)
        == [(200, None, 4)] * 2
    )
    assert [(line["status"], line["code"], line["param"]) for line in lines if line["status"] != 200] == [
        (400, "invalid_value", "temperature")
    ]
    assert all(line["id"].startswith("batch-") and line["route"] == f"POST {CHAT}" for line in lines)
    assert any(text.split(" ", 1)[1].startswith(f"batch POST {CHAT} 200") for text in heard.texts("request"))


def test_callers_hand_the_account_to_whoever_opens_requests() -> None:
    async def main() -> None:
        engine, got = ScriptedEngine(), []
        with RequestLog(each=True).request("r", "socket", "id") as account:
            Callers(engine).call("me", account=account).open(TextPrompt("x"), SamplingParams(), got.append)
            while engine.live:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert (account.prompt_tokens, account.completion_tokens, len(got)) == (3, 4, 4)

    asyncio.run(main())


def test_a_line_is_json_that_a_machine_can_read(heard: Heard) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        await ask(http, CHAT, CHAT_BODY)

    play(scene, log_requests=True)
    (line,) = [json.loads(logs.JsonLines().format(r)) for r in heard.records]
    assert (line["event"], line["level"], line["route"]) == ("request", "info", f"POST {CHAT}")
