"""Several tokenizers behind one gateway: every prompt keeps its ids, and short ones do not queue behind long ones."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from conftest import fake_spec

from minisgl.actors.messages import Cancel, EngineReady, Generate, Wake
from minisgl.actors.runtime.actor import Actor, Context, on
from minisgl.actors.runtime.local import LocalSystem
from minisgl.actors.runtime.ring import RingReader
from minisgl.actors.runtime.shared_memory import Arenas, Memory
from minisgl.actors.spawn import make_tokenizer
from minisgl.api.engine import ChatPrompt, Chunk, TextPrompt
from minisgl.api.gateway import Gateway
from minisgl.config import Config, EngineConfig, ServerConfig
from minisgl.errors import RequestError, UserError
from minisgl.sampling_params import SamplingParams


class Collector(Actor):
    """A scheduler that only notes what it is asked for."""

    def __init__(self, ctx: Context, arenas: Arenas) -> None:
        super().__init__(ctx)
        self.ring = RingReader(arenas.requests)
        self.prompts: dict[int, bytes] = {}
        self.cancelled: set[int] = set()

    @on(Generate)
    def generate(self, m: Generate) -> None:
        self.prompts[m.uid] = bytes(np.frombuffer(self.ring.take_now(), np.int32).astype(np.uint8))

    @on(Cancel)
    def cancel(self, m: Cancel) -> None:
        assert m.uid in self.prompts, "a cancellation has overtaken its request"
        self.cancelled.add(m.uid)

    @on(Wake)
    def wake(self, m: Wake) -> None: ...


class Front:
    """A gateway that is ready, `n` tokenizers in which the byte alphabet's characters are tokens, and a collector."""

    def __init__(self, n: int, seed: int | None) -> None:
        spec = replace(fake_spec(max_context=600, vocab=256), format="random", name="bytes")
        config = Config(spec, EngineConfig(max_running=4, step_tokens=9), ServerConfig(num_tokenizers=n))
        self.memory = Memory(config)
        arenas = self.memory.arenas
        self.system = LocalSystem(seed)
        self.gateway = self.system.spawn("api", lambda ctx: Gateway(ctx, config, arenas))
        self.collector = self.system.spawn("scheduler", lambda ctx: Collector(ctx, arenas))
        self.names = ["tokenizer", *(f"tokenizer{i}" for i in range(1, n))]
        for i, name in enumerate(self.names):
            self.system.spawn(name, lambda ctx, i=i: make_tokenizer(ctx, config, arenas, i))
        self.gateway.silent.clear()
        self.gateway.receive(EngineReady(100, 0))
        self.news: list[Chunk | RequestError] = []

    def open(self, text: str) -> int:
        return self.gateway.open(TextPrompt(text), SamplingParams(), self.news.append)

    def asked(self) -> set[str]:
        return {dst for name, _, dst in self.system.edges if name == "Tokenize"}


@pytest.mark.parametrize("seed", range(12))
def test_every_prompt_keeps_its_ids_whichever_tokenizer_reads_it(seed: int) -> None:
    rng, front = random.Random(seed), Front(3, seed)
    expected: dict[int, bytes] = {}
    closed: set[int] = set()
    for _ in range(60):
        text = "".join(rng.choices("abcdefgh", k=rng.randrange(1, 500)))
        uid = front.open(text)
        expected[uid] = text.encode()
        if rng.random() < 0.1:
            front.gateway.close(uid)
            closed.add(uid)
        if rng.random() < 0.1:  # refused by whoever reads it: there is no chat template
            front.gateway.open(ChatPrompt(b"{}"), SamplingParams(), front.news.append)
        for _ in range(rng.randrange(6)):
            front.system.step()
    front.system.run()
    got = front.collector.prompts
    assert set(expected) - closed <= set(got)
    alphabet: dict[int, int] = {}  # byte -> token
    for uid, raw in got.items():
        assert len(raw) == len(expected[uid])
        for token, letter in zip(raw, expected[uid], strict=True):
            assert alphabet.setdefault(letter, token) == token
    assert len(set(alphabet.values())) == len(alphabet) == 8
    assert front.asked() == set(front.names)
    assert front.gateway._tokenizers.loads == [0, 0, 0]
    assert all(isinstance(n, RequestError) and n.code == "no_chat_template" for n in front.news)
    front.memory.close()


def test_a_short_prompt_goes_to_a_tokenizer_that_does_not_read_a_long_one() -> None:
    front = Front(2, None)
    front.open("a" * 4000)
    for _ in range(20):
        front.open("b" * 10)
    assert front.asked() == {"tokenizer", "tokenizer1"}
    assert front.gateway._tokenizers.loads == [4000, 200]
    front.system.run()
    assert front.gateway._tokenizers.loads == [0, 0]
    front.memory.close()


def test_a_number_of_tokenizers_that_makes_no_sense_is_refused_by_its_flag() -> None:
    for n in (0, -1, 65):
        with pytest.raises(UserError, match=f"--num-tokenizers must be between 1 and 64, got {n}"):
            ServerConfig(num_tokenizers=n)
