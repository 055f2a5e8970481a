"""Real processes are killed, stopped and lost in the middle of answers, and no client notices more than a pause."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import openai
import process_actors
import pytest
from processes import eventually
from test_system import ENGINE, ServerProcess

from minisgl.actors.spawn import MakeWorker, make_worker
from minisgl.api.engine import Chunk, TextPrompt, TokenPrompt
from minisgl.api.system import System
from minisgl.config import Config, EngineConfig, ServerConfig
from minisgl.errors import RequestError
from minisgl.grammar import regex
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.fake_runner import expected_tokens
from minisgl.sampling_params import SamplingParams

LONG = 200  # tokens of an answer
EVERYBODY = "tokenizer,checker,detokenizer,scheduler,worker0,worker1"


def expected(i: int) -> list[int]:
    return expected_tokens([i + 1, 2, 3], LONG, resolve("fake").vocab_size, ())


class Answers:
    """A system of real processes and the answers of its requests."""

    def __init__(self, make_worker: MakeWorker = make_worker, config: Config | None = None, **server: Any) -> None:
        usual = Config(resolve("fake"), EngineConfig(**ENGINE), ServerConfig(**{"max_restarts": 50, **server}))
        self.system = System(config or usual, make_worker)
        self.system.wait_ready()
        self.said: dict[int, list[int]] = {}
        self.text: dict[int, str] = {}
        self.ends: dict[int, Any] = {}
        self.cached: dict[int, int] = {}

    def ask(self, key: int, prompt: Any, **params: Any) -> None:
        def take(item: Chunk | RequestError) -> None:
            assert key not in self.ends, "something came after the end"
            if isinstance(item, RequestError):
                self.ends[key] = item
                return
            self.said.setdefault(key, []).extend(item.token_ids)
            self.cached[key] = item.cached_tokens
            self.text[key] = self.text.get(key, "") + item.text
            if item.finish:
                self.ends[key] = item.finish

        self.system.gateway.open(prompt, SamplingParams(ignore_eos=True, **params), take)

    def until(self, what: Callable[[], Any]) -> None:
        def look() -> Any:
            self.system.pump(0.02)
            self.system.tick()
            return what()

        eventually(look)

    def kill(self, names: str, number: int = signal.SIGKILL) -> None:
        for name in names.split(","):
            os.kill(self.system.supervisor.pids[name], number)

    def close(self) -> None:
        gateway = self.system.gateway
        self.until(lambda: gateway.state == "ready" and gateway.stats["running_requests"] == 0)
        assert gateway.open_requests == 0
        assert not gateway._dispatcher.waiting
        gateway.flush_cache()
        self.until(lambda: gateway.stats["free_pages"] == gateway.stats["total_pages"])
        self.system.close()


@pytest.mark.parametrize("victims", ["tokenizer", "checker", "detokenizer", "scheduler", "worker1", EVERYBODY])
def test_after_the_death_of_any_process_every_answer_goes_on_where_it_was(victims: str) -> None:
    answers = Answers()
    for i in range(10):
        answers.ask(i, TokenPrompt((i + 1, 2, 3)), max_tokens=LONG)
    answers.until(lambda: len(answers.said) == 10 and min(map(len, answers.said.values())) > 20)
    answers.kill(victims)
    for i in range(10, 14):  # meanwhile
        answers.ask(i, TokenPrompt((i + 1, 2, 3)), max_tokens=LONG)
    answers.until(lambda: len(answers.ends) == 14)
    assert answers.said == {i: expected(i) for i in range(14)}
    answers.close()


def test_what_was_cached_outlives_a_scheduler_that_is_killed_under_load() -> None:
    answers, page = Answers(), EngineConfig(**ENGINE).page_size
    long = TokenPrompt(tuple(i % 50 for i in range(20 * page + 1)))
    right = expected_tokens(list(long.ids), 9, resolve("fake").vocab_size, ())
    answers.ask(100, long, max_tokens=9)
    answers.until(lambda: answers.ends)
    for i in range(10):
        answers.ask(i, TokenPrompt((i + 1, 2, 3)), max_tokens=LONG)
    for n in range(1, 4):
        answers.until(lambda n=n: min((len(answers.said.get(i, ())) for i in range(10)), default=0) > 20 * n)
        answers.kill("scheduler")
        answers.ask(100 + n, long, max_tokens=9)
    answers.until(lambda: len(answers.ends) == 14)
    assert [answers.cached[100 + n] for n in range(4)] == [0, *[20 * page] * 3]
    assert [answers.said[100 + n] for n in range(4)] == [right] * 4
    assert answers.said.items() >= {i: expected(i) for i in range(10)}.items()
    answers.close()


@pytest.mark.timeout(400)
def test_a_conversation_with_a_model_goes_on_with_its_prefix_after_the_scheduler_was_killed() -> None:
    engine = EngineConfig(kv_tokens=1024, max_context=512, device="cpu")
    answers = Answers(config=Config(resolve(None), engine, ServerConfig(max_restarts=5)))
    conversation = TextPrompt("".join(f"{i}: the river is {i * i % 17} metres deep.\n" for i in range(32)))
    for key in range(2):
        answers.ask(key, conversation, temperature=0.0, max_tokens=8)
        answers.until(lambda key=key: key in answers.ends)
        if not key:
            answers.kill("scheduler")
    assert answers.said[0] == answers.said[1]
    assert answers.cached[0] == 0
    assert answers.cached[1] > 300
    answers.close()


def test_prompts_and_grammars_that_a_dead_process_was_reading_are_read_by_the_next() -> None:
    answers, grammars = Answers(), list[Any]()
    ask, gateway = answers.ask, answers.system.gateway
    ask(0, TextPrompt("the first words"), max_tokens=9)
    answers.until(lambda: answers.ends)
    answers.kill("tokenizer,checker", signal.SIGSTOP)
    for i in range(1, 4):
        ask(i, TextPrompt("the first words"), max_tokens=9)
    gateway.check_grammar(regex("[ab]{3}"), "guided_regex", grammars.append)
    gateway.tokenize(TextPrompt("the first words"), grammars.append)
    answers.kill("tokenizer,checker")
    answers.until(lambda: len(answers.ends) == 4 and len(grammars) == 2)
    assert [answers.text[i] for i in range(4)] == [answers.text[0]] * 4 != [""] * 4
    assert not any(isinstance(g, RequestError) for g in grammars)
    answers.close()


@pytest.mark.parametrize(("who", "number"), [("scheduler", signal.SIGSTOP), ("worker0", signal.SIGSTOP)])
def test_a_process_that_stands_still_is_replaced(who: str, number: int) -> None:
    answers = Answers(hang_seconds=2.0)
    for i in range(4):
        answers.ask(i, TokenPrompt((i + 1, 2, 3)), max_tokens=LONG)
    answers.until(lambda: len(answers.said) == 4)
    answers.kill(who, number)
    answers.until(lambda: answers.system.gateway.still(2.0) == [who])
    answers.until(lambda: len(answers.ends) == 4)
    assert answers.said == {i: expected(i) for i in range(4)}
    assert answers.system.gateway.restarts[who] == 1
    answers.close()


def test_ranks_that_share_a_model_find_each_other_again() -> None:
    """With collectives, which the fake engine lacks."""
    engine = EngineConfig(tp=2, kv_tokens=1024, max_context=256, device="cpu")
    answers = Answers(config=Config(resolve(None), engine, ServerConfig(max_restarts=5)))
    ask = functools.partial(answers.ask, prompt=TextPrompt("The capital of France"), temperature=0.0, max_tokens=60)
    ask(0)
    answers.until(lambda: answers.ends)
    ask(1)
    answers.until(lambda: len(answers.said.get(1, ())) > 5)
    answers.kill("worker1")
    answers.until(lambda: len(answers.ends) == 2)
    assert answers.said[1] == answers.said[0]
    answers.close()


def test_a_process_that_cannot_be_started_again_ends_the_engine_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers()
    answers.ask(0, TokenPrompt((1, 2, 3)), max_tokens=LONG)
    answers.until(lambda: answers.said)

    def refuse(*_: Any) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(answers.system.supervisor, "spawn", refuse)
    answers.kill("detokenizer")
    answers.until(lambda: answers.ends)
    assert answers.ends[0].code == "engine_error"
    assert answers.system.gateway.failure == (
        "the process detokenizer was killed by signal 9, and cannot be started again: [Errno 24] Too many open files"
    )
    answers.system.close()


def test_a_request_that_kills_its_worker_is_refused_and_all_others_are_answered() -> None:
    answers = Answers(make_worker=process_actors.make_poisoned_worker)
    for i in range(6):
        answers.ask(i, TokenPrompt((i + 1, 2, 3)), max_tokens=LONG)
    answers.until(lambda: len(answers.said) == 6)
    answers.ask(6, TokenPrompt((process_actors.POISON, 2, 3)), max_tokens=LONG)
    answers.until(lambda: len(answers.ends) == 7)
    poison = answers.ends.pop(6)
    assert isinstance(poison, RequestError)
    assert (poison.status, poison.code) == (500, "poison_request")
    assert answers.said == {i: expected(i) for i in range(6)}
    with pytest.raises(RequestError) as again:
        answers.ask(6, TokenPrompt((process_actors.POISON, 2, 3)), max_tokens=LONG)
    assert again.value.code == "poison_request"
    assert answers.system.gateway.restarts["worker0"] == 3
    answers.close()


def test_clients_of_the_server_notice_a_pause_and_probes_what_is_going_on(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, "--hang-seconds", "600")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def words(stream: Any) -> str:
        return "".join(c.choices[0].text for c in stream)

    def ask(**more: Any) -> Any:
        return client.completions.create(
            model="fake", prompt="one two", max_tokens=300, extra_body={"ignore_eos": True}, **more
        )

    def probe(path: str) -> tuple[int, Any]:
        try:
            with urlopen(f"{server.url}{path}") as answer:
                return answer.status, json.load(answer)
        except HTTPError as e:
            return e.code, json.load(e)

    whole = ask().choices[0].text
    stream = ask(stream=True)
    begun = next(stream).choices[0].text
    os.kill(server.children()["minisgl::scheduler"], signal.SIGKILL)
    assert begun + words(stream) == whole
    eventually(lambda: probe("/ready") == (200, {"status": "ready"}))
    assert probe("/health?deep=1") == (200, {"status": "ready", "down": [], "still": []})
    worker = server.children()["minisgl::worker0"]
    os.kill(worker, signal.SIGSTOP)
    stream = ask(stream=True)
    eventually(lambda: probe("/health?deep=1") == (503, {"status": "ready", "down": [], "still": ["worker0"]}))
    assert probe("/health") == (200, {"status": "ready", "down": [], "still": ["worker0"]})
    os.kill(worker, signal.SIGCONT)
    assert words(stream) == whole
    with urlopen(f"{server.url}/metrics") as answer:
        assert b'minisgl_restarts_total{process="scheduler"} 1.0' in answer.read()
    server.proc.terminate()
    assert server.proc.wait(timeout=60) == 0
