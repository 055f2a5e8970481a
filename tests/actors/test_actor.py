"""Actors and the deterministic runtime."""

from __future__ import annotations

import pytest

from minisgl.actors.messages import Cancel, Stop, Stopped, Wake
from minisgl.actors.runtime.actor import Actor, Context, Unhandled, on
from minisgl.actors.runtime.local import LocalSystem


class Echo(Actor):
    """Sends back every uid; remembers the order."""

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.seen: list[int] = []

    @on(Cancel)
    def cancel(self, m: Cancel) -> None:
        self.seen.append(m.uid)


def test_a_handler_must_be_annotated_with_the_type_it_handles() -> None:
    with pytest.raises(TypeError, match="annotated"):

        class Wrong(Actor):
            @on(Cancel)
            def f(self, m: Wake) -> None: ...


def test_a_type_has_one_handler_but_a_subclass_may_replace_it() -> None:
    with pytest.raises(TypeError, match="two handlers"):

        class Twice(Actor):
            @on(Wake)
            def f(self, m: Wake) -> None: ...

            @on(Wake)
            def g(self, m: Wake) -> None: ...

    class Child(Echo):
        @on(Cancel)
        def other(self, m: Cancel) -> None:
            self.seen.append(-m.uid)

    system = LocalSystem()
    child = system.spawn("child", Child)
    system.post("x", "child", Cancel(3))
    system.run()
    assert child.seen == [-3]


def test_an_unhandled_message_is_an_error_not_a_shrug() -> None:
    system = LocalSystem()
    system.spawn("echo", Echo)
    system.post("x", "echo", Wake())
    with pytest.raises(Unhandled, match="Echo got Wake"):
        system.run()


def test_an_edge_is_first_in_first_out_and_edges_interleave_by_seed() -> None:
    orders = set()
    for seed in range(30):
        system = LocalSystem(seed)
        echo = system.spawn("echo", Echo)
        for uid in range(3):
            system.post("a", "echo", Cancel(uid))
            system.post("b", "echo", Cancel(10 + uid))
        system.run()
        assert [u for u in echo.seen if u < 10] == [0, 1, 2]
        assert [u for u in echo.seen if u >= 10] == [10, 11, 12]
        orders.add(tuple(echo.seen))
    assert len(orders) > 5


def test_the_same_seed_is_the_same_run() -> None:
    def run(seed: int) -> list[int]:
        system = LocalSystem(seed)
        echo = system.spawn("echo", Echo)
        for uid in range(20):
            system.post(f"src{uid % 4}", "echo", Cancel(uid))
        system.run()
        return echo.seen

    assert run(7) == run(7)
    assert run(7) != run(8)


def test_a_message_sent_on_the_way_to_sleep_is_delivered() -> None:
    class Sleepy(Actor):
        sent = False

        def idle(self) -> bool:
            if not self.sent:
                self.sent = True
                self.ctx.send("echo", Cancel(1))
            return False

    system = LocalSystem()
    echo = system.spawn("echo", Echo)
    system.spawn("sleepy", Sleepy)
    system.run()
    assert echo.seen == [1]


def test_a_stopped_actor_leaves_and_later_mail_is_a_dead_letter() -> None:
    system = LocalSystem()
    system.spawn("echo", Echo)
    system.post("x", "echo", Stop("enough"))
    system.run()
    system.post("x", "echo", Cancel(1))
    assert "echo" not in system.actors
    assert [(src, dst, type(msg)) for src, dst, msg in system.dead_letters] == [("x", "echo", Cancel)]


def test_what_cannot_be_encoded_fails_at_the_sender_even_in_one_process() -> None:
    system = LocalSystem()
    with pytest.raises(TypeError):
        system.post("x", "nobody", {"not": "a message"})
    system.post("x", "nobody", Stopped("x"))
