"""The reasons of the cache against slow references: random prompts in a small pool, bounds of the memory, cut characters."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from conftest import VOCAB, World, cases, fake_config

from minisgl.actors.scheduler.plan_builder import NO_SLOTS
from minisgl.actors.scheduler.request import Request
from minisgl.api.cache_reasons import AFTER, BEFORE, CacheExplanation, CacheReasons, Windows, shown
from minisgl.api.engine import Chunk, TokenPrompt
from minisgl.api.prompt_memory import NODE_BYTES, PromptMemory
from minisgl.cache.radix import Node
from minisgl.model.text.conversation import NOWHERE, shape_of
from minisgl.sampling_params import RequestOptions, SamplingParams

PAGE = 4
# The cache knows salts by their digests.
NAMES = {Request(0, NO_SLOTS, 1, 0, SamplingParams(), RequestOptions(cache_salt=salt)).salt: salt for salt in ("", "pepper")}


def ask(world: World, ids: list[int], n: int, salt: str = "", **more: Any) -> list[Chunk]:
    """Open a request that is explained; its chunks, once the world has run."""
    out: list[Any] = []
    options = RequestOptions(cache_salt=salt, explain_cache=True, client=more.pop("client", 0))
    world.gateway.open(TokenPrompt(tuple(ids)), SamplingParams(max_tokens=n, **more), out.append, options)
    return out


def explained(chunks: list[Chunk]) -> CacheExplanation:
    assert chunks[-1].finish
    assert all(chunk.explanation is None for chunk in chunks[:-1])
    found = chunks[-1].explanation
    assert found is not None
    return found


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def cached_prefixes(world: World) -> set[tuple[str, tuple[int, ...]]]:
    """Every prefix of whole pages in the scheduler's cache."""
    out = set()

    def path(node: Node) -> list[int]:
        return [] if node.parent is None else path(node.parent) + np.frombuffer(node.key, np.int32).tolist()

    for node in world.machine.cache.nodes():
        ids = path(node)
        for end in range(PAGE * (len(ids) // PAGE - len(node.pages) + 1), len(ids) + 1, PAGE):
            out.add((NAMES[node.salt], tuple(ids[:end])))
    return out


@pytest.mark.parametrize("seed", range(cases(12)))
@pytest.mark.parametrize("pages", [18, 80])
def test_cached_tokens_reason_and_miss_at_are_those_of_a_slow_reference(seed: int, pages: int) -> None:
    rng = random.Random(seed)
    world = World(seed, fake_config(tp=1, kv_tokens=PAGE * pages))
    alphabet = rng.randrange(2, VOCAB - 1)
    history: list[tuple[str, list[int], list[int]]] = []  # salt, prompt, answer
    ever: set[tuple[str, tuple[int, ...]]] = set()
    reasons = set()
    for _ in range(60):
        salt = rng.choice(("", "", "pepper"))
        ids = [rng.randrange(1, alphabet + 1) for _ in range(rng.randrange(1, 30))]
        if history and rng.random() < 0.8:
            _, before, said = rng.choice(history)
            ids = ((before + said)[: rng.randrange(1, 40)] + ids)[: rng.randrange(1, 44)]
        now = cached_prefixes(world)
        ever |= now
        chunks = ask(world, ids, rng.randrange(1, 8), salt)
        world.system.run()
        found, n = explained(chunks), len(ids)

        def whole(tokens: int, n: int = n) -> int:
            return min(tokens, n - 1) // PAGE * PAGE

        most, cached = whole(n), 0
        while cached < most and (salt, tuple(ids[: cached + PAGE])) in now:
            cached += PAGE
        assert found.cached_tokens == cached == chunks[-1].cached_tokens
        mine = [before + said for s, before, said in history if s == salt]
        longest = max((common(ids, other) for other in mine), default=0)
        elsewhere = whole(max((common(ids, (b + a)[:-1]) for s, b, a in history if s != salt), default=0))
        if cached == most:
            reason = "short"
        elif (salt, tuple(ids[: cached + PAGE])) in ever:
            reason = "evicted"
        elif elsewhere > whole(longest) and 2 * (elsewhere - cached) > most - cached:
            reason = "salt"
        else:
            reason = "new"
        assert found.reason == reason, (ids, found)
        assert found.miss_at == (longest if reason == "new" else cached)
        at, windows = found.miss_at, found.windows
        assert windows.before == tuple(ids[max(0, at - BEFORE) : at])
        assert windows.ours == tuple(ids[at : at + AFTER])
        if reason == "new" and longest:
            goes_on = {tuple(other[at : at + AFTER]) for other in mine if common(ids, other) == at}
            assert windows.theirs is not None
            assert any(windows.theirs[: len(other)] == other for other in goes_on)
        else:
            assert windows.theirs is None
        if reason == "evicted" and found.seconds_ago is not None:
            assert found.seconds_ago >= 0
        reasons.add(reason)
        history.append((salt, ids, [t for chunk in chunks for t in chunk.token_ids]))
    counted = world.gateway.cache_reasons
    assert sum(counted.requests.values()) == 60
    assert sum(counted.tokens.values()) == world.machine.counters.prompt_tokens - world.machine.counters.cached_tokens
    tree = Counter(world.machine.stats())
    assert tree["tree_missed_whole_tokens"] + tree["tree_missed_short_tokens"] == counted.tokens["short"]
    rest = tree["tree_missed_new_tokens"] + tree["tree_missed_evicted_tokens"]
    assert rest == sum(counted.tokens.values()) - counted.tokens["short"]
    assert {"short", "new"} <= reasons
    assert ("evicted" in reasons) or pages > 18
    world.close()


@pytest.mark.parametrize("seed", range(cases(12)))
def test_requests_at_the_same_time_never_look_evicted_where_nothing_was(seed: int) -> None:
    rng = random.Random(seed)
    world = World(seed, fake_config(tp=1, kv_tokens=PAGE * 600))
    trunk = [rng.randrange(1, 5) for _ in range(40)]
    for _ in range(8):
        opened = [
            ask(world, trunk[: rng.randrange(1, 40)] + [rng.randrange(1, 5) for _ in range(rng.randrange(1, 9))], 3)
            for _ in range(rng.randrange(1, 7))
        ]
        for _ in range(rng.randrange(30)):
            world.system.step()
        opened += [ask(world, [*trunk, rng.randrange(1, 5)], 2)]
        world.system.run()
        for chunks in opened:
            found = explained(chunks)
            assert found.reason in ("short", "new")
            assert found.cached_tokens <= found.miss_at
    world.close()


def test_a_page_evicted_by_a_pool_that_is_full_says_how_long_ago() -> None:
    world = World(None, fake_config(tp=1, kv_tokens=PAGE * 16))
    first = [1, 2, 3, 4] * 4
    world.system.clock = 50.0
    for ids in (first, [5, 6, 7, 8] * 9):
        ask(world, ids, 1)
        world.system.run()
    ask(world, [9, 10, 11, 12] * 8, 1)
    world.system.run()
    world.system.clock += 7.0
    again = ask(world, first, 1)
    world.system.run()
    found = explained(again)
    assert found.reason == "evicted"
    assert found.seconds_ago == pytest.approx(7.0, abs=1.0)
    world.close()


def test_what_is_only_being_computed_is_new_and_compared_with_nothing() -> None:
    reasons, ids = CacheReasons(fake_config()), np.array([1, 2, 3, 4] * 4, np.int32)
    options = RequestOptions(explain_cache=True)
    waiting, second = (reasons.recall(ids, SamplingParams(), options, b"") for _ in range(2))
    reasons.begin(second, ids, 0, explain=True)
    reasons.begin(waiting, ids, 12, explain=True)
    assert second.explanation is not None
    assert waiting.explanation is not None
    assert (second.explanation.reason, second.explanation.miss_at) == ("new", 0)
    assert second.explanation.windows.theirs is None
    assert waiting.explanation.reason == "short"
    third = reasons.recall(ids, SamplingParams(), options, b"")
    reasons.lose()
    reasons.begin(third, ids, 0, explain=True)
    assert reasons.requests == {"new": 1, "short": 1, "restart": 1}
    assert reasons.tokens == {"new": 16, "short": 4, "restart": 16}


def test_the_conversation_that_is_compared_is_that_of_the_latest_prompt_behind_the_place() -> None:
    memory, tag = PromptMemory(), ("", 0)

    def enter(text: bytes, shape: bytes) -> bytes:
        return memory.enter(b"".join(bytes([0, 0, 0, c]) for c in text), tag, 0, shape, show=2).shape

    assert enter(b"ab", b"1") == b""
    assert enter(b"abcd", b"2") == b"1"
    assert enter(b"abx", b"3") == b"2"
    assert enter(b"abcy", b"4") == b"2"
    assert enter(b"abz", b"5") == b"4"


def test_two_answers_to_one_prompt_are_both_remembered_whichever_ends_first() -> None:
    memory, tag = PromptMemory(), ("", 0)

    def ids(*tokens: int) -> bytes:
        return np.array(tokens, np.int32).tobytes()

    ends = [memory.enter(ids(1, 2, 3), tag, 0).end for _ in range(2)]
    for end, said in zip(ends, (ids(4, 5), ids(4, 6, 7)), strict=True):
        assert end is not None
        memory.prove(end, tag, 0)
        memory.extend(end, said, tag, 0)
    found = [memory.enter(ids(1, 2, 3, 4, last, 7, 8), tag, 0) for last in (5, 6, 9)]
    assert [f.common for f in found] == [5, 6, 4]
    assert [f.proven for f in found] == [4, 5, 4]


def test_who_must_compute_all_or_has_no_cache_is_off() -> None:
    reasons, ids = CacheReasons(fake_config()), np.array([1, 2, 3, 4] * 4, np.int32)
    for params, options in (
        (SamplingParams(echo=True, logprobs=0), RequestOptions()),
        (SamplingParams(), RequestOptions(pooling="mean")),
    ):
        reasons.begin(reasons.recall(ids, params, options, b""), ids, 0, explain=False)
    assert reasons.requests == {"off": 2}
    world = World(None, fake_config(tp=1, cache="none"))
    for _ in range(2):
        plain = ask(world, [1, 2, 3, 4] * 4, 1)
        world.system.run()
        assert (explained(plain).reason, explained(plain).cached_tokens) == ("off", 0)
    world.close()


# ---------------- the memory
def test_the_memory_is_bounded_whatever_comes() -> None:
    rng = random.Random(1)
    memory = PromptMemory(megabytes=1)
    for i in range(10_000):
        ids = np.array([rng.randrange(50_000) for _ in range(rng.randrange(1, 60))], np.int32)
        found = memory.enter(ids.tobytes(), (str(i % 7), 0), 0, b"x" * 24)
        assert found.end is not None
        memory.extend(found.end, ids[:9].tobytes(), (str(i % 7), 0), 0)
        assert memory.bytes <= 1 << 20
    nodes = list(memory.nodes())
    assert memory.forgotten
    assert len(nodes) * NODE_BYTES < memory.bytes
    assert sorted(map(id, memory._order)) == sorted(map(id, nodes))
    place = {node: i for i, node in enumerate(memory._order)}
    assert all(node.parent is memory.root or place[node] < place[node.parent] for node in nodes if node.parent)
    big = memory.enter(np.arange(1 << 19, dtype=np.int32).tobytes(), ("", 0), 0)
    assert memory.bytes <= 1 << 20
    assert big.end is not None
    memory.extend(big.end, b"\0" * 8, ("", 0), 0)
    memory.prove(big.end, ("", 0), 0)
    assert memory.bytes <= 1 << 20


def test_what_a_node_is_counted_as_is_what_it_takes() -> None:
    import gc
    import tracemalloc

    memory = PromptMemory()
    rng = random.Random(2)
    prompts = [np.array([i, *(rng.randrange(50_000) for _ in range(40))], np.int32).tobytes() for i in range(4000)]
    gc.collect()
    tracemalloc.start()
    for raw in prompts:
        memory.enter(raw[:], ("", 0), 0)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 0.6 < taken / memory.bytes < 1.1, taken / memory.bytes


@pytest.mark.parametrize("seed", range(cases(12)))
def test_the_memory_finds_what_a_list_of_all_prompts_finds(seed: int) -> None:
    rng = random.Random(seed)
    memory = PromptMemory()
    tags = [("", 0), ("", 5), ("salt", 0)]
    history: list[tuple[Any, list[int], bytes]] = []
    proven: list[tuple[Any, list[int], int]] = []
    for i in range(80):
        life = i // 40
        tag = rng.choice(tags)
        base = rng.choice(history)[1][: rng.randrange(12)] if history else []
        ids = base + [rng.randrange(3) for _ in range(rng.randrange(1, 8))]
        shape = b"%012d" % i if rng.random() < 0.7 else b""
        found = memory.enter(np.array(ids, np.int32).tobytes(), tag, life, shape, show=3)
        mine = [(p, s) for t, p, s in history if t == tag]
        assert found.common == max((common(ids, p) for p, _ in mine), default=0)

        def most(rows: list[tuple[Any, list[int], int]], ids: list[int] = ids) -> int:
            return max((common(ids, p) for _, p, _ in rows), default=0)

        assert found.proven == most([row for row in proven if row[0][0] == tag[0]])
        assert found.fresh == most([row for row in proven if row[0][0] == tag[0] and row[2] == life])
        assert found.other == most([row for row in proven if row[0][0] != tag[0] and row[0][1] == tag[1] and row[2] == life])
        alike = [(p, s) for p, s in mine if common(ids, p) == found.common]
        if found.common:
            theirs = np.frombuffer(found.theirs, np.int32).tolist()
            assert any(theirs[: len(p) - found.common] == p[found.common :][:3] for p, _ in alike)
            assert not found.shape or any(found.shape == s for _, _, s in history)
        history.append((tag, ids, shape))
        if rng.random() < 0.6:
            assert found.end is not None
            memory.prove(found.end, tag, life)
            proven.append((tag, ids, life))
            if rng.random() < 0.5:
                said = [rng.randrange(3) for _ in range(rng.randrange(1, 5))]
                memory.extend(found.end, np.array(said, np.int32).tobytes(), tag, life)
                history.append((tag, ids + said, shape))
                proven.append((tag, (ids + said)[:-1], life))


# ---------------- texts
def text_of(ids: tuple[int, ...]) -> str:
    return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("mine", "other", "expected"),
    [
        ("time 12:01.", "time 12:00.", ("time 12:0|1.", "time 12:0|0.")),
        ("so 😀!", "so 😁!", ("so |😀!", "so |😁!")),
        ("é", "è", ("|é", "|è")),
        ("日本", "日曜", ("日|本", "日|曜")),
        ("a\ufffdb", "a\ufffdc", ("a\ufffd|b", "a\ufffd|c")),
        ("x", "x", ("x|", "x|")),
        ("ends", "ends here", ("ends|", "ends| here")),
    ],
)
def test_a_bar_stands_before_the_first_character_that_is_not_the_same_as_a_whole(
    mine: str, other: str, expected: tuple[str, str]
) -> None:
    ours, theirs = mine.encode(), other.encode()
    at = common(list(ours), list(theirs))
    windows = Windows(tuple(ours[:at]), tuple(ours[at:]), tuple(theirs[at:]), False, True)
    explanation = CacheExplanation(0, "new", at, windows)
    texts = [text_of(windows.before), text_of(windows.before + windows.ours), text_of(windows.before + tuple(theirs[at:]))]
    found = shown(explanation, texts)
    assert (found.ours, found.theirs) == expected


@pytest.mark.parametrize("seed", range(cases(12)))
def test_texts_that_are_cut_anywhere_show_no_half_characters(seed: int) -> None:
    rng = random.Random(seed)
    letters = "aé日😀ß"
    ours = "".join(rng.choice(letters) for _ in range(30)).encode()
    at = rng.randrange(len(ours))
    first = max(0, at - BEFORE)
    windows = Windows(tuple(ours[first:at]), tuple(ours[at : at + 8]), None, first > 0, at + 8 >= len(ours))
    found = shown(
        CacheExplanation(0, "evicted", at, windows), [text_of(windows.before), text_of(windows.before + windows.ours)]
    )
    assert found.ours is not None
    assert "\ufffd" not in found.ours
    before, _, after = found.ours.removeprefix("...").partition("|")
    assert before + after in ours.decode()
    assert ours.decode("utf-8", "ignore").find(before) >= 0


# ---------------- the shape of a conversation
def test_a_content_is_found_where_it_is_said_not_where_the_template_has_the_same_word() -> None:
    text = "tools: find, lend\nsystem: find\nuser: lend \nassistant:"
    messages = [{"role": "system", "content": "find"}, {"role": "user", "content": " lend"}, {"role": "tool", "content": None}]
    shape = shape_of(messages, text, lambda at: at)
    assert [start for _, _, start in shape] == [text.index("find\nuser"), text.index(" lend \n"), NOWHERE]
    other = shape_of([{"role": "user", "content": "find"}, {"role": "user", "content": " lend"}], text, lambda at: at)
    assert shape[0][0] != other[0][0]
    assert shape[0][1] == other[0][1]
    assert shape[1][:2] == other[1][:2]
