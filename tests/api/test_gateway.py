"""The gateway: whom it lets in, with which seed, and that nothing of a request that has ended stays behind."""

from __future__ import annotations

import asyncio
import functools
import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_server import ScriptedEngine, Server, _raw, play
from test_tokenizer_pool import Front

from minisgl.actors.messages import ActorDied, Hello, Rejected, Started, Text, ThoughtEnded
from minisgl.actors.runtime.ring import RingReader
from minisgl.actors.wire import decode, encode
from minisgl.api.engine import ChatPrompt, Chunk, TextPrompt, TokenPrompt
from minisgl.api.gateway import Gateway
from minisgl.api.http.metrics import Metered
from minisgl.api.http.stream_writer import Turn
from minisgl.errors import RequestError, context_overflow
from minisgl.model.text.detokenize import ByteStream, WindowStream
from minisgl.sampling_params import Finish, SamplingParams


def gateway(front: Front, **changes: Any) -> Gateway:
    """The gateway of a front, with other settings of its server."""
    front.gateway.config = replace(front.gateway.config, server=replace(front.gateway.config.server, **changes))
    return front.gateway


def text(uid: int, finish: Finish = Finish.NONE) -> Text:
    one = np.array([1], np.int32)
    return Text(np.array([uid]), np.array([1], np.uint8), one, np.array([int(finish)], np.uint8), np.zeros(1, np.int32), ("a",))


# ---------------- seeds
def test_requests_without_a_seed_draw_different_numbers_in_every_run_and_one_with_a_seed_the_same() -> None:
    def seeds(base: int, seed: int | None) -> list[int]:
        front = Front(1, None)
        config = front.gateway.config
        front.gateway.config = replace(config, engine=replace(config.engine, sample_seed=base))
        for _ in range(8):
            front.gateway.open(TokenPrompt((1, 2)), SamplingParams(seed=seed), front.news.append)
        return [e.seed for e in front.gateway._ledger.values()]

    first, second = seeds(0, None), seeds(0, None)
    assert len({*first, *second}) == 16
    assert seeds(0, 7) == [7] * 8
    assert seeds(0, -1) == [(1 << 64) - 1] * 8
    assert seeds(5, None) == seeds(5, None)  # --sample-seed: a run can be repeated
    assert len(set(seeds(5, None))) == 8


# ---------------- what is said once of a request
def test_what_is_said_once_of_a_request_is_in_its_chunks_from_there_on() -> None:
    front = Front(1, None)
    uids = [front.gateway.open(TokenPrompt((1, 2)), SamplingParams(), front.news.append) for _ in range(2)]
    said = [Started(uids[0], 0.5), Started(99, 7.0), text(uids[0]), ThoughtEnded(uids[0], 3), ThoughtEnded(99, 8)]
    for m in [*said, text(uids[0]), text(uids[1]), text(uids[0], Finish.STOP)]:
        front.gateway.receive(decode(encode(m)))
    assert [(c.queued, c.thought_tokens) for c in front.news] == [(0.5, 0), (0.5, 3), (0.0, 0), (0.5, 3)]


# ---------------- what is left behind
@pytest.mark.parametrize("seed", range(6))
def test_after_any_traffic_nothing_is_left_of_the_requests_that_have_ended(seed: int) -> None:
    rng, front = random.Random(seed), Front(2, seed)
    engine = Metered(front.gateway)
    took: list[Any] = []
    live: set[int] = set()
    for _ in range(300):
        kind = rng.randrange(6)
        if kind == 0:
            uid = engine.open(ChatPrompt(b"{}"), SamplingParams(), took.append)  # refused: there is no template
        elif kind == 1:
            uid = engine.tokenize(TextPrompt("abc"), took.append)
        elif kind == 2:
            uid = engine.detokenize([1, 2], False, took.append)
        else:
            uid = engine.open(TextPrompt("abc" * rng.randrange(1, 9)), SamplingParams(max_tokens=3), took.append)
        live.add(uid)
        for _ in range(rng.randrange(12)):
            front.system.step()
        for uid in rng.sample(sorted(live), min(len(live), rng.randrange(3))):
            entry = front.gateway._ledger.get(uid)
            if rng.random() < 0.4:
                engine.close(uid)
            elif entry is None or entry.ids is None:
                continue  # the scheduler knows nothing of it
            elif rng.random() < 0.4:
                front.gateway.receive(Rejected(uid, 429, "no", None, "server_overloaded", 1))
            else:
                front.gateway.receive(text(uid))
                front.gateway.receive(text(uid, rng.choice((Finish.STOP, Finish.LENGTH, Finish.NAN, Finish.ABORT))))
            live.discard(uid)
    front.system.run()
    for uid in live:
        engine.close(uid)
    g = front.gateway
    assert (len(g._ledger), len(g._questions), len(g._tokenizers._jobs), g.open_requests) == (0, 0, 0, 0)
    assert not g._dispatcher.waiting
    assert g._tokenizers.loads == [0, 0]
    assert not engine._open
    assert sum(engine.metrics.finished.values()) > 20


@pytest.mark.parametrize("seed", range(8))
def test_a_prompt_that_is_closed_while_it_is_read_never_runs(seed: int) -> None:
    """Whichever tokenizer has it, and however late: a cancellation cannot overtake its request."""
    rng, front = random.Random(seed), Front(3, seed)
    closed = set()
    for _ in range(40):
        uid = front.open("a" * rng.randrange(1, 400))
        for _ in range(rng.randrange(8)):
            front.system.step()
        if rng.random() < 0.5:
            front.gateway.close(uid)
            closed.add(uid)
    front.system.run()
    assert closed & set(front.collector.prompts) == front.collector.cancelled
    assert len(front.collector.prompts) >= 40 - len(closed)


# ---------------- who is let in
def test_whoever_comes_too_early_too_late_or_in_a_crowd_is_told_when_to_come_back() -> None:
    def refusal(g: Gateway) -> tuple[int, str | None, int | None]:
        with pytest.raises(RequestError) as e:
            g.open(TextPrompt("a"), SamplingParams(), lambda _: None)
        return e.value.status, e.value.code, e.value.retry_after

    front = Front(1, None)
    g = gateway(front, max_open_requests=2)
    g.state = "starting"
    assert refusal(g) == (503, "model_loading", 2)
    g.state = "ready"
    front.open("a")
    g.tokenize(TextPrompt("a"), lambda _: None)
    assert refusal(g) == (429, "server_overloaded", 1)
    front.system.run()  # the tokens are told, and make room
    front.open("a")
    assert refusal(g) == (429, "server_overloaded", 1)
    g.drain()
    assert refusal(g) == (503, "server_draining", 5)


def test_when_an_actor_dies_every_open_request_ends_with_a_500_that_names_it() -> None:
    front = Front(2, None)
    told: list[Any] = []
    front.open("a")
    front.gateway.tokenize(TextPrompt("a"), told.append)
    front.gateway.give_up(ActorDied("scheduler", -9), "it died")
    for error in (*front.news, *told):
        assert isinstance(error, RequestError)
        assert (error.status, error.code) == (500, "engine_error")
        assert "scheduler died" in error.message
    assert len(front.news) == len(told) == 1
    assert front.gateway.state == "dead"


@pytest.mark.parametrize("prompt", [TextPrompt("abcde" * 200), TokenPrompt((1,) * 700), TokenPrompt((1,) * 590)])
def test_an_overlong_prompt_is_refused_in_the_words_that_clients_look_for(prompt: Any) -> None:
    front = Front(1, None)
    params = SamplingParams(max_tokens=20)
    try:
        front.gateway.open(prompt, params, front.news.append)
        front.system.run()
        [error] = front.news
    except RequestError as e:
        error = e
    assert isinstance(error, RequestError)
    assert (error.status, error.param, error.code) == (400, "prompt", "context_length_exceeded")
    said = error.message
    assert re.search(r"maximum context length is 600 tokens\. However, you requested \d+ tokens \(\d+ in the prompt, 20", said)
    assert "this model's maximum context length is" in said.lower()  # litellm's mark
    assert "context_length_exceeded" in said  # LangChain's
    assert said == context_overflow("prompt", 600, *re.findall(r"requested (\d+) tokens \((.*?)\)", said)[0]).message


def test_without_max_tokens_an_answer_may_go_on_to_the_end_of_the_context() -> None:
    front = Front(1, None)
    uid = front.gateway.open(TokenPrompt((1,) * 590), SamplingParams(), front.news.append)
    assert front.gateway._ledger[uid].max_tokens == 10


# ---------------- the cost of a token
def test_every_token_is_looked_up_once_and_the_other_way_decodes_few_at_a_time() -> None:
    class Table(list[bytes]):
        looked = 0

        def __getitem__(self, at: Any) -> Any:
            Table.looked += 1
            return super().__getitem__(at)

    stream = ByteStream(Table(bytes([i]) for i in range(256)), frozenset())
    said = "".join(stream.push(t) for t in "a wörd or two ".encode() * 100) + stream.flush()
    assert said == "a wörd or two " * 100
    assert Table.looked == len(said.encode())

    sizes = []

    def decode(ids: Any) -> str:
        sizes.append(len(ids))
        return "".join(map(chr, ids))

    window = WindowStream(decode)
    assert "".join(window.push(ord(c)) for c in "abc" * 300) + window.flush() == "abc" * 300
    assert len(sizes) == 2 * 900
    assert max(sizes) == 2


def test_what_arrives_in_one_turn_of_the_loop_is_written_in_one_piece() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stall, engine.after = True, 1
        reader, writer = await _raw(http, b"HTTP/1.1\r\nHost: t")
        await engine.wait_for(lambda: bool(engine.opened))
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(3):
            await asyncio.sleep(0)
        for turn in range(4):
            for i in range(5):
                engine.live[0](Chunk(f"<{turn}{i}>", (1,), Finish.NONE, 3, 2))
            await asyncio.sleep(0.01)  # many turns
        engine.live.pop(0)(Chunk("", (), Finish.LENGTH, 3, 2))
        chunks = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            chunks.append(await reader.readexactly(size))
            await reader.readexactly(2)
        writer.close()
        assert len(chunks) == 1 + 4 + 1, "the first piece, one for each turn, the end"
        assert [chunk.count(b"data: ") for chunk in chunks[1:5]] == [1] * 4  # coalesced into one event, too
        assert all(f"<{turn}0><{turn}1>" in chunks[1 + turn].decode() for turn in range(4))

    play(scene)


def test_a_turn_calls_everybody_once_in_one_callback_of_the_loop_and_a_bug_costs_its_own_stream(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        loop, turn, called = asyncio.get_running_loop(), Turn(), []

        def again() -> None:
            called.append("again")
            turn.soon(lambda: called.append("next"))

        turn.soon(lambda: called.append("first"))
        turn.soon(again)
        turn.soon(lambda: called[99])
        turn.soon(lambda: called.append("last"))
        loop.call_soon(lambda: called.append("loop"))
        assert called == []
        await asyncio.sleep(0)
        assert called == ["first", "again", "last", "loop"]
        await asyncio.sleep(0)
        assert called == ["first", "again", "last", "loop", "next"]

    asyncio.run(main())
    assert "IndexError" in caplog.text


# ---------------- recovery
def test_a_grammar_that_ends_every_checker_is_refused_and_the_others_are_checked() -> None:
    front, told = Front(1, None), list[tuple[str, Any]]()
    gateway = front.gateway
    gateway.config = replace(gateway.config, model=replace(gateway.config.model, eos_ids=(0,)))
    for name in ("deadly", "harmless"):
        gateway.check_grammar(name, "guided_regex", functools.partial(lambda name, a: told.append((name, a)), name))
    for deaths in range(5):  # from outside
        gateway.lost(["checker"], front.memory.arenas.requests)
        gateway.receive(Hello("checker", deaths))
    for deaths in range(1, 4):
        assert not told
        gateway.lost(["checker"], front.memory.arenas.requests, {"checker"})
        gateway.receive(Hello("checker", deaths))
    ((name, error),) = told
    assert (name, error.code) == ("deadly", "poison_request")
    gateway.lost(["checker"], front.memory.arenas.requests)
    assert len(told) == 1, "one more death makes nobody else guilty"


def test_a_grammar_without_an_end_is_refused_before_it_is_tried_out() -> None:
    front = Front(1, None)
    front.gateway.config = replace(front.gateway.config, model=replace(front.gateway.config.model, eos_ids=()))
    with pytest.raises(RequestError, match="needs a model with an EOS token") as e:
        front.gateway.check_grammar("x", "guided_regex", print)
    assert e.value.param == "guided_regex"
    assert front.gateway.open_requests == 0


def test_a_trial_that_waits_for_room_in_the_ring_is_not_forgotten() -> None:
    front = Front(1, None)
    gateway = front.gateway
    uid = gateway.open(TokenPrompt((1, 2)), SamplingParams(), front.news.append)
    dispatcher = gateway._dispatcher
    dispatcher._trials._suspects.append(gateway._ledger[uid])
    dispatcher._ring.has_room = lambda nbytes: False  # type: ignore[method-assign]
    dispatcher.go_on()
    gateway.open(TokenPrompt((1, 2)), SamplingParams(), front.news.append)
    assert RingReader(front.memory.arenas.requests).starved(), "the scheduler sends Wake when there is room"


def test_a_server_may_be_stopped_while_it_recovers() -> None:
    front = Front(1, None)
    front.open("a")
    front.gateway.lost(["tokenizer"], front.memory.arenas.requests)
    assert front.gateway.state == "recovering"
    front.gateway.drain()
    with pytest.raises(RequestError, match="shutting down"):
        front.open("b")
    front.gateway.receive(Hello("tokenizer", 1))
    assert front.gateway.state == "draining"
    front.system.run()
    assert len(front.collector.prompts) == 1, "what was open goes on"
