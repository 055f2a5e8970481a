"""KV events of a system of real processes, as routers hear them: over a SUB, and a DEALER that asks for what was missed."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from events.subscriber import Subscriber
from test_recovery import ENGINE, Answers

from minisgl.api.engine import TokenPrompt
from minisgl.config import Config, EngineConfig, ServerConfig
from minisgl.errors import UserError
from minisgl.events.blocks import chain
from minisgl.model.checkpoint.resolve import resolve

SIZE = 4
PROMPT = tuple(range(1, 42))


def free_ports(n: int) -> list[int]:
    socks = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in socks]
    for s in socks:
        s.close()
    return ports


class Router:
    """Follows one server, from its first message on; it can stop to listen, and ask for what it has missed."""

    def __init__(self, server: ServerConfig) -> None:
        self.server, self.zmq = server, zmq.Context()
        self.sub = self.zmq.socket(zmq.SUB)
        self.sub.setsockopt(zmq.SUBSCRIBE, b"kv@")
        self.sub.connect(server.kv_events)
        self.state, self.last, self.seen = Subscriber(strict=False), -1, []  # type: ignore[var-annotated]

    def hear(self) -> None:
        while self.sub.poll(1):
            topic, seq, payload = self.sub.recv_multipart()
            assert topic == b"kv@pod@fake"
            number = int.from_bytes(seq, "big")
            assert number > self.last >= -1
            self.seen.append(number)
            self.last = number
            self.state.read(payload)

    def replay(self, start: int) -> list[tuple[int, bytes]]:
        dealer = self.zmq.socket(zmq.DEALER)
        dealer.connect(self.server.kv_events_replay)
        dealer.send_multipart([b"no request"])
        dealer.send_multipart([b"", start.to_bytes(8, "big")])
        found = []
        while True:
            assert dealer.poll(10_000), "no end of the replay"
            delimiter, topic, seq, payload = dealer.recv_multipart()
            assert delimiter == b""
            if seq == (-1).to_bytes(8, "big", signed=True):
                assert topic == payload == b""
                dealer.close(linger=0)
                return found
            assert topic == b"kv@pod@fake"
            found.append((int.from_bytes(seq, "big"), payload))

    def close(self) -> None:
        self.zmq.destroy(linger=0)


def config_of(**more: Any) -> Config:
    a, b = free_ports(2)
    events = {"kv_events": f"tcp://127.0.0.1:{a}", "kv_events_replay": f"tcp://127.0.0.1:{b}", "kv_events_topic": "kv@pod@fake"}
    engine = EngineConfig(**{**ENGINE, "page_size": SIZE})
    return Config(resolve("fake"), engine, ServerConfig(**{"max_restarts": 50, **events, **more}))


@pytest.fixture
def running() -> Iterator[tuple[Answers, Callable[[], Router]]]:
    config = config_of()
    answers, routers = Answers(config=config), []  # type: ignore[var-annotated]

    def router() -> Router:
        routers.append(Router(config.server))
        return routers[-1]

    yield answers, router
    for r in routers:
        r.close()
    answers.close()


def told(answers: Answers, router: Router, hashes: set[int]) -> None:
    """The router comes to know exactly these blocks."""

    def look() -> bool:
        router.hear()
        return router.last >= 0 and set(router.state.blocks) == hashes

    answers.until(look)


def test_routers_that_come_late_or_whose_scheduler_dies_know_its_tree(
    running: tuple[Answers, Callable[[], Router]],
) -> None:
    answers, join = running
    early = join()
    told(answers, early, set())
    answers.ask(1, TokenPrompt(PROMPT), max_tokens=4)
    answers.until(lambda: 1 in answers.ends)
    blocks = set(chain([*PROMPT, *answers.said[1][:-1]], SIZE))
    told(answers, early, blocks)
    assert early.seen == list(range(early.seen[0], early.seen[0] + len(early.seen)))
    late = join()
    told(answers, late, blocks)  # without asking
    told(answers, early, blocks)
    before = early.last
    again = Subscriber(strict=False)
    for _, payload in late.replay(0):
        again.read(payload)
    assert set(again.blocks) == blocks
    assert late.replay(before + 1) == []

    answers.kill("scheduler", signal.SIGKILL)
    answers.ask(2, TokenPrompt((7, *PROMPT)), max_tokens=2)
    answers.until(lambda: 2 in answers.ends)
    more = set(chain([7, *PROMPT, *answers.said[2][:-1]], SIZE))
    told(answers, early, blocks | more)
    told(answers, late, blocks | more)
    assert early.last > before
    fresh = Subscriber(strict=False)
    for _, payload in early.replay(before + 1):  # of a scheduler that is no more
        fresh.read(payload)
    assert set(fresh.blocks) == blocks | more
    answers.system.gateway.flush_cache()
    told(answers, early, set())
    told(answers, late, set())


def test_an_address_that_is_taken_is_named_with_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--kv-events tcp://127.0.0.1:{port}: another program listens there"):
            Answers(config=config_of(kv_events=f"tcp://127.0.0.1:{port}"))
