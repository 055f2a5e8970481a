"""The chaos harness (scripts/check/chaos.py) notices what it is there for: faults that are planted in recorded answers."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.check import chaos as command
from scripts.lib import recoveries, storm, watched
from scripts.lib.answers import Answer, Part, complete, difference, faults, pool_faults, read_event, read_plain, slope
from scripts.lib.attacks import Kill
from scripts.lib.mixed import KINDS, Case, cases

GOOD = Answer(
    parts={
        "0": Part("one two three", [1, 2, 3], [], [-1.0, -2.0, None], {}, ["stop"]),
        "1": Part("", [], [" a", " b"], [-1.5, -2.5], {0: ["weather", '{"city": "Rome"}']}, ["tool_calls"]),
        "l2:0": Part("a batch's line", [], [], [], {}, ["length"]),
    },
    usage={"completion_tokens": 9},
    ends=1,
)


def spoilt(change: Callable[[Answer], object]) -> list[str]:
    answer = copy.deepcopy(GOOD)
    change(answer)
    return faults(GOOD, answer)


PLANTED: dict[str, tuple[str, Callable[[Answer], object]]] = {
    "a lost token": ("lost: 1 at 1 of 3 of ids", lambda a: a.parts["0"].ids.pop(1)),
    "a lost last token": ("lost: 1 at 2 of 3 of ids", lambda a: a.parts["0"].ids.pop()),
    "a repeated token": ("repeated: 1 at 2 of 3 of ids", lambda a: a.parts["0"].ids.insert(1, 2)),
    "a changed token": ("changed: [9, 3] instead of [2, 3]", lambda a: a.parts["0"].ids.__setitem__(1, 9)),
    "a lost letter": ("lost: 1 at 4 of 13 of text", lambda a: setattr(a.parts["0"], "text", "one wo three")),
    "repeated letters": ("repeated: 4 at 9 of 13 of text", lambda a: setattr(a.parts["0"], "text", "one two two three")),
    "a token with another text": ("of tokens", lambda a: a.parts["1"].tokens.__setitem__(0, " x")),
    "another log probability": ("number 1 is -2.4", lambda a: a.parts["1"].numbers.__setitem__(1, -2.4)),
    "no log probability": ("number 1 is None", lambda a: a.parts["0"].numbers.__setitem__(1, None)),
    "a log probability less": ("has 1 numbers instead of 2", lambda a: a.parts["1"].numbers.pop()),
    "a call of something else": ("changed: calls", lambda a: a.parts["1"].calls.__setitem__(0, ["weather", "{}"])),
    "another end": ("ends by length instead of stop", lambda a: setattr(a.parts["0"], "ends", ["length"])),
    "no end": ("missing: part 0 has 0 ends", lambda a: a.parts["0"].ends.clear()),
    "an end twice": ("twice: part 0 has 2 ends", lambda a: a.parts["0"].ends.append("stop")),
    "a missing choice": ("missing: part 1 has no answer", lambda a: a.parts.pop("1")),
    "a line that nobody asked": ("part l9:0 was not asked for", lambda a: a.parts.update({"l9:0": Part(ends=["stop"])})),
    "a stream without its end": ("missing: the answer has 0 ends", lambda a: setattr(a, "ends", 0)),
    "an answer twice": ("twice: the answer has 2 ends", lambda a: setattr(a, "ends", 2)),
    "an error in a stream": ("an error instead of the end", lambda a: setattr(a, "error", "engine_error")),
    "another status": ("status 500 instead of 200", lambda a: setattr(a, "status", 500)),
    "another usage": ("changed: usage", lambda a: a.usage.update(completion_tokens=8)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_noticed(name: str) -> None:
    said, change = PLANTED[name]
    assert any(said in line for line in spoilt(change)), spoilt(change)


def test_an_answer_that_is_right_has_no_fault_and_none_at_all_is_missing() -> None:
    assert faults(GOOD, copy.deepcopy(GOOD)) == []
    assert spoilt(lambda a: a.parts["1"].numbers.__setitem__(0, -1.5004)) == []
    assert faults(GOOD, None) == ["missing: no answer came"]


def test_a_sequence_that_differs_in_every_way_is_never_called_equal() -> None:
    want = list(range(10))
    for i in range(10):
        for j in range(i + 1, 11):
            assert difference(want, want[:i] + want[j:]).startswith("lost: ")
            assert difference(want, want[:j] + want[i:]).startswith("repeated: ")
    assert difference(want, [*want[:5], 77, *want[5:]]).startswith("changed: added: 1 at 5")


def test_a_leaked_page_and_an_open_request_are_noticed() -> None:
    whole = {"total_pages": 64, "free_pages": 64, "running_requests": 0, "waiting_requests": 0}
    assert pool_faults(whole, 0) == []
    assert pool_faults(whole | {"free_pages": 63}, 0) == ["leaked: 1 pages of 64"]
    assert pool_faults(whole | {"running_requests": 1}, 2) == ["leaked: 2 requests are open", "leaked: 1 requests are running"]


# ---------------- streams
def stream(path: str, *events: Any) -> Answer:
    answer = Answer()
    for event in events:
        read_event(path, event if isinstance(event, str) else json.dumps(event), answer)
    return answer


def native(ids: list[int], text: str, end: str | None = None) -> dict[str, Any]:
    return {
        "text": text,
        "output_ids": ids,
        "meta_info": {"completion_tokens": len(ids), "finish_reason": end and {"type": end}},
    }


def chat(index: int = 0, end: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": delta, "finish_reason": end}]}


def test_a_stream_that_takes_back_what_it_has_sent_is_torn() -> None:
    good = stream("/generate", native([5], "a"), native([5, 6], "ab"), native([5, 6, 7], "abc", "length"), "[DONE]")
    assert complete(good) == []
    assert (good.parts["0"].ids, good.parts["0"].text) == ([5, 6, 7], "abc")
    for again in (native([5, 7], "ac"), native([6], "b"), native([5, 6, 7], "xbc"), native([5], "a")):
        assert complete(
            stream("/generate", native([5, 6], "ab"), again, native(again["output_ids"], again["text"], "stop"), "[DONE]")
        )
    wrong = native([5, 6], "ab", "stop")
    wrong["meta_info"]["completion_tokens"] = 3
    assert complete(stream("/generate", wrong, "[DONE]")) == ["torn: 2 tokens are counted as 3"]


def test_what_comes_after_the_end_of_a_stream_or_of_a_choice_is_noticed() -> None:
    path, end = "/v1/chat/completions", chat(end="stop")
    assert complete(stream(path, chat(content="a"), end, "[DONE]")) == []
    assert complete(stream(path, chat(content="a"), end, chat(content="b"), "[DONE]")) == [
        "torn: choice 0 went on after its end"
    ]
    assert "torn: an event came after [DONE]" in complete(stream(path, end, "[DONE]", chat()))
    assert "torn: [DONE] came twice" in complete(stream(path, end, "[DONE]", "[DONE]"))
    assert complete(stream(path, chat(content="a"), "[DONE]")) == ["missing: part 0 has 0 ends"]
    failed = stream(path, chat(content="a"), {"error": {"code": "engine_error"}}, "[DONE]")
    assert any("engine_error" in line for line in complete(failed))


def test_pieces_of_a_stream_join_to_the_plain_answer() -> None:
    def call(name: str, arguments: str) -> list[dict[str, Any]]:
        return [{"index": 0, "function": {"name": name, "arguments": arguments}}]

    path = "/v1/chat/completions"
    pieces = (chat(content="a"), chat(1, content="x"), chat(tool_calls=call("f", "{")), chat(tool_calls=call("", "}")))
    streamed = stream(path, *pieces, chat(1, "stop", content="y"), chat(end="tool_calls"), "[DONE]")
    messages = [{"content": "a", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, {"content": "xy"}]
    ends = ("tool_calls", "stop")
    body = {
        "choices": [{"index": i, "message": m, "finish_reason": e} for i, (m, e) in enumerate(zip(messages, ends, strict=True))]
    }
    assert faults(read_plain(path, body, Answer()), streamed) == []


# ---------------- the rest of the harness
def test_the_requests_are_the_same_for_a_seed_and_of_every_kind() -> None:
    made = cases(3, 34, 90, 512)
    assert made == cases(3, 34, 90, 512)
    assert made != cases(4, 34, 90, 512)
    assert {c.kind for c in made} == {*KINDS, "batch", "socket", "too long"}
    assert any(c.stream for c in made)
    assert any(not c.stream for c in made)
    assert len(next(c for c in made if c.kind == "too long").body["prompt"]) > 512
    assert all(len({path for path, _ in c.lines}) == 1 for c in made if c.kind == "batch")


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    """A process with two children that have titles as ours have, and one that has not."""
    sleeper = (
        "import sys, time; import setproctitle; setproctitle.setproctitle(sys.argv[1]); print(1, flush=True); time.sleep(60)"
    )
    code = (
        "import subprocess, sys, time\n"
        f"procs = [subprocess.Popen([sys.executable, '-c', {sleeper!r}, t], stdout=subprocess.PIPE) for t in sys.argv[1:]]\n"
        "[p.stdout.readline() for p in procs]\nprint('up', flush=True)\nsys.stdin.read()\n[p.kill() for p in procs]\n"
    )
    command = [sys.executable, "-c", code, "minisgl::worker0", "minisgl::scheduler", "other"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        assert process.stdin is not None
        process.stdin.close()


def test_only_titled_children_are_found_and_nobody_else_is_signalled(parent: subprocess.Popen[str]) -> None:
    found = dict(watched.children_of(parent.pid))
    assert sorted(found) == ["scheduler", "worker0"]
    server = watched.Watched.__new__(watched.Watched)
    server.pid = parent.pid
    assert server.send(found["worker0"], signal.SIGCONT)
    assert not server.send(os.getpid(), signal.SIGKILL), "it is no child of the server"


def test_the_parts_of_recoveries_come_from_the_log() -> None:
    lines = [
        {"event": "restart", "level": "warning", "process": "worker0", "notice_s": 0.01, "replay_s": 0.2},
        {"event": "restart", "level": "warning", "process": "worker0", "notice_s": 0.03, "replay_s": 0.1},
        {"event": "load", "process": "worker0", "notice_s": 9.0},
    ]
    assert recoveries.restarts(lines)["worker0"]["notice_s"] == {"n": 2, "median": 0.02, "worst": 0.03}


def test_a_slope_is_that_of_the_straight_line() -> None:
    assert slope([0, 1, 2, 3], [5, 7, 9, 11]) == pytest.approx(2)
    assert slope([0, 1, 2], [4, 4, 4]) == 0
    assert slope([1], [4]) == 0


class _Stub(storm.Chaos):
    """A run that gets the given answers, and whose server never answers otherwise."""

    def __init__(self, engine: str, answer: Answer | None, alive: bool = True) -> None:
        server = SimpleNamespace(process=SimpleNamespace(poll=lambda: None if alive else 70), pid=1, lines=[])
        super().__init__(storm.Options(engine=engine), server, None, None, None)  # type: ignore[arg-type]
        self.want = {7: GOOD}
        self.asker = SimpleNamespace(ask=self._give)  # type: ignore[assignment]
        self._answer = answer

    async def _give(self, case: Case, slow: float) -> Answer | None:
        return self._answer


def test_each_fault_of_a_run_is_counted_by_its_kind_and_names_its_request() -> None:
    case = Case(7, "native", "/generate", {"stream": True})
    lost = copy.deepcopy(GOOD)
    lost.parts["0"].ids.pop()
    for answer, kind in ((lost, "lost"), (None, "missing"), (Answer(status=500, ends=1), "changed")):
        run = _Stub("fake", answer)
        asyncio.run(run._ask(case))
        assert set(run.kinds) == {kind}
        assert run.faults[0].startswith("request 7 (native, streamed): ")
        assert run.asked == 1
    right = _Stub("fake", GOOD)
    asyncio.run(right._ask(case))
    assert right.faults == []


def test_where_answers_depend_on_neighbours_only_what_contradicts_itself_is_a_fault() -> None:
    other, twice = copy.deepcopy(GOOD), copy.deepcopy(GOOD)
    other.parts["0"].ids[1] = 9
    twice.parts["0"].ends.append("stop")
    for answer, n in ((other, 0), (twice, 1), (None, 1)):
        run = _Stub("org/model", answer)
        asyncio.run(run._ask(Case(7, "native", "/generate", {})))
        assert len(run.faults) == n


def test_the_reproducer_is_a_command_that_the_harness_understands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = storm.Options(engine="cpu", kills=3, seed=9, who=frozenset({"worker"}), flags=["--threads", "1"])
    seen: list[storm.Options] = []

    async def attack(given: storm.Options) -> tuple[dict[str, Any], list[str]]:
        seen.append(given)
        return {"kills": 3, "requests": 1}, ["changed: a token"]

    monkeypatch.setattr(command, "attack", attack)
    monkeypatch.setitem(sys.modules, "scripts.lib.reference", SimpleNamespace(provenance=dict))
    name, *flags = options.reproducer().split()
    monkeypatch.setattr(sys, "argv", [name, "--json", str(tmp_path / "out.json"), *flags])
    assert command.main() == 1
    assert (seen[0].engine, seen[0].seed, seen[0].who, seen[0].flags) == ("cpu", 9, frozenset({"worker"}), ["--threads", "1"])
    assert seen[0].reproducer() == options.reproducer().replace("--cases 34", f"--cases {seen[0].setting('cases')}")
    assert json.loads((tmp_path / "out.json").read_text())["all_faults"] == ["changed: a token"]


def test_a_kill_is_noticed_when_the_log_says_so() -> None:
    def line(seconds: str, process: str) -> dict[str, Any]:
        return {"event": "restart", "time": f"2026-01-01T00:00:{seconds}Z", "process": process}

    at = 1767225600.0  # 2026-01-01
    log = [
        Kill(at + 1, ["worker0"]),
        Kill(at + 2, ["scheduler", "checker"]),
        Kill(at + 3, ["worker1"], "stop"),
        Kill(at + 4, ["x"]),
    ]
    lines = [line("01.020", "worker0"), line("02.005", "checker"), line("02.900", "scheduler"), line("09.000", "worker1")]
    assert recoveries.notices(log, lines) == pytest.approx([0.02, 0.005], abs=1e-4)


def test_what_a_server_logs_as_an_error_is_a_fault_unless_it_was_done_to_it() -> None:
    server = watched.Watched.__new__(watched.Watched)
    server.lines = [
        {"level": "error", "event": "log", "message": "scheduler failed", "traceback": "RuntimeError: result 7"},
        {"level": "error", "event": "hang", "message": "stands still"},
        {"level": "error", "event": "log", "message": "batch b waits: [Errno 28] No space left on device"},
        {"level": "warning", "event": "restart", "message": "again"},
        {"level": "raw", "event": "", "message": "Thread 0x1"},
    ]
    assert server.failures() == ["failed: scheduler failed RuntimeError: result 7"]
