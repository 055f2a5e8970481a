"""Defines an actor: private state, one mailbox, one handler per message type, one thread.  Does no input or output."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar

from minisgl.actors.messages import Stop, Trace
from minisgl.actors.wire import BadMessage

F = TypeVar("F", bound=Callable[..., None])


class Context(Protocol):
    """The runtime, as an actor sees it."""

    name: str

    def send(self, to: str, msg: Any) -> None:
        """Put a message into another actor's mailbox; never blocks."""

    def now(self) -> float:
        """Seconds on a monotonic clock (virtual in tests)."""

    def forget(self, name: str) -> None:
        """Another actor has this name now: messages to the one before that have not left are dropped."""

    def stop(self) -> None:
        """Leave the run loop after the current handler."""


class Unhandled(TypeError):
    """A message reached an actor that declares no handler for it."""


def on(msg_type: type) -> Callable[[F], F]:
    """Mark a method as the handler of one message type."""

    def mark(fn: F) -> F:
        fn.__handles__ = msg_type  # type: ignore[attr-defined]
        return fn

    return mark


class Actor:
    """Subclass, and decorate handlers with `@on(Type)`.  Handlers return nothing and never block.

    The table of handlers is built when the class is made, and a handler whose annotation is not the type it is registered
    for is refused then: the class does not exist.
    """

    observer: Callable[[Trace], None] | None = None  # set from outside, and all that an actor knows of traces
    wake_at = math.inf  # when, by the clock of the context, `idle` wants to be called even if no mail arrives
    _table: ClassVar[dict[type, str]] = {Stop: "stop", Trace: "trace"}  # message type -> name of its handler

    def __init_subclass__(cls) -> None:
        cls._table = dict(cls._table)
        mine: set[type] = set()
        for name, fn in vars(cls).items():
            msg_type: type | None = getattr(fn, "__handles__", None)
            if msg_type is None:
                continue
            hint: object = next((v for k, v in typing.get_type_hints(fn).items() if k != "return"), None)
            if msg_type is not hint:
                raise TypeError(f"{cls.__name__}.{name} handles {msg_type.__name__} but is annotated {hint}")
            if msg_type in mine:
                raise TypeError(f"{cls.__name__} has two handlers for {msg_type.__name__}")
            mine.add(msg_type)
            cls._table[msg_type] = name

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    def receive(self, msg: Any) -> None:
        """Run the handler of `msg`.  Raises Unhandled if there is none.

        A handler raises BadMessage, before it changes anything, for a message that no actor of ours sends in its state.
        """
        name = self._table.get(type(msg))
        if name is None:
            raise Unhandled(f"{type(self).__name__} got {type(msg).__name__}")
        getattr(self, name)(msg)

    def stop(self, m: Stop) -> None:
        """Leave after the current handler.  An actor with something to finish first handles Stop itself."""
        self.ctx.stop()

    def trace(self, m: Trace) -> None:
        """Let the observer of this actor, if it has one, begin or end a trace."""
        if self.observer is None:
            raise BadMessage("nobody traces this actor")
        self.observer(m)

    def started(self) -> None:
        """Runs once, in the actor's own process, before the first message."""

    def idle(self) -> bool:
        """Runs whenever the mailbox is empty.  True: I did some work, call again.  False: block until mail, or `wake_at`."""
        return False

    def stopping(self) -> None:
        """Runs once, after the last message, also after a failure."""
