"""A router that believes what it is told, and the tree that it should believe in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
from journal.loads import Recorded

from minisgl.actors.scheduler.interface import Event, Output
from minisgl.cache.radix import RadixCache
from minisgl.events.blocks import Blocks
from minisgl.events.wire import FORMS, packed

Place = tuple[str, tuple[int, ...]]  # a salt, and all tokens up to the end of a block
NAMES = ("type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys")


def named(event: Any) -> dict[str, Any]:
    """An event of either form, by names."""
    if isinstance(event, dict):
        return event
    names = NAMES if event[0] == "BlockStored" else ("type", "block_hashes", "medium")
    return dict(zip(names, event, strict=False))


class Subscriber:
    """`blocks`: hash -> where it ends.  Every message must make sense with what was told before."""

    def __init__(self, strict: bool = True) -> None:
        self.blocks: dict[int, Place] = {}
        self.strict = strict  # nothing is told twice, or taken away that is not there
        self.reasons: set[str] = set()
        self.messages = 0

    def read(self, payload: bytes) -> None:
        self.messages += 1
        when, events, rank = msgpack.unpackb(payload)
        assert isinstance(when, float)
        assert rank == 0
        for event in events:
            self.apply(named(event))

    def apply(self, e: dict[str, Any]) -> None:
        if e["type"] == "AllBlocksCleared":
            self.blocks.clear()
        elif e["type"] == "BlockRemoved":
            assert e["block_hashes"]
            self.reasons.add(e.get("reason", ""))
            for h in e["block_hashes"]:
                assert h in self.blocks or not self.strict
                self.blocks.pop(h, None)
        else:
            self._stored(e)

    def _stored(self, e: dict[str, Any]) -> None:
        hashes, tokens, size, parent = e["block_hashes"], e["token_ids"], e["block_size"], e["parent_block_hash"]
        assert len(tokens) == size * len(hashes) > 0
        assert e["lora_id"] is None
        assert e["medium"] == "GPU"
        if parent is not None and parent not in self.blocks:
            assert not self.strict, "a block without its parent"
            return
        salt, before = self.blocks[parent] if parent is not None else ((e.get("extra_keys") or [[""]])[0][0], ())
        for i, h in enumerate(hashes):
            assert 0 < h < 1 << 64
            before = (*before, *tokens[i * size : (i + 1) * size])
            assert not self.strict or h not in self.blocks
            assert self.blocks.get(h, (salt, before)) == (salt, before), "two blocks have one hash"
            self.blocks[h] = salt, before

    @property
    def places(self) -> set[Place]:
        return set(self.blocks.values())


def places(cache: RadixCache, salted: bool = False) -> set[Place]:
    """The blocks that some prompt would find."""
    found: set[Place] = set()
    stack = [(root, ()) for root in [cache.root, *(cache._salted.values() if salted else ())]]
    while stack:
        node, before = stack.pop()
        ids = tuple(np.frombuffer(node.key, np.int32).tolist())
        if ids and ids[0] < 0:  # forgotten: no prompt has such tokens
            continue
        size = cache.page_size
        found |= {(node.salt, before + ids[: end * size]) for end in range(1, len(node.pages) + 1)}
        stack += [(child, before + ids) for child in (node.children or {}).values()]
    return found


class Told(Recorded):
    """A Loop whose tree is told to a subscriber after each step, and compared."""

    form, salted = "map", False
    after: Callable[[Told], None] | None = None

    def __init__(self, **limits: Any) -> None:
        super().__init__(tokens=(), **limits)
        self.told = Blocks(self.machine, FORMS[self.form](self.limits.page_size), self.salted)
        self.subscriber = Subscriber()
        self.quiet = 0  # steps without an event

    def _watched(self, inbox: list[Event], now: float) -> Output:
        out = super()._watched(inbox, now)
        if changes := self.told.take():
            self.deliver(packed(changes, 1.0))
        else:
            self.quiet += 1
        self.check_told()
        return out

    def deliver(self, payload: bytes) -> None:
        self.subscriber.read(payload)

    def check_told(self) -> None:
        assert self.subscriber.places == places(self.machine.cache, self.salted)
        assert len(self.subscriber.blocks) == self.told.count
