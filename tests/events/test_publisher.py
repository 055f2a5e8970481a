"""The publisher without a scheduler: however often routers ask, it takes little of the time between two steps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import zmq

from minisgl.actors.scheduler.interface import Output, SchedulerLimits
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.config import ServerConfig
from minisgl.events import publisher as publishers
from minisgl.events.publisher import LOOK_SECONDS, RENEW_SECONDS, Publisher


class Asked:
    """Stands in for a socket: `inbox` is what comes, `sent` what goes."""

    def __init__(self) -> None:
        self.inbox: Any = []
        self.sent: list[Any] = []

    def poll(self, _: int) -> bool:
        return bool(self.inbox)

    def recv(self, _: int) -> bytes:
        return b"\x01" if isinstance(self.inbox, itertools.cycle) else self.inbox.pop(0)

    recv_multipart = recv

    def send(self, part: bytes, _: int) -> None:
        self.sent.append(part)

    def send_multipart(self, parts: Any, _: int) -> None:
        self.sent.append(parts)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> tuple[Publisher, Asked, Asked]:
    """A publisher of an empty tree, its stream, and its socket for replays."""
    sockets = {zmq.XPUB: Asked(), zmq.ROUTER: Asked()}
    monkeypatch.setattr(publishers, "_bound", lambda ctx, kind, flag, address: sockets[kind])
    publisher = Publisher(None, ServerConfig(kv_events="tcp://*:1", kv_events_replay="tcp://*:2"))  # type: ignore[arg-type]
    sizes: dict[str, Any] = {"slots": 4, "num_pages": 8, "page_size": 4, "max_context": 32, "step_tokens": 32}
    publisher.begin(StepMachine(SchedulerLimits(**sizes, max_steps_in_flight=2, vocab_size=99)))
    return publisher, sockets[zmq.XPUB], sockets[zmq.ROUTER]


def test_however_often_routers_ask_for_what_is_no_more_the_tree_is_written_twice_a_second(
    asked: tuple[Publisher, Asked, Asked],
) -> None:
    publisher, _, replay = asked
    written: list[float] = []
    now, whole = 0.0, publisher._feed._everything
    publisher._feed._everything = lambda: written.append(now) or whole()  # type: ignore[func-returns-value]
    publisher._renew = 1e9  # of the stream, which has a bound of its own
    asks = 0
    for step in range(int(2 / LOOK_SECONDS)):
        now = step * LOOK_SECONDS * 1.001
        publisher._feed.add(b"a change")
        publisher._feed._kept.clear()
        replay.inbox.append([b"router", b"", bytes(8)])
        asks += 1
        publisher.saw([], now, Output())
    assert 3 <= len(written) <= 2 / RENEW_SECONDS
    assert min(b - a for a, b in itertools.pairwise(written)) >= RENEW_SECONDS
    for later in range(20):  # nobody is forgotten
        publisher.saw([], 100.0 + later, Output())
    ends = [parts for parts in replay.sent if parts[3] == (-1).to_bytes(8, "big", signed=True)]
    assert len(ends) == asks


def test_who_subscribes_without_end_does_not_hold_a_step(asked: tuple[Publisher, Asked, Asked]) -> None:
    publisher, stream, _ = asked
    stream.inbox = itertools.cycle([b"\x01"])
    publisher.saw([], 1.0, Output())
    assert len(stream.sent) == 3  # one message: topic, number, the whole tree
