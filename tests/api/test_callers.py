"""Who a request comes from, as the scheduler hears it: a number for each client and each call, and a bounded priority."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from conftest import World, fake_config
from test_batches import Stored, request_line, submit
from test_server import CHAT, COMPLETION, USER, ScriptedEngine, Server, ask, check_error, play

from minisgl.api.caller import Callers
from minisgl.api.engine import OnChunk, Prompt, TextPrompt, TokenPrompt
from minisgl.errors import InvalidParam
from minisgl.sampling_params import DEFAULT_OPTIONS, RequestOptions, SamplingParams

ALICE, BOB = "alice-has-a-long-key", "bob-has-a-longer-key"
PARAMS = SamplingParams(max_tokens=1)


class Listening(ScriptedEngine):
    """Keeps the options of its requests."""

    def __init__(self, **server: Any) -> None:
        super().__init__(**server)
        self.options: list[RequestOptions] = []

    def open(self, prompt: Prompt, params: SamplingParams, on_chunk: OnChunk, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        uid = super().open(prompt, params, on_chunk, options)
        self.options.append(options)
        return uid


def test_a_client_is_its_key_where_there_are_keys_and_every_request_is_a_call() -> None:
    async def scene(engine: Any, http: Server) -> None:
        for key in (ALICE, ALICE, BOB):
            body = {"prompt": ["a", "b"], "n": 2}
            status, *_ = await ask(http, COMPLETION, body, headers={"Authorization": f"Bearer {key}"})
            assert status == 200
        calls = [{(o.client, o.call) for o in engine.options[i : i + 4]} for i in (0, 4, 8)]
        assert [len(c) for c in calls] == [1, 1, 1], "the rows of a call have one mark"
        ((alice, first),), ((also_alice, second),), ((bob, third),) = calls
        assert alice == also_alice != bob
        assert len({first, second, third}) == 3

    play(scene, Listening, api_keys=(ALICE, BOB))


def test_without_keys_a_client_is_its_address_and_cannot_choose_to_be_many() -> None:
    async def scene(engine: Any, http: Server) -> None:
        for key in (ALICE, BOB):
            await ask(http, CHAT, {"messages": USER}, headers={"Authorization": f"Bearer {key}"})
        assert len({o.client for o in engine.options}) == 1
        assert len({o.call for o in engine.options}) == 2

    play(scene, Listening)


def test_the_mark_of_a_client_reveals_nothing_and_fits_into_a_message() -> None:
    async def marks() -> list[int]:
        engine = Listening()
        for _ in range(2):  # another server, or another start
            Callers(engine).call(ALICE).open(TextPrompt("x"), PARAMS, lambda _: None)
        return [o.client for o in engine.options]

    first, second = asyncio.run(marks())
    assert first != second, "the mark is keyed with a secret of this server's start"
    assert 0 <= first < 1 << 63
    options = RequestOptions(client=first, call=5)
    assert options.client == first
    assert ALICE not in str(options)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_priority_above_the_servers_is_refused_with_the_flag_that_allows_it(path: str) -> None:
    body = {"messages": USER} if path == CHAT else {"prompt": "x"}

    async def refused(engine: Any, http: Server) -> None:
        for extra in ({}, {"stream": True}):
            status, headers, raw = await ask(http, path, {**body, **extra, "priority": 1})
            error = check_error(status, headers, raw)
            assert (status, error["param"]) == (400, "priority")
            assert "--max-priority" in error["message"]
        for priority in (0, -5):
            assert (await ask(http, path, {**body, "priority": priority}))[0] == 200
        assert [o.priority for o in engine.options] == [0, -5]

    async def allowed(engine: Any, http: Server) -> None:
        assert (await ask(http, path, {**body, "priority": 7}))[0] == 200
        assert (await ask(http, path, {**body, "priority": 8}))[0] == 400

    play(refused, Listening)
    play(allowed, Listening, max_priority=7)


def test_batches_stay_behind_everybody_whatever_priority_they_ask_for(tmp_path: Path) -> None:
    async def main() -> list[RequestOptions]:
        engine = Listening()
        async with Stored(engine, tmp_path) as server, server.sdk() as sdk:
            lines = request_line("a") + request_line("b", priority=100) + request_line("c", priority=-9)
            batch = await submit(sdk, lines)
            await server.until(batch.id, "completed")
        return engine.options

    options = asyncio.run(main())
    assert sorted(o.priority for o in options) == [-9, -1, -1]
    assert len({o.client for o in options}) == 1


@pytest.mark.parametrize(("prompts", "n", "param"), [(32, 60, "n"), (513, 1, "prompt")])
def test_answers_of_one_call_are_bounded(prompts: int, n: int, param: str) -> None:
    async def scene(engine: Any, http: Server) -> None:
        status, headers, raw = await ask(http, COMPLETION, {"prompt": ["a"] * prompts, "n": n})
        error = check_error(status, headers, raw)
        assert (status, error["param"]) == (400, param)
        assert "prompt" in error["message"]
        assert "--max-choices" in error["message"]

    assert not play(scene, max_body_bytes=1 << 20).opened


def test_the_scheduler_gets_the_marks() -> None:
    w = World(None, fake_config(tp=1))
    callers = Callers(w.gateway)
    engine = callers.call("127.0.0.1")
    for _ in range(2):
        engine.open(TokenPrompt((1, 2, 3)), SamplingParams(max_tokens=9), lambda _: None)
    while not w.machine.running:
        w.system.step()
    (_, request), *_ = w.machine.running.values()
    assert request.options.client > 0
    assert request.options.call == 1
    w.system.run()
    assert w.machine.idle
    with pytest.raises(InvalidParam):
        engine.open(TokenPrompt((1,)), PARAMS, lambda _: None, RequestOptions(priority=3))
    w.close()
