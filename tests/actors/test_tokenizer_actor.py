"""The tokenizer actor: order, backpressure, and errors that cost one request only."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import numpy as np
import pytest
from conftest import fake_spec
from test_tokenizer import CHATML, small

from minisgl.actors import tokenizer as module
from minisgl.actors.messages import Detokenize, Detokenized, Rejected, Tokenize, Tokenized, TokenizerInfo, Wake
from minisgl.actors.runtime.ring import RingReader, RingWriter, create_ring
from minisgl.actors.tokenizer import TokenizerActor
from minisgl.config import Config, EngineConfig


class Recorder:
    """A Context that writes down what is sent."""

    name = "tokenizer"

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []

    def send(self, to: str, msg: Any) -> None:
        self.sent.append((to, msg))

    def after(self, seconds: float, msg: Any) -> None:
        raise AssertionError("no timers here")

    def now(self) -> float:
        return 0.0

    def stop(self) -> None:
        raise AssertionError("nobody asked for it")


class Ring:
    """Room for so many records."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.records: list[list[int]] = []
        self.names: list[int] = []
        self.starved = False

    def has_room(self, nbytes: int) -> bool:
        return self.room > 0

    def publish(self, payload: bytes) -> int:
        if not self.room:
            raise BufferError
        self.room -= 1
        self.records.append(np.frombuffer(payload, "<i4", offset=8).tolist())
        self.names.append(int.from_bytes(payload[:8], "little"))
        return len(self.records)

    def starve(self, flag: bool) -> None:
        self.starved = flag


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    def build(ring: Any, template: str | None = CHATML, max_context: int = 64) -> tuple[TokenizerActor, list[tuple[str, Any]]]:
        tok = small(template)
        monkeypatch.setattr(module, "load_tokenizer", lambda spec, template: tok)
        ctx = Recorder()
        config = Config(dataclasses.replace(fake_spec(), max_context=max_context), EngineConfig())
        actor = TokenizerActor(ctx, config, ring)
        actor.started()
        ((to, info),) = ctx.sent
        assert to == "api"
        assert isinstance(info, TokenizerInfo)
        actor.info = json.loads(info.info)  # type: ignore[attr-defined]
        ctx.sent.clear()
        return actor, ctx.sent

    return build


def ask(uid: int, text: str = "hello") -> Tokenize:
    return Tokenize(uid, text, None, True)


def test_ids_travel_through_the_ring_and_are_announced_in_order(make: Any) -> None:
    ring = Ring()
    actor, sent = make(ring)
    actor.receive(ask(7, "hello"))
    actor.receive(Tokenize(8, None, json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode(), False))
    assert ring.names == [7, 8]
    assert [(to, type(m), m.uid, m.n) for to, m in sent] == [
        ("api", Tokenized, 7, len(ring.records[0])),
        ("api", Tokenized, 8, len(ring.records[1])),
    ]
    tok = small()
    assert [tok.decode(r, False) for r in ring.records] == ["hello", "<|im_start|>user\nx<|im_end|>\n"]
    assert not actor.idle()


def test_prompts_wait_for_room_and_keep_their_order(make: Any) -> None:
    ring = Ring(room=1)
    actor, sent = make(ring)
    for uid in range(4):
        actor.receive(ask(uid, "h" * (uid + 1)))
    assert [m.uid for _, m in sent] == [0]
    assert ring.starved
    assert not actor.idle()
    ring.room = 2
    actor.receive(Wake())
    assert [m.uid for _, m in sent] == [0, 1, 2]
    ring.room = 1
    assert actor.idle()  # room that nobody announced is found too
    assert not actor.idle()
    assert [m.uid for _, m in sent] == [0, 1, 2, 3]
    assert [len(r) for r in ring.records] == [1, 2, 3, 4]
    assert not ring.starved


def test_it_works_with_the_real_ring(make: Any) -> None:
    spec, fd = create_ring("prompts", 1, 4096)
    writer, reader = RingWriter(spec), RingReader(spec)
    actor, sent = make(writer, max_context=1024)
    for uid in range(3):
        actor.receive(ask(uid, "x" * 480))
    assert len(sent) == 2
    assert reader.starved()
    assert len(reader.take_now()) == 8 + 4 * 480
    actor.receive(Wake())
    assert [m.uid for _, m in sent] == [0, 1, 2]
    assert not reader.starved()
    os.close(fd)


def test_an_error_of_a_request_is_its_own(make: Any) -> None:
    ring = Ring()
    actor, sent = make(ring, template=None)
    actor.receive(Tokenize(1, None, b'{"messages": [{"role": "user", "content": "x"}]}', False))
    actor.receive(ask(2))
    (_, rejected), (_, tokenized) = sent
    assert isinstance(rejected, Rejected)
    assert (rejected.uid, rejected.status, rejected.param, rejected.code) == (1, 400, "messages", "no_chat_template")
    assert isinstance(tokenized, Tokenized)


def test_a_failing_library_is_a_500_and_the_actor_lives_on(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    actor, sent = make(Ring())
    with monkeypatch.context() as m:
        m.setattr(actor._tokenizer, "encode", lambda *_: 1 // 0)
        actor.receive(ask(1))
    actor.receive(ask(2))
    (_, rejected), (_, tokenized) = sent
    assert (rejected.uid, rejected.status, rejected.code) == (1, 500, "tokenizer_error")
    assert "ZeroDivisionError" in rejected.text
    assert tokenized.uid == 2


def test_a_prompt_that_is_far_too_long_does_not_enter_the_ring(make: Any) -> None:
    ring = Ring()
    actor, sent = make(ring, max_context=10)
    actor.receive(ask(1, "x" * 41))
    actor.receive(ask(2, "x" * 40))  # too long as well, but api says so: it knows the completion
    (_, rejected), (_, tokenized) = sent
    assert (rejected.uid, rejected.status, rejected.code, rejected.param) == (1, 400, "context_length_exceeded", "prompt")
    assert rejected.text.startswith(
        "This model's maximum context length is 10 tokens. However, you requested 41 tokens (41 in the "
    )
    assert (tokenized.uid, tokenized.n, len(ring.records)) == (2, 40, 1)


def test_ids_become_text_and_the_tokenizer_tells_its_special_tokens(make: Any) -> None:
    actor, sent = make(Ring())
    tok = small(CHATML)
    ids = tok.encode("hello", False)
    actor.receive(Detokenize(7, ids, False))
    ((to, answer),) = sent
    assert (to, type(answer)) == ("api", Detokenized)
    assert (answer.uid, answer.text) == (7, "hello")
    assert actor.info["chat_template"] == CHATML
    assert actor.info["vocab_size"] == tok.vocab_size
    assert actor.info["eos_token_ids"] == list(tok.eos_ids)
