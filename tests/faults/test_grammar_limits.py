"""Grammars that cost too much: refused in a sentence before they run, or ended alone, and nobody else waits for them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import World, fake_config
from processes import alive, eventually
from scripted import Server, serve
from test_grammar import _plan

from minisgl import gbnf, grammar
from minisgl.actors import checker
from minisgl.actors.checker import CheckerActor
from minisgl.actors.messages import CheckGrammar, GrammarChecked, GrammarPrepared, Rejected
from minisgl.actors.runtime.actor import Actor, Context, on
from minisgl.actors.runtime.local import LocalSystem
from minisgl.api.requests.openai import parse_completion
from minisgl.errors import InvalidParam
from minisgl.model.common.grammar import CACHE_BYTES, GROWN_BYTES, Grammars, Vocabulary, tokenizer_of, unpack
from minisgl.plan import StepPlan
from minisgl.sampling_params import Finish

BYTES = Vocabulary([bytes([i]) for i in range(256)] + [b"aaaa", b"abab", b'":', b""], frozenset({259}), (259,))
JSON_GBNF = """root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\\"" ( [^"\\\\\\x7F\\x00-\\x1F] | "\\\\" ["\\\\/bfnrt] )* "\\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]*)) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws ::= ([ \\t\\n] ws)?
"""


def chain(n: int) -> str:
    """GBNF whose terminals are found one behind the other."""
    return "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(n)) + f'r{n} ::= "x"\n'


def doubled(n: int) -> str:
    """A schema that refers to each of its parts twice."""
    parts: dict[str, Any] = {"d0": {"type": "object", "properties": {"x": {"type": "string"}}}}
    for i in range(1, n):
        parts[f"d{i}"] = {"anyOf": [{"$ref": f"#/$defs/d{i - 1}"}, {"$ref": f"#/$defs/d{i - 1}"}, {"type": "integer"}]}
    return grammar.json_schema({"allOf": [{"$ref": f"#/$defs/d{n - 1}"}] * 2, "$defs": parts})


BOMBS = {
    "nested counts": grammar.regex("(a{1000}){1000}"),
    "counts after a prefix": grammar.regex("b(a{1000}){1000}"),
    "optional": grammar.regex("a?" * 2000 + "a" * 2000),
    "remainders": grammar.json_schema({"type": "integer", "multipleOf": 9_999_991}),
    "references": doubled(14),
    "all of any": grammar.json_schema(
        {"allOf": [{"anyOf": [{"properties": {f"a{i}": {"type": t}}} for t in ("integer", "string")]} for i in range(12)]}
    ),
    "intersection": grammar.lark("start: X\nX: /(?s:.*a.{10})/ & /(?s:.*b.{11})/ & /(?s:.*c.{12})/ & ~/(?s:.*dd.*)/"),
    "groups": grammar.unread("root ::= " + "(" * 20_000),
}
FITTING = {
    "email": grammar.regex(r"[\w.+-]{1,64}@[\w-]{1,63}(\.[\w-]{2,63}){1,5}"),
    "choice": grammar.choice([f"option number {i} {i * 7919 % 10007}" for i in range(2000)]),
    "schema": grammar.json_schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(50)}}),
    "long string": grammar.json_schema({"type": "string", "maxLength": 10_000}),
    "gbnf": grammar.unread(JSON_GBNF),
    "chain": grammar.unread(chain(300)),
    "either": grammar.either(grammar.unread('root ::= "a" [0-9]+'), grammar.regex("[a-z]{1,30}")),
    "thought": grammar.after_thought(grammar.unread('root ::= "a" [0-9]+'), "qwen3", begun=False),
}


# ---------------- the checker
class Api(Actor):
    """Collects the answers of the checker."""

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self.said: dict[int, GrammarChecked | Rejected] = {}

    @on(GrammarChecked)
    def checked(self, m: GrammarChecked) -> None:
        self.said[m.uid] = m

    @on(Rejected)
    def rejected(self, m: Rejected) -> None:
        self.said[m.uid] = m


class Trial:
    """A checker with a small vocabulary, in this thread; its children are real."""

    def __init__(self) -> None:
        self.system = LocalSystem()
        self.api = self.system.spawn("api", Api)
        self.checker = self.system.spawn("checker", lambda ctx: CheckerActor(ctx, lambda: tokenizer_of(BYTES)))
        self.uid = 0

    def ask(self, *texts: str) -> list[GrammarChecked | Rejected]:
        first = self.uid + 1
        for text in texts:
            self.uid += 1
            self.system.post("api", "checker", CheckGrammar(self.uid, text, "guided_regex"))
        self.system.run()
        return [self.api.said[uid] for uid in range(first, self.uid + 1)]


@pytest.fixture(scope="module")
def trial() -> Trial:
    return Trial()


def test_what_costs_too_much_is_refused_in_a_sentence_and_the_next_is_served(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked: list[int] = []
    fork = os.fork

    def counted() -> int:
        pid = fork()
        forked.append(pid)
        return pid

    monkeypatch.setattr(checker.os, "fork", counted)
    answers = trial.ask(*BOMBS.values(), FITTING["email"])
    for name, answer in zip(BOMBS, answers, strict=False):
        assert isinstance(answer, Rejected), name
        assert answer.status == 400
        assert answer.param == "guided_regex"
        assert answer.text.startswith(
            ("guided_regex makes a grammar that is too large", "guided_regex cannot be used", "the grammar")
        )
        assert answer.text.endswith(".")
    assert isinstance(answers[-1], GrammarChecked)
    large = [a for a in answers[:-1] if isinstance(a, Rejected) and a.code == "grammar_too_complex"]
    assert len(large) >= len(BOMBS) - 2
    assert not trial.checker._running
    assert len(forked) == len(BOMBS) + 1
    for pid in forked:
        with pytest.raises(ChildProcessError):  # it was waited for
            os.waitpid(pid, os.WNOHANG)


def test_ordinary_grammars_fit_and_come_back_in_the_form_that_is_served(trial: Trial) -> None:
    for (name, text), answer in zip(FITTING.items(), trial.ask(*FITTING.values()), strict=True):
        assert isinstance(answer, GrammarChecked), (name, answer)
        assert answer.grammar == grammar.resolved(text)
        assert '"gbnf"' not in answer.grammar


def test_a_grammar_that_comes_again_is_not_tried_again(trial: Trial) -> None:
    text = grammar.regex("(b{900}){900}")
    first = trial.ask(text, text, FITTING["gbnf"])
    tried = trial.checker.trials
    again = trial.ask(text, FITTING["gbnf"])
    assert trial.checker.trials == tried
    assert [type(a) for a in again] == [type(first[0]), type(first[2])]


def test_a_child_that_is_killed_or_never_ends_refuses_its_own_grammar(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker, "_WALL_SECONDS", 0.2)
    monkeypatch.setattr(checker, "try_masks", lambda *_: threading.Event().wait())
    (answer,) = trial.ask(grammar.regex("z+"))
    assert isinstance(answer, Rejected)
    assert answer.code == "grammar_too_complex"
    monkeypatch.undo()
    monkeypatch.setattr(checker, "try_masks", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    (answer,) = trial.ask(grammar.regex("y+"))
    assert isinstance(answer, Rejected)
    monkeypatch.undo()
    (answer,) = trial.ask(grammar.regex("x+"))
    assert isinstance(answer, GrammarChecked)


# ---------------- before the checker
@pytest.mark.parametrize("name", ["guided_regex", "guided_grammar", "guided_json", "guided_choice", "structured_outputs"])
def test_a_long_source_is_refused_by_its_size_before_it_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def untouched(*_: Any) -> None:
        raise AssertionError("it was read")

    for reader in (
        "minisgl.gbnf.to_lark",
        "minisgl.grammar.regex",
        "minisgl.grammar.json_schema",
        "minisgl.grammar.json.loads",
    ):
        monkeypatch.setattr(reader, untouched)
    long = "x" * (grammar.MAX_GRAMMAR_CHARS + 1)
    value: Any = {"guided_choice": [long[:100_000]] * 2, "structured_outputs": {"grammar": long}}.get(name, long)
    with pytest.raises(InvalidParam, match="characters") as e:
        parse_completion(fake_config(), {"prompt": "x", name: value})
    assert e.value.param == (name if name != "structured_outputs" else "structured_outputs.grammar")


def test_no_gbnf_is_converted_where_requests_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gbnf, "to_lark", lambda text: pytest.fail("converted on the event loop"))
    request = parse_completion(fake_config(), {"prompt": "x", "guided_grammar": chain(3)})
    monkeypatch.undo()
    assert grammar.resolved(request.params.grammar) != request.params.grammar


def test_conversion_visits_every_part_once(monkeypatch: pytest.MonkeyPatch) -> None:
    visits: list[int] = []
    nodes = gbnf._nodes

    def counted(rule: Any) -> Iterator[Any]:
        for node in nodes(rule):
            visits.append(1)
            yield node

    monkeypatch.setattr(gbnf, "_nodes", counted)
    monkeypatch.setattr("llguidance.gbnf_to_lark.ASTNode.is_terminal", lambda self: pytest.fail("a pass over all rules"))
    text = gbnf.to_lark(chain(2000))
    assert len(visits) <= 3 * 2002
    assert "R2000" in text


def test_the_conversion_is_the_library_s(monkeypatch: pytest.MonkeyPatch) -> None:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    for text in (JSON_GBNF, chain(5), 'root ::= fooBar-x | "a"\nfooBar-x ::= [a-z]+ root?'):
        ours, theirs = (sorted(line for line in t.splitlines() if line) for t in (gbnf.to_lark(text), gbnf_to_lark(text)))
        assert ours == theirs


# ---------------- in a worker
def grammars(**more: Any) -> Grammars:
    return Grammars(lambda: BYTES, **more)


def test_an_answer_that_exhausts_a_shared_lexer_fails_alone() -> None:
    text = grammar.regex("x(a{1000}){1000}|y{3,9}")
    g = grammars()
    g.join(_plan([(0, text, []), (1, text, [])]))
    slots = np.array([0, 1])
    failed = np.zeros(2, np.bool_)
    g.masks(slots)
    g.advance(slots, np.array([ord("x"), ord("y")], np.int32))
    for step in range(6):
        masks, now = g.masks(slots)
        failed |= now
        allowed = unpack(masks, 260)
        assert allowed[1, ord("y")], step
        g.advance(slots, np.array([ord("a"), ord("y")], np.int32))
    assert failed.tolist() == [True, False]


def test_lexers_that_grow_are_compiled_anew_and_say_the_same() -> None:
    """A memory that seems to grow with every mask; the slow loop reads each answer anew."""
    size = [0]

    def memory() -> int:
        size[0] += 8 << 20
        return size[0]

    text = grammar.regex(r"([a-z]{1,9} ){2,30}[0-9]+")
    g, compiled = grammars(memory=memory), []
    compile_ = g._compile
    g._compile = lambda t: compiled.append(t) or compile_(t)  # type: ignore[method-assign, func-returns-value]
    g.join(_plan([(0, text, []), (1, text, list(b"ab "))]))
    said = {0: b"", 1: b"ab "}
    for letter in b"hello world and more of it":
        masks, failed = g.masks(np.array([0, 1]))
        assert not failed.any()
        for row, slot in enumerate((0, 1)):
            alone = grammars()
            alone.join(_plan([(0, text, list(said[slot]))]))
            assert (masks[row] == alone.masks(np.array([0]))[0][0]).all()
            said[slot] += bytes([letter])
        g.advance(np.array([0, 1]), np.array([letter, letter], np.int32))
        assert (
            sum(x.grown for x in {id(f.grammar): f.grammar for f in g._followers.values()}.values())
            <= GROWN_BYTES + CACHE_BYTES
        )
    assert len(compiled) > 1


def test_the_cache_of_compiled_grammars_is_bounded_by_bytes() -> None:
    size = [0]

    def memory() -> int:
        size[0] += 1 << 20
        return size[0]

    g = grammars(memory=memory)
    for i in range(80):
        g.join(_plan([(0, grammar.regex(f"a{{1,{i + 2}}}"), [])]))
    assert sum(x.grown for x in g._kept.values()) <= CACHE_BYTES + (2 << 20)


def test_a_grammar_is_compiled_beside_the_steps() -> None:
    g, release, here = grammars(), threading.Event(), threading.get_ident()
    compile_, threads = g._compile, []

    def slow(text: str) -> Any:
        threads.append(threading.get_ident())
        release.wait(30)
        return compile_(text)

    g._compile = slow  # type: ignore[method-assign]
    text = grammar.regex("[ab]+")
    g.compile_ahead(1, text)
    g.compile_ahead(2, text)
    assert g.prepared() == []
    assert g.preparing()
    release.set()
    tickets: list[int] = []
    while g.preparing():
        tickets += g.prepared()
        time.sleep(0.001)
    assert tickets == [1, 2]
    g.join(_plan([(0, text, [])]))
    assert len(threads) == 1
    assert threads[0] != here


def without_grammars(launch: Callable[[StepPlan], Any]) -> Callable[[StepPlan], Any]:
    """A fake runner that does not follow them."""

    def run(plan: StepPlan) -> Any:
        plan.grammars = plan.grammars[:0]
        return launch(plan)

    return run


class Slow:
    """Grammars of a worker that are ready when the test says so."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.ready: list[int] = []

    def compile_ahead(self, ticket: int, text: str) -> None:
        self.asked.append(ticket)

    def preparing(self) -> bool:
        return bool(self.ready)  # in a LocalSystem, that waits for nothing

    def prepared(self) -> list[int]:
        ready, self.ready = self.ready, []
        return ready

    def rows(self, slots: Any) -> Any:
        return slots[:0]


def test_a_request_waits_for_its_grammar_on_every_rank_and_nobody_waits_for_it(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world(3, tp=2)
    for runner in w.runners:
        monkeypatch.setattr(runner, "grammars", Slow())
        monkeypatch.setattr(runner, "launch", without_grammars(runner.launch))
    bound = w.submit([1, 2, 3], 4, grammar=grammar.regex("a+"))
    left = w.submit([1, 2, 4], 4, grammar=grammar.regex("b+"))
    free = [w.submit([5 + i, 2], 4) for i in range(3)]
    w.system.run()
    assert all(w.ends[uid] in (Finish.LENGTH, Finish.STOP) for uid in free)
    assert bound not in w.ends
    w.gateway.close(left)
    w.system.post("worker0", "scheduler", GrammarPrepared(bound, 0))
    w.system.post("worker0", "scheduler", GrammarPrepared(left, 0))
    w.system.run()
    assert bound not in w.ends
    w.system.post("worker1", "scheduler", GrammarPrepared(bound, 1))
    w.system.run()
    assert w.ends[bound] in (Finish.LENGTH, Finish.STOP)
    assert not w.scheduler._compiling


# ---------------- the whole server
@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("--max-running", "32", "--threads", "1") as s:
        yield s


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def actors(root: int) -> dict[str, int]:
    """Process ids by title, of the children of `root`."""
    found = {}
    for pid in Path(f"/proc/{root}/task/{root}/children").read_text().split():
        title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        found[title.removeprefix("minisgl::")] = int(pid)
    return found


def test_many_bombs_at_once_are_refused_and_the_processes_stay_small(server: Server) -> None:
    ask = {"prompt": "The answer:", "max_tokens": 8, "temperature": 0}
    first = server.post("/v1/completions", {**ask, "guided_regex": "[ab]{3,5}"})
    assert 3 <= len(first["choices"][0]["text"]) <= 5
    pids = actors(server.process.pid)
    before = {name: resident(pid) for name, pid in pids.items()}
    bombs = [f"(a{{{990 + i}}}){{1000}}" for i in range(12)] + [rf"((\w{{1,{30 + i}}}){{1,30}}){{1,30}}" for i in range(4)]
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda b=b: answers.append(server.refused("/v1/completions", {**ask, "guided_regex": b})))
        for b in bombs
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(answers) == len(bombs)
    for status, body in answers:
        assert status == 400
        assert body["error"]["param"] == "guided_regex"
        assert body["error"]["code"] == "grammar_too_complex"
        assert "too large" in body["error"]["message"]
    assert actors(server.process.pid) == pids
    for name, pid in pids.items():
        assert resident(pid) - before[name] < 100 << 20, name
    assert json.loads(server.raw("GET", "/health")[1])["status"] == "ready"
    text = server.post("/v1/completions", {**ask, "max_tokens": 12, "guided_grammar": 'root ::= "x" [0-9]+ "."'})["choices"][0][
        "text"
    ]
    assert text.startswith("x")


def test_nothing_is_left_when_the_root_is_killed_in_the_middle_of_it(server: Server) -> None:
    """The last test of this server: trials of grammars are running, and large bodies are being read."""
    slow = {"prompt": "x", "guided_regex": "((a{500}){50}){50}"}
    large = {"prompt": "x", "user": [[]] * 800_000}
    for body in (slow, large, slow, large):
        threading.Thread(target=_try, args=(server, body), daemon=True).start()
    eventually(lambda: "reader" in actors(server.process.pid))
    family = descendants(server.process.pid)
    assert len(family) >= 8
    os.kill(server.process.pid, signal.SIGKILL)
    eventually(lambda: not [pid for pid in family if alive(pid)])


def _try(server: Server, body: Any) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        server.raw("POST", "/v1/completions", body)


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    children = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [d for c in children for d in descendants(c)]
