"""What routers are told of the prefix cache is what it holds: after every step, if they come late, and if they miss some."""

from __future__ import annotations

import random
import struct
from typing import Any

import msgpack
import pytest
from conftest import Loop, World, cases, fake_config, prompt, random_traffic
from events.subscriber import Subscriber, Told, named, places
from journal import loads

from minisgl.actors import spawn
from minisgl.cache.kept import KeptPages
from minisgl.cache.radix import RadixCache
from minisgl.config import Config, EngineConfig, ServerConfig
from minisgl.errors import UserError
from minisgl.events import feed as feeds
from minisgl.events.addresses import check_events, described, exposed
from minisgl.events.blocks import Blocks, chain
from minisgl.events.feed import Feed
from minisgl.events.wire import FORMS, MapForm, packed
from minisgl.sampling_params import RequestOptions


def told(monkeypatch: pytest.MonkeyPatch, seed: int, kind: type[Told] = Told, **limits: Any) -> Told:
    """A random load of arrivals, answers, evictions, retractions, flushes, NaN and salts, told as it runs."""
    monkeypatch.setattr(loads, "Recorded", kind)
    monkeypatch.setattr(kind, "rotate", lambda self: None)
    return loads.random_load(seed, **limits)  # type: ignore[return-value]


# ---------------- the tree, step by step
@pytest.mark.parametrize("form", ["map", "array"])
@pytest.mark.parametrize("salted", [False, True])
def test_a_subscriber_knows_the_tree_after_every_step(monkeypatch: pytest.MonkeyPatch, form: str, salted: bool) -> None:
    monkeypatch.setattr(Told, "form", form)
    monkeypatch.setattr(Told, "salted", salted)
    reasons: set[str] = set()
    retracted = quiet = 0
    for seed in range(cases(3)):
        loop = told(monkeypatch, seed, num_pages=16)
        reasons |= loop.subscriber.reasons
        retracted += loop.machine.counters.retractions
        quiet += loop.quiet
    assert {"evicted"} <= reasons if form == "map" else reasons <= {""}
    assert retracted
    assert quiet


def test_a_removal_has_its_reason_and_a_flush_of_everything_is_one_event() -> None:
    loop = Told(num_pages=20)
    seen: list[dict[str, Any]] = []
    loop.deliver = lambda payload: seen.extend(map(named, msgpack.unpackb(payload)[1])) or loop.subscriber.read(payload)
    loop.add(prompt(30), 1)
    loop.run()
    loop.add(prompt(60, 2), 1)
    loop.run()
    assert {e.get("reason") for e in seen if e["type"] == "BlockRemoved"} == {"evicted"}
    loop.add(prompt(8, 3), 12, ignore_eos=True)
    loop.step()
    loop.step()
    seen.clear()
    loop.flush()
    loop.step()
    assert {(e["type"], e.get("reason")) for e in seen} == {("BlockRemoved", "flushed")}  # a request holds the rest
    loop.run()
    seen.clear()
    loop.flush()
    loop.step()
    assert seen == [{"type": "AllBlocksCleared"}]
    assert not loop.subscriber.blocks


def test_prompts_with_a_salt_are_not_told_unless_that_is_asked_for() -> None:
    for salted in (False, True):
        loop = type("Salty", (Told,), {"salted": salted})()
        loop.add(prompt(20), 2, RequestOptions(cache_salt="pepper"))
        loop.add(prompt(20, 2), 2)
        loop.run()
        found = {salt for salt, _ in loop.subscriber.places}
        assert "" in found
        assert len(found) == 1 + salted
        assert "pepper" not in found  # the cache has its digest
    hashes = chain(prompt(20), 4), chain(prompt(20), 4, "pepper")
    assert not set(hashes[0]) & set(hashes[1])


def test_the_hash_of_a_block_is_that_of_its_whole_prefix_in_every_process() -> None:
    ids = prompt(16)
    assert chain(ids, 4)[:2] == [8152382000283484865, 5263677852961063785]  # CPython's hash of tuples of numbers
    assert chain(ids, 4)[:2] == chain(ids[:8], 4)
    assert chain([9, *ids[1:]], 4)[3] != chain(ids, 4)[3]
    loop = Told()
    loop.add(ids, 1)
    loop.run()
    assert set(loop.subscriber.blocks) >= set(chain(ids, 4))


def test_what_another_scheduler_has_left_is_told_at_the_start() -> None:
    for seed in range(cases(3)):
        rng = random.Random(seed)
        memory = memoryview(bytearray(KeptPages.size(24, 4)))
        first = Loop(num_pages=24)
        kept = KeptPages(24, 4, memory)
        first.machine = type(first.machine)(first.limits, kept)
        for i in range(6):
            first.add(prompt(rng.randrange(4, 30), i % 3), 3, RequestOptions(cache_salt=rng.choice(["", "", "a"])))
        first.run()
        kept.published[0] = kept.planned
        for salted in (False, True):
            second = Loop(num_pages=24)
            second.machine = type(second.machine)(second.limits, KeptPages(24, 4, memory))
            blocks, router = Blocks(second.machine, MapForm(4), salted), Subscriber()
            assert not blocks.changes
            router.read(packed(blocks.all(), 1.0))
            assert router.places == places(second.machine.cache, salted) != set()


# ---------------- golden bytes
def test_a_message_has_the_bytes_of_other_engines_in_both_forms() -> None:
    """Written out by hand from msgpack's specification, in the order of the fields of vLLM's kv_events.py."""

    def text(s: str) -> bytes:
        return (bytes([0xA0 + len(s)]) if len(s) < 32 else bytes([0xD9, len(s)])) + s.encode()

    h, parent, when = 0xFEDCBA9876543210, 7, b"\xcb" + struct.pack(">d", 1.5)
    number, tokens = b"\xcf" + h.to_bytes(8, "big"), b"\x94\x01\xcc\x80\xcd\x03\xe8\xce\x00\x01\x86\xa0"
    ids = (1, 128, 1000, 100_000)
    by_name = b"\x93" + when + b"\x93"
    by_name += b"\x88" + text("type") + text("BlockStored") + text("block_hashes") + b"\x91" + number
    by_name += text("parent_block_hash") + b"\x07" + text("token_ids") + tokens + text("block_size") + b"\x04"
    by_name += text("lora_id") + b"\xc0" + text("medium") + text("GPU") + text("lora_name") + b"\xc0"
    by_name += b"\x84" + text("type") + text("BlockRemoved") + text("block_hashes") + b"\x91" + number
    by_name += text("medium") + text("GPU") + text("reason") + text("evicted")
    by_name += b"\x81" + text("type") + text("AllBlocksCleared") + b"\x00"
    by_place = b"\x93" + when + b"\x93"
    by_place += b"\x98" + text("BlockStored") + b"\x91" + number + b"\x07" + tokens + b"\x04\xc0" + text("GPU") + b"\xc0"
    by_place += b"\x93" + text("BlockRemoved") + b"\x91" + number + text("GPU")
    by_place += b"\x91" + text("AllBlocksCleared") + b"\x00"
    for name, want in (("map", by_name), ("array", by_place)):
        form = FORMS[name](4)
        assert packed([form.stored([h], parent, ids), form.removed([h], "evicted"), form.cleared()], 1.5) == want
    salted = FORMS["array"](2).stored([1, 2], None, (1, 2, 3, 4), "pepper")
    assert salted == ["BlockStored", [1, 2], None, (1, 2, 3, 4), 2, None, "GPU", None, [["pepper"], None]]
    assert FORMS["map"](2).stored([1, 2], None, (1, 2, 3, 4), "pepper")["extra_keys"] == [["pepper"], None]


# ---------------- late, lost, again
class Fed(Told):
    """A stream with numbers, a small memory, and a router that loses messages and asks for them."""

    most, lose, late = 5, 0.2, 0

    def __init__(self, **limits: Any) -> None:
        super().__init__(**limits)
        self.feed = Feed(1000, lambda: packed(self.told.all(), 1.0), packed([], 1.0), self.most)
        self.subscriber = Subscriber(strict=False)
        self.last, self.calls, self.dice, self.dumps = -1, 0, random.Random(len(limits)), 0

    def deliver(self, payload: bytes) -> None:
        seq, payload = self.feed.add(payload)
        self.calls += 1
        if self.calls <= self.late or self.dice.random() < self.lose:
            return
        if seq > self.last + 1:
            self.ask()
        if seq > self.last:
            self.take(seq, payload)

    def ask(self) -> None:
        for seq, payload in self.feed.since(self.last + 1):
            assert seq > self.last, "a router leaves out what it thinks it has"
            self.take(seq, payload)

    def take(self, seq: int, payload: bytes) -> None:
        self.dumps += payload[10:].startswith(b"\x91\x81\xa4type\xb0AllBl") or b"AllBlocksCleared" in payload
        self.subscriber.read(payload)
        self.last = seq

    def check_told(self) -> None:
        if self.last == self.feed.next - 1:
            assert self.subscriber.places == places(self.machine.cache)


def test_a_router_that_loses_messages_or_comes_late_is_right_once_it_has_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    dumps = 0
    for seed in range(cases(3)):
        monkeypatch.setattr(Fed, "late", seed * 3)
        monkeypatch.setattr(Fed, "lose", random.Random(seed).choice([0.1, 0.5, 0.9]))
        loop = told(monkeypatch, seed, Fed)
        loop.ask()
        assert loop.last == loop.feed.next - 1 or not loop.calls
        assert loop.subscriber.places == places(loop.machine.cache)
        dumps += loop.dumps
    assert dumps


def test_the_memory_for_replays_is_bounded_in_messages_and_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = Feed(10, lambda: b"all", b"no", 3)
    assert feed.since(0) == [(0, b"all"), (9, b"no")]
    sent = [feed.add(b"%d" % i) for i in range(5)]
    assert [seq for seq, _ in sent] == [10, 11, 12, 13, 14]
    assert feed.since(15) == feed.since(1 << 60) == []
    assert feed.since(12) == sent[2:]
    assert feed.since(14) == sent[4:]
    assert feed.since(11) == [(11, b"all"), (14, b"no")]
    assert feed.since(0) == [(0, b"all"), (14, b"no")]
    assert [feed.keeps(n) for n in (0, 11, 12, 14, 15)] == [False, False, True, True, True]
    assert feed.renew() == (15, b"all")
    assert feed.since(14) == [(14, b"all"), (15, b"no")]
    assert feed.since(15) == [(15, b"all")]
    assert feed.since(16) == []
    assert feed.add(b"x") == (16, b"x")
    assert feed.since(16) == [(16, b"x")]
    monkeypatch.setattr(feeds, "MAX_BYTES", 10)
    for _ in range(3):
        feed.add(b"xxxxxx")
    assert feed.since(18) == [(18, b"all"), (19, b"no")]
    assert len(feed.since(19)) == 1


# ---------------- off, and what is refused
def test_who_publishes_nothing_pays_nothing() -> None:
    world = World(1, fake_config(), lambda ctx, config, arenas: spawn.make_scheduler(ctx, config, arenas))  # type: ignore[arg-type,return-value]
    random_traffic(world, 1)
    assert world.scheduler.watcher is None
    assert not {"add", "drop"} & vars(world.machine.kept).keys()
    assert not {"flush", "forget"} & vars(world.machine.cache).keys()
    world.close()


def test_what_is_shadowed_exists() -> None:
    assert callable(KeptPages.add)
    assert callable(KeptPages.drop)
    assert callable(RadixCache.flush)
    assert callable(RadixCache.forget)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"kv_events_replay": "tcp://*:5558"}, "--kv-events-replay needs --kv-events"),
        ({"kv_events_topic": "kv@a"}, "--kv-events-topic needs"),
        ({"kv_events_salted": True}, "--kv-events-salted needs"),
        ({"kv_events_format": "array"}, "--kv-events-format needs"),
        ({"kv_events": "5557"}, "--kv-events '5557': write tcp://HOST:PORT"),
        ({"kv_events": "http://x:1"}, "write tcp://"),
        ({"kv_events": "tcp://*:0"}, "between 1 and 65535"),
        ({"kv_events": "tcp://*:70000"}, "between 1 and 65535"),
        ({"kv_events": "tcp://h:5557", "kv_events_replay": "tcp://h"}, "--kv-events-replay 'tcp://h'"),
        ({"kv_events": "tcp://*:5557", "kv_events_replay": "tcp://127.0.0.1:5557"}, "choose another port"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_by_their_names(flags: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word.replace("*", ".")):
        check_events(Config(fake_config().model, EngineConfig(), ServerConfig(**flags)))


def test_a_server_without_a_prefix_cache_has_nothing_to_tell() -> None:
    with pytest.raises(UserError, match="--cache none"):
        check_events(Config(fake_config().model, EngineConfig(cache="none"), ServerConfig(kv_events="tcp://*:5557")))


def test_server_info_says_where_the_events_are_by_the_names_of_sglang() -> None:
    config = Config(
        fake_config().model, EngineConfig(), ServerConfig(kv_events="tcp://*:5557", kv_events_replay="tcp://h:5558")
    )
    check_events(config)
    want = {"publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": 5557, "topic": "", "block_size": 16, "dp_size": 1}
    assert described(config) == want | {"replay_endpoint_port_base": 5558}
    assert described(Config(fake_config().model)) is None
    assert [exposed(a) for a in ("tcp://*:1", "tcp://0.0.0.0:1", "tcp://10.0.0.1:1", "tcp://node7:1")] == [True] * 4
    assert [exposed(a) for a in ("tcp://127.0.0.1:1", "tcp://[::1]:1", "tcp://localhost:1")] == [False] * 3
