"""`minisgl explain`: every number in its sentences is that of a bookkeeping which knows plans and answers alone."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
from conftest import Loop, prompt
from journal.loads import random_load
from test_system import ServerProcess

from minisgl.__main__ import main
from minisgl.actors.scheduler.interface import Event, Output
from minisgl.commands.explain.words import headline, narrate, sentences, waiting
from minisgl.journal.recorder import Recorder, Writer
from minisgl.journal.replay import Replay
from minisgl.journal.witness import Chunk, End, Join, Retraction, Step, Wait, Watch, Witness, plain, step_of
from minisgl.plan import DRAW, StepPlan
from minisgl.sampling_params import Finish, RequestOptions
from minisgl.view.viewer import Viewer

ENDS = {Finish.STOP: "ends it", Finish.LENGTH: "no more", Finish.ABORT: "cancelled", Finish.NONE: "vector"}


class Told(Loop):
    """A Loop whose steps are witnessed; after each of them the sentences are compared with books of its own."""

    def __init__(self, change: Callable[[Step], Step] = lambda step: step, **limits: Any) -> None:
        super().__init__(**limits)
        self.change, self.steps = change, list[Step]()
        self.witness = Witness(self.machine)
        self.plain = self.machine.step
        self.machine.step = self._told  # type: ignore[method-assign]
        self.decoding: list[int] = []
        self.computed: dict[int, int] = {}
        self.facts = 0

    def _told(self, inbox: list[Event], now: float) -> Output:
        running, said = set(self.machine.running), {uid: len(s) for uid, s in self.said.items()}
        self.witness.begin(inbox, now)
        out = self.plain(inbox, now)
        step = self.change(self.witness.end(out))
        self.steps.append(step)
        self._check(step, out, running, said)
        return out

    def _check(self, step: Step, out: Output, running: set[int], said: dict[int, int]) -> None:
        machine, plan, text = self.machine, out.plan, "\n".join(sentences(step))
        uid_of = machine.table.uid
        ended: dict[int, tuple[Finish, int]] = {uid: (Finish.NONE, 0) for uid, _ in out.vectors}
        for rows in out.outputs:
            for uid, count, finish in zip(rows.uids.tolist(), rows.counts.tolist(), rows.finish.tolist(), strict=True):
                said[uid] = said.get(uid, 0) + count
                if finish:
                    ended[uid] = Finish(finish), said[uid]
        found = re.findall(r"request (\d+) ends( in the queue)? after (\d+) tokens?: (.*)", text)
        assert {int(uid): int(n) for uid, _, n, _ in found} == {uid: n for uid, (_, n) in ended.items()}
        for uid, queue, _, why in found:
            assert ENDS[ended[int(uid)][0]] in why
            assert bool(queue) == (int(uid) not in running)
        joins = {} if plan is None else {int(uid_of[s]): int(n) for s, n in plan.new_slots[["slot", "kv_len"]].tolist()}
        found = re.findall(r"request (\d+) joins( again)?: (\d+) of its (\d+) tokens? are cached", text)
        assert {int(uid): int(cached) for uid, _, cached, _ in found} == joins
        for uid, again, _, tokens in found:
            assert int(tokens) == len(self.asked[int(uid)][0]) + said[int(uid)]
            assert bool(again) == (int(uid) in self.started)
        self.computed |= joins
        gone = {uid for uid in running if uid not in ended and (uid in machine.waiting or uid in joins)}
        assert {int(uid) for uid in re.findall(r"request (\d+) is retracted", text)} == gone
        self.facts += len(ended) + len(joins) + len(gone)
        if plan is not None:
            self._check_plan(step, plan, text)
        self._check_waits(step, waiting(step), plan)

    def _check_plan(self, step: Step, plan: StepPlan, text: str) -> None:
        machine, size = self.machine, self.limits.page_size
        if plan.decode is not None:
            self.decoding = plan.decode.tolist()
        n, prompt_tokens = len(self.decoding), len(plan.ids)
        parts = [f"{k} {what}{'s' * (k != 1)}" for k, what in ((n, "decode"), (prompt_tokens, "prompt token")) if k]
        assert headline(step) == (" and ".join(parts) or "nothing but page tables")
        assert step.number == plan.step
        told = re.findall(r"request (\d+): (\d+) tokens?, (.*)", text)
        rows = plan.prefill.tolist()
        assert [(int(u), int(k)) for u, k, _ in told] == [(int(machine.table.uid[s]), k) for s, _, k in rows]
        for (uid, _, how), (_, flags, k) in zip(told, rows, strict=True):
            first = self.computed[int(uid)] == 0
            self.computed[int(uid)] += k
            whole = "its whole prompt" if first else "the rest of its prompt"
            assert (whole in how) == bool(flags & DRAW), how
            if flags & DRAW:
                continue
            end, _, of = re.match(r"up to (\d+) (of) (\d+)", how).groups()  # type: ignore[union-attr]
            assert int(end) == self.computed[int(uid)] < int(of)
            assert int(of) == len(machine.running[int(uid)][1].ids)
            if "pages can be had" in how:
                assert machine.pool.free + machine.cache.evictable == 0
                assert int(end) % size == 0
            elif more := re.search(r"more than (\d+) prompt tokens", how):
                assert int(more[1]) == prompt_tokens < self.limits.step_tokens - n
            elif "no room" not in how:
                budget, less = re.search(r"budget of (\d+)(?: less (\d+) decodes?)?", how).groups()  # type: ignore[union-attr]
                assert int(budget) == self.limits.step_tokens
                assert int(less or 0) == n == self.limits.step_tokens - prompt_tokens
        self.facts += len(rows)

    def _check_waits(self, step: Step, text: str, plan: StepPlan | None) -> None:
        machine, size = self.machine, self.limits.page_size
        queue = {r.uid: r for r in machine.waiting.front(1000)}
        assert [w.uid for w in step.waits] == list(queue)
        assert (re.match(r"\d+", text) or ["0"])[0] == str(len(queue))
        for wait in step.waits:
            mine = queue[wait.uid].ids
            if wait.reason == "slot":
                assert (machine.table.free_slots, wait.number) == (0, self.limits.slots)
            elif wait.reason == "budget":
                assert wait.number == (0 if plan is None else len(plan.ids))
            elif wait.reason == "pages":
                assert wait.of < wait.number <= -(-(len(mine) + 1) // size)
            elif wait.reason == "shared":
                other = machine.running[wait.number][1].ids
                assert np.array_equal(mine[:size], other[:size]), "they have no page in common"
            elif wait.reason == "plan":
                assert plan is None
            self.facts += 1


def load(seed: int, change: Callable[[Step], Step] = lambda step: step, kind: type[Told] = Told) -> Told:
    """Arrivals with common beginnings, cancellations, flushes, clients, priorities, late results; few slots and pages."""
    rng = random.Random(seed)
    loop = kind(
        change,
        slots=rng.choice([2, 4, 7]),
        num_pages=rng.choice([16, 24, 40]),
        max_steps_in_flight=rng.choice([1, 2, 2, 3]),
        step_tokens=rng.choice([9, 16, 40]),
        itl_target=rng.choice([0.0, None, 0.002]),
        order=rng.choice(["prefix", "arrival"]),
    )
    trunks = [prompt(rng.randrange(1, 30), i) for i in range(4)]
    for _ in range(rng.randrange(30, 60)):
        for _ in range(rng.choice([0, 0, 0, 1, 1, 3])):
            ids = [*rng.choice(trunks), *prompt(rng.randrange(1, 12), rng.randrange(1, 20))]
            options = RequestOptions(priority=rng.choice([0, 0, 1]), client=rng.randrange(3), call=rng.randrange(5))
            if rng.random() < 0.1:
                options = replace(options, pooling=rng.choice(["mean", "last"]))
            loop.add(ids, rng.randrange(1, 20), options)
        if loop.asked and rng.random() < 0.1:
            loop.drop(rng.randrange(1, len(loop.asked) + 1))
        if rng.random() < 0.03:
            loop.flush()
        loop.step(rng.choice([None, 0, 1, 2]))
        loop.now += rng.random() * 0.01
    loop.run()
    return loop


@pytest.mark.parametrize("seed", range(40))
def test_every_number_in_a_sentence_is_right(seed: int) -> None:
    loop = load(seed)
    assert loop.facts > 30
    lines = list(narrate(loop.steps))
    numbers: list[int] = []
    for line in lines:
        if found := re.match(r"steps? (\d+)(?: to (\d+))?[:,]", line):
            numbers += range(int(found[1]), int(found[2] or found[1]) + 1)
    assert numbers == [step.number for step in loop.steps if step.number is not None]


def one_more(name: str, field: str, by: int = 1) -> Callable[[Step], Step]:
    """A mutation: the first fact of a list has a number that is off."""

    def change(step: Step) -> Step:
        facts = getattr(step, name)
        if not facts:
            return step
        return replace(step, **{name: [replace(facts[0], **{field: getattr(facts[0], field) + by}), *facts[1:]]})

    return change


MUTATIONS = {
    "cached tokens": one_more("joins", "cached", 4),
    "tokens of a prompt": one_more("joins", "tokens"),
    "who joins": one_more("joins", "uid"),
    "end of a chunk": one_more("chunks", "end", -1),
    "decodes": lambda s: replace(s, decodes=s.decodes + 1),
    "tokens said": one_more("ends", "tokens"),
    "who is retracted": one_more("retractions", "uid"),
    "retractions untold": lambda s: replace(s, retractions=[]),
    "joins untold": lambda s: replace(s, joins=s.joins[1:]),
    "who waits": lambda s: replace(s, waits=s.waits[1:]),
    "pages needed": lambda s: replace(s, waits=[replace(w, of=w.number) if w.reason == "pages" else w for w in s.waits]),
    "everybody waits for a slot": lambda s: replace(s, waits=[Wait(w.uid, "slot", s.slots) for w in s.waits]),
    "the budget": lambda s: replace(s, budget=None if s.budget is None else s.budget + 1),
    "why a chunk ends": lambda s: replace(s, chunks=[replace(c, why="pages") if c.why == "budget" else c for c in s.chunks]),
    "whole prompts": lambda s: replace(s, chunks=[replace(c, why="budget") for c in s.chunks]),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_sentence_that_is_wrong_is_noticed(name: str) -> None:
    def noticed(seed: int) -> bool:
        try:
            load(seed, MUTATIONS[name])
        except (AssertionError, KeyError):
            return True
        return False

    assert any(noticed(seed) for seed in range(12))


def test_a_witness_changes_no_decision() -> None:
    class Plain(Told):
        """Its machine is not witnessed."""

        def __init__(self, change: Callable[[Step], Step], **limits: Any) -> None:
            Loop.__init__(self, **limits)

    for seed in range(6):
        told, plain = load(seed), load(seed, kind=Plain)
        assert [p.pack() for p in told.plans] == [p.pack() for p in plain.plans]


# ---------------- the words
def test_equal_steps_are_folded_into_one_line() -> None:
    steps = [Step(0.1, n, decodes=7) for n in range(12, 41)]
    assert list(narrate(steps)) == ["steps 12 to 40: 7 decodes each"]
    steps[10] = replace(steps[10], ends=[End(3, Finish.STOP, 9)])
    assert list(narrate(steps)) == [
        "steps 12 to 21: 7 decodes each",
        "step 22, 0.100 s: 7 decodes",
        "  request 3 ends after 9 tokens: its last token ends it",
        "steps 23 to 40: 7 decodes each",
    ]
    assert list(narrate([Step(0.0, 1, decodes=1), Step(0.0), Step(0.0, 2, decodes=2)])) == [
        "step 1: 1 decode",
        "step 2: 2 decodes",
    ]


def test_who_waits_is_told_when_it_changes() -> None:
    waits = [Wait(1, "slot", 4), Wait(2, "slot", 4), Wait(3, "pages", 5, 2)]
    steps = [Step(0.0, n, decodes=4, waits=waits) for n in range(3)] + [Step(0.0, 3, decodes=4, waits=waits[:1])]
    text = "; request 3 for pages (needs 5, and 2 can be had beside what running requests need)"
    assert list(narrate(steps)) == [
        "step 0, 0.000 s: 4 decodes",
        f"  3 requests wait: requests 1, 2 for a slot (all 4 are taken){text}",
        "steps 1 to 2: 4 decodes each",
        "step 3, 0.000 s: 4 decodes",
        "  1 request waits: request 1 for a slot (all 4 are taken)",
    ]
    many = Step(0.0, 0, waits=[Wait(uid, "shared", 9) for uid in range(20)])
    assert waiting(many) == "20 requests wait: 20 requests for its beginning, which request 9 is computing"


def test_each_reason_has_its_words() -> None:
    step = Step(
        0.0,
        5,
        decodes=2,
        budget=14,
        step_tokens=16,
        joins=[Join(1, 100, 48, "evicted", False), Join(2, 30, 16, "new", True)],
        chunks=[Chunk(1, 48, 62, 100, "budget"), Chunk(2, 16, 30, 30, "whole"), Chunk(3, 0, 8, 9, "pages")],
        retractions=[Retraction(4, "way")],
        evicted=1,
        withheld=1,
    )
    said = sentences(step)
    assert "request 1 joins: 48 of its 100 tokens are cached; the next page was evicted" in said
    assert "request 2 joins again: 16 of its 30 tokens are cached; the next page was never in the cache" in said
    assert "request 1: 14 tokens, up to 62 of 100: the step's budget of 16 less 2 decodes is used up" in said
    assert "request 3: 8 tokens, up to 8 of 9: no more pages can be had" in said
    assert "1 cached page evicted, the least recently used first" in said
    assert "1 row with a grammar must see its token in flight first" in said
    for target, words in ((0.05, "longer than 50 ms"), (None, "slow 2 decodes down")):
        assert any(words in text for text in sentences(replace(step, budget=9, target=target)))


# ---------------- the command
@pytest.mark.parametrize("tokens", [True, False])
def test_a_journal_is_told_as_its_machine_was_seen(tokens: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Kept:
        """A sink in memory."""

        error, due = "", False
        data = b""

        def begin(self, data: bytes) -> None:
            self.data = bytes(data)

        def write(self, data: bytes) -> None:
            self.data += data

        def flush(self, now: float) -> float:
            return float("inf")

        def close(self) -> None: ...

    class Journaled(Told):
        """Recorded while it is witnessed."""

        def __init__(self, *args: Any, **limits: Any) -> None:
            super().__init__(*args, **limits)
            self.recorder, self.sink = Recorder(self.machine), Kept()
            self.recorder.add(Writer(self.sink, {"run": "test"}, tokens))

        def _told(self, inbox: list[Event], now: float) -> Output:
            out = super()._told(inbox, now)
            self.recorder.saw(inbox, now, out)
            return out

    for seed in range(4):
        loop = load(seed, kind=Journaled)
        loop.recorder.close()
        file = tmp_path / f"{seed}"
        file.write_bytes(loop.sink.data)
        assert main(["explain", str(file)]) == 0
        said = capsys.readouterr().out.splitlines()
        if not tokens:
            assert "a journal of hashes" in said.pop(0)
            for step in loop.steps:
                step.joins = [replace(j, why="gone") if j.why in ("new", "evicted") else j for j in step.joins]
        assert said == list(narrate(loop.steps))
        numbers = [step.number for step in loop.steps if step.number is not None]
        middle = numbers[len(numbers) // 2]
        assert main(["explain", str(file), "--steps", f"{middle}-{middle + 3}", "--json"]) == 0
        facts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [f["number"] for f in facts if f["number"] is not None] == list(range(middle, min(middle + 4, len(numbers))))
        assert main(["explain", str(file), "--request", "1"]) == 0
        life = capsys.readouterr().out
        assert "request 1 arrives" in life
        assert "request 1 ends" in life
        assert not re.search(r"request [2-9]\d* (arrives|joins|ends)", life)


def test_what_is_no_journal_is_refused_with_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("a text that is no journal at all")
    for words, named in (
        ([str(tmp_path / "none")], "there is no such journal"),
        ([str(tmp_path / "text")], "no journal of minisgl"),
        ([str(tmp_path / "text"), "--next", "5"], "--next is of a live server"),
        ([str(tmp_path / "text"), "--api-key", "k"], "--api-key is of a live server"),
        (["http://127.0.0.1:1", "--steps", "5"], "--next N"),
        (["http://127.0.0.1:1", "--next", "0"], "1 to 1000000"),
        (["http://127.0.0.1:1", "--seconds", "nan"], "no number of seconds"),
        ([str(tmp_path / "text"), "--steps", "a"], "--steps a: write 7, 7-20 or 7-"),
    ):
        try:
            code = main(["explain", *words])
        except SystemExit as e:
            code = e.code  # type: ignore[assignment]
        assert code == 2
        assert named in capsys.readouterr().err
    assert main(["explain", "http://127.0.0.1:1"]) == 1
    assert "no server answers at http://127.0.0.1:1" in capsys.readouterr().err


# ---------------- a live server
@pytest.mark.parametrize("seed", range(3))
def test_whoever_watches_is_told_what_a_witness_of_the_machine_has_seen(seed: int) -> None:
    """Asked in the middle: every call from then on, with the same facts; and the replay goes on alike when nobody asks."""
    recorded = random_load(seed, rotations=0.0)
    data = bytes(recorded.parts[True][0])
    whole, watch, want = Replay(data), Watch(), []
    viewer, cut = Viewer(lambda ids: []), len(data) // 3
    viewer.take("journal", data[:cut], True)
    before = viewer.live.calls
    whole.call = lambda machine, inbox, now, step: (watch if whole.calls > before else plain_call)(machine, inbox, now, step)
    plain_call = Replay().call
    while whole.advance():
        want += [plain(watch.steps.popleft())] if watch.steps else []
    viewer.take("watch", 1, None, True)
    viewer.take("explain", 1)
    told: list[dict[str, Any]] = []
    for at in range(cut, len(data), 999):
        viewer.take("journal", data[at : at + 999], False)
        viewer.due()
        for _, _, raw in viewer.out:
            told += json.loads(raw)["told"]
        viewer.out.clear()
        viewer.take("ready", 1)
    viewer.due()
    told += [facts for _, _, raw in viewer.out for facts in json.loads(raw)["told"]]
    assert len(want) > 20
    assert told == json.loads(json.dumps(want))
    assert [step_of(facts) for facts in told] == [step_of(facts) for facts in want]
    viewer.take("leave", 1)
    machine = viewer.live.machine
    assert machine is not None
    assert not {"_prefill", "_release"} & vars(machine).keys()


def test_what_waits_for_a_slow_reader_is_bounded_by_its_facts_and_comes_in_small_messages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call of a scheduler with a long queue has a fact for each request in it."""
    data = bytes(random_load(1, rotations=0.0).parts[True][0])
    cut = len(data) // 3
    everything: list[dict[str, Any]] = []
    for untold_, told_ in ((10**9, 10**9), (60, 12)):
        monkeypatch.setattr("minisgl.view.viewer._UNTOLD", untold_)
        monkeypatch.setattr("minisgl.view.viewer._TOLD", told_)
        viewer, told, untold = Viewer(lambda ids: []), [], 0
        viewer.take("journal", data[:cut], True)
        viewer.take("watch", 1, None, True)
        viewer.take("explain", 1)
        for at in range(cut, len(data), 9999):
            viewer.take("journal", data[at : at + 9999], False)
        for _ in range(10_000):
            viewer.due()
            if not viewer.out:
                break
            (_, _, raw), *_ = viewer.out
            viewer.out.clear()
            message = json.loads(raw)
            assert len(message["told"]) == 1 or sum(1 + len(f["waits"]) for f in message["told"]) <= told_
            told += message["told"]
            untold += message["untold"]
            viewer.take("ready", 1)
        everything = everything or told
        assert told == everything[len(everything) - len(told) :]
        assert len(told) + untold == len(everything)
        assert sum(1 + len(f["waits"]) for f in told) <= untold_
    assert untold > 20
    assert any(facts["waits"] for facts in told)


def test_a_live_server_is_explained_in_the_words_of_its_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While requests come, with a journal beside: what was told is the same steps of the journal's story."""
    server = ServerProcess(tmp_path, "--max-running", "2", "--journal", str(tmp_path / "j"), "--journal-tokens")
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            body = json.dumps({"prompt": "a ship, " * 60, "max_tokens": 7, "ignore_eos": True}).encode()
            request = Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
            with urlopen(request) as answer:
                answer.read()

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        assert main(["explain", server.url, "--next", "40", "--json"]) == 0
        live = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert main(["explain", server.url, "--next", "10"]) == 0
        words = capsys.readouterr().out.splitlines()
        assert main(["explain", server.url, "--next", "1000", "--seconds", "0.1"]) == 0
        assert "--seconds" in capsys.readouterr().err
    finally:
        stop.set()
        for asker in askers:
            asker.join()
    os.kill(server.proc.pid, signal.SIGTERM)
    assert server.proc.wait(timeout=60) == 0
    assert sum(facts["number"] is not None for facts in live) == 40
    assert re.match(r"(between steps|steps? \d+)", words[0])
    assert main(["explain", str(tmp_path / "j"), "--json"]) == 0
    story = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    known = {facts["now"]: facts for facts in story}
    for facts in live:
        assert facts == known[facts["now"]]
    assert sum(len(facts["joins"]) for facts in live) > 2
    assert main(["explain", str(tmp_path / "j")]) == 0
    said = set(capsys.readouterr().out.splitlines())
    details = [line for line in words if line.startswith("  ") and "wait" not in line]
    assert details
    assert set(details) <= said
    assert "ids" not in live[0], "no token of a prompt is told"
