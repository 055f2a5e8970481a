"""Why a prompt was not cached: the reasons on a list of changes, behind a real server with a real tokenizer, no model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from processes import REPOSITORY, eventually, minisgl_command

TEMPLATE = """{%- if tools %}<|im_start|>system {{ unit }}
Date: {{ date or '1 May' }}{% if clock %}, {{ strftime_now('%H:%M:%S.%f') }}{% endif %}
Tools:{% for t in tools %} {{ t.function.name }}: {{ t.function.description }};{% endfor %}
{% else %}<|im_start|>system {{ unit }}
Date: {{ date or '1 May' }}{% if clock %}, {{ strftime_now('%H:%M:%S.%f') }}{% endif %}
{% endif %}Effort: {{ reasoning_effort or 'none' }}, and there is more that the template says by itself <|im_end|>
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
SYSTEM = "You are the assistant of a small library, and you answer every question about books in one short sentence."
QUESTION = "Which of the books that I have borrowed in the last two weeks are to be given back until tomorrow?"


class Server:
    """A server and its address; asks it in any dialect."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url, self.key = process, url, ""

    def ask(self, path: str, body: Any, key: str = "", method: str = "POST") -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                raw = answer.read()
        except urllib.error.HTTPError as e:
            return json.load(e)
        return json.loads(raw) if raw.startswith((b"{", b"[")) else raw.decode()

    def why(self, unit: str, messages: Any = QUESTION, key: str = "", *, expect: bool = True, **more: Any) -> dict[str, Any]:
        """The explanation of a chat's prompt; a text is that of the user behind the system message.

        `unit`: the first word of its text, so that a test knows no prompts but its own.
        """
        if isinstance(messages, str):
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": messages}]
        more["chat_template_kwargs"] = {"unit": unit, **more.get("chat_template_kwargs", {})}
        body = {"messages": messages, "max_tokens": 2, "temperature": 0, "explain_cache": True}
        answer = self.ask("/v1/chat/completions", body | more, key)
        if not expect:
            return {}
        assert "cache_explanation" in answer, answer
        found: dict[str, Any] = answer["cache_explanation"]
        assert found["cached_tokens"] == answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    def flush(self) -> None:
        self.ask("/flush_cache", {})

    def flush_with(self, key: str) -> None:
        assert self.ask("/flush_cache", {}, key) == {"flushed": True}

    def process_named(self, name: str) -> int:
        """The pid of one of its processes; 0 while there is none."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for pid in (task / "children").read_text().split():
                try:
                    if f"minisgl::{name}" in Path(f"/proc/{pid}/cmdline").read_text():
                        return int(pid)
                except OSError:
                    pass
        return 0

    def kill(self, name: str) -> None:
        first = self.process_named(name)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: self.process_named(name) not in (0, first))

    def reasons(self) -> dict[str, tuple[int, int]]:
        """Requests and missed tokens by reason, from /metrics."""
        text = self.ask("/metrics", None, method="GET")

        def of(name: str) -> dict[str, int]:
            rows = re.findall(rf'^minisgl_{name}_total{{reason="(\w+)"}} (\S+)$', text, re.MULTILINE)
            return {reason: int(float(n)) for reason, n in rows}

        missed = of("prefix_cache_missed_tokens")
        return {reason: (n, missed[reason]) for reason, n in of("prefix_cache_misses").items()}


@contextmanager
def serving(tmp: Path, *flags: str) -> Iterator[Server]:
    (tmp / "template").write_text(TEMPLATE)
    env = os.environ | {"XDG_RUNTIME_DIR": str(tmp), "PYTHONPATH": str(REPOSITORY)}
    small = ("--kv-tokens", "2048", "--max-context", "1024", "--max-running", "8", "--step-tokens", "256")
    template = ("--chat-template", str(tmp / "template"), "--reasoning-parser", "qwen3", "--tool-call-parser", "hermes")
    command = minisgl_command("--port", "0", "--model", "fake", *small, *template, *flags)
    with (tmp / "lines").open("w+") as lines, subprocess.Popen(command, stderr=lines, text=True, env=env) as process:
        try:

            def address() -> str:
                assert process.poll() is None, (tmp / "lines").read_text()
                return (re.findall(r"^ready.*?(http://\S+)/v1", (tmp / "lines").read_text(), re.MULTILINE) or [""])[0]

            yield Server(process, eventually(address))
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tmp = tmp_path_factory.mktemp("explain")
    with serving(tmp, "--data-dir", str(tmp / "data")) as running:
        yield running


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"q": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": f"{name} something", "parameters": parameters}}


# ---------------- the list
def test_what_was_never_seen_is_new(server: Server) -> None:
    why = server.why("new")
    assert (why["reason"], why["cached_tokens"]) == ("new", 0)
    assert "message" not in why or why["message"] == 0


def test_another_system_prompt_is_new_in_message_0(server: Server) -> None:
    server.why("system")
    other = [{"role": "system", "content": SYSTEM.replace("small", "large")}, {"role": "user", "content": QUESTION}]
    why = server.why("system", other)
    assert (why["reason"], why["message"]) == ("new", 0)
    assert why["ours"].startswith("...")
    assert why["ours"].endswith("assistant of a| large library, and you answer every question")
    assert why["theirs"].endswith("assistant of a| small library, and you answer every question")
    assert why["cached_tokens"] <= why["miss_at"] < why["cached_tokens"] + 16


def test_a_time_stamp_at_the_top_is_new_in_its_message(server: Server) -> None:
    def stamped(time: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": f"Current time: {time}. {SYSTEM}"}, {"role": "user", "content": QUESTION}]

    server.why("stamp", stamped("12:00"))
    why = server.why("stamp", stamped("12:01"))
    assert (why["reason"], why["message"]) == ("new", 0)
    assert "Current time: 12:0|1. You are" in why["ours"]
    assert "Current time: 12:0|0. You are" in why["theirs"]


FIND, LEND = ({"tools": [tool(a), tool(b)]} for a, b in (("find", "lend"), ("lend", "find")))


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        ({"reasoning_effort": "low"}, {"reasoning_effort": "high"}, ("Effort:| high", "Effort:| low")),
        ({}, {"chat_template_kwargs": {"date": "2 May"}}, ("Date: |2 May", "Date: |1 May")),
        (FIND, LEND, ("Tools:| lend", "Tools:| find")),
        ({}, FIND, ("|Tools: find", "|Effort: none")),
        (LEND, {}, ("|Effort: none", "|Tools: lend")),
    ],
)
@pytest.mark.parametrize("question", [QUESTION, "Who has written Emma?"])
def test_what_the_template_writes_of_its_variables_is_template(
    server: Server, before: Any, after: Any, shown: tuple[str, str], question: str
) -> None:
    unit = str(zlib.crc32(f"{shown} {question}".encode()))
    server.why(unit, **before)
    why = server.why(unit, question, **after)
    assert why["reason"] == "template"
    assert shown[0] in why["ours"]
    assert shown[1] in why["theirs"]
    assert "message" not in why


@pytest.mark.parametrize("question", [QUESTION, "Who has written Emma?"])
def test_a_clock_in_the_template_is_template(server: Server, question: str) -> None:
    server.why("clock", chat_template_kwargs={"clock": True})
    assert server.why("clock", question, chat_template_kwargs={"clock": True})["reason"] == "template"


def test_the_same_prompt_under_another_salt_is_salt_without_a_text_of_theirs(server: Server) -> None:
    server.why("salt", cache_salt="one")
    why = server.why("salt", cache_salt="another")
    assert (why["reason"], why["cached_tokens"], why["miss_at"], why["theirs"]) == ("salt", 0, 0, None)


def test_the_same_prompt_again_is_short(server: Server) -> None:
    server.why("again")
    why = server.why("again")
    assert (why["reason"], why["theirs"]) == ("short", None)
    assert why["miss_at"] == why["cached_tokens"] > 0
    tiny = server.ask("/v1/completions", {"prompt": "Hi", "max_tokens": 1, "explain_cache": True})
    assert tiny["cache_explanation"] == {"cached_tokens": 0, "reason": "short", "miss_at": 0, "ours": "|Hi", "theirs": None}


def test_pages_that_were_taken_for_others_are_evicted_some_seconds_ago(server: Server) -> None:
    server.why("evicted")
    for i in range(12):
        server.ask("/v1/completions", {"prompt": f"{i} is a number " * 60, "max_tokens": 1})
    why = server.why("evicted")
    assert (why["reason"], why["theirs"]) == ("evicted", None)
    assert why["miss_at"] == why["cached_tokens"]
    assert 0 <= why["seconds_ago"] < 60
    assert server.why("evicted")["reason"] == "short"
    server.flush()
    assert server.why("evicted")["reason"] == "evicted"


def test_what_a_restart_has_lost_is_restart_and_then_it_is_there_again(server: Server) -> None:
    server.why("restart")
    server.kill("worker0")
    why = server.why("restart")
    assert (why["reason"], why["theirs"]) == ("restart", None)
    assert server.why("restart")["reason"] == "short"
    server.flush()
    assert server.why("restart")["reason"] == "evicted"


# ---------------- in every dialect, with the clients that people use
FIRST = ("new", "template")  # of a unit's first prompt: other tests may have sent the same messages in another unit


def chat(unit: str, text: str = QUESTION) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    return {"model": "fake", "messages": messages, "max_tokens": 3, "temperature": 0} | {
        "extra_body": {"explain_cache": True, "chat_template_kwargs": {"unit": unit}}
    }


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def last_of(stream: Any) -> tuple[dict[str, Any], int]:
    """(the explanation in the last event, how many events have one)."""
    found = [event.model_extra.get("cache_explanation") for event in stream]
    assert found[-1] is not None
    return found[-1], sum(f is not None for f in found)


@pytest.mark.parametrize("n", [1, 3])
def test_a_chat_has_its_explanation_at_the_top_and_a_stream_in_its_last_event(client: openai.OpenAI, n: int) -> None:
    create = client.chat.completions.create
    whole = create(**chat(f"chat{n}"), n=n)
    assert whole.model_extra is not None
    assert whole.model_extra["cache_explanation"]["reason"] in FIRST
    for usage in (True, False):
        stream = create(**chat(f"chat{n}", "Who was it?"), n=n, stream=True, stream_options={"include_usage": usage})
        why, events = last_of(stream)
        assert events == 1
        assert why["reason"] == ("new" if usage else "short")
    one = client.chat.completions.create(**{**chat(f"chat{n}"), "extra_body": {"chat_template_kwargs": {"unit": "x"}}})
    assert "cache_explanation" not in (one.model_extra or {})


def test_completions_have_one_for_each_prompt(client: openai.OpenAI) -> None:
    create = client.completions.create
    extra: Any = {"extra_body": {"explain_cache": True}, "model": "fake", "max_tokens": 2}
    text = "The quick brown fox jumps over the lazy dog, and then it goes on and on over the hills. " * 2
    one = create(prompt=text + "one", **extra)
    assert (one.model_extra or {})["cache_explanation"]["theirs"] is None
    two = (create(prompt=[text + "two" + text, "Hi"], n=2, **extra).model_extra or {})["cache_explanation"]
    assert [why["reason"] for why in two] == ["new", "short"]
    assert "hills.| two" in two[0]["ours"]
    assert "|" in two[0]["theirs"]
    why, events = last_of(create(prompt=text + "three" + text, stream=True, **extra))
    assert (why["reason"], events) == ("new", 1)


def test_responses_have_it_in_the_response(client: openai.OpenAI) -> None:
    body: Any = {"model": "fake", "instructions": SYSTEM, "max_output_tokens": 3}
    body["extra_body"] = {"explain_cache": True, "chat_template_kwargs": {"unit": "responses"}}
    whole = client.responses.create(input=QUESTION, **body)
    assert (whole.model_extra or {})["cache_explanation"]["reason"] in FIRST
    *before, last = client.responses.create(input="Who was it?", stream=True, **body)
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.model_extra["cache_explanation"]["message"] == 1
    assert not any("cache_explanation" in event.to_json() for event in before)


def test_messages_have_it_at_the_top_and_in_the_last_event(server: Server) -> None:
    body = {"system": SYSTEM, "max_tokens": 3, "explain_cache": True, "chat_template_kwargs": {"unit": "messages"}}
    whole = server.ask("/v1/messages", body | {"messages": [{"role": "user", "content": QUESTION}]})
    assert whole["cache_explanation"]["reason"] in FIRST
    stream = server.ask("/v1/messages", body | {"messages": [{"role": "user", "content": QUESTION[::-1]}], "stream": True})
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: ")]
    assert events[-1]["type"] == "message_stop"
    assert events[-1]["cache_explanation"]["message"] == 1
    assert sum("cache_explanation" in event for event in events) == 1


def test_a_line_of_a_batch_has_it_and_vectors_refuse_it(client: openai.OpenAI, server: Server) -> None:
    body = {**chat("batch"), **chat("batch")["extra_body"]}
    del body["extra_body"]
    line = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body})
    file = client.files.create(file=("in.jsonl", line.encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    done = eventually(lambda: (b := client.batches.retrieve(batch.id)).status == "completed" and b)
    answer = json.loads(client.files.content(done.output_file_id).text)
    assert answer["response"]["body"]["cache_explanation"]["cached_tokens"] == 0
    refused = server.ask("/v1/embeddings", {"input": "x", "explain_cache": True})
    assert (refused["error"]["param"], refused["error"]["code"]) == ("explain_cache", "unsupported_parameter")
    assert "data" in server.ask("/v1/embeddings", {"input": "x", "explain_cache": False})
    wrong = server.ask("/v1/completions", {"prompt": "x", "explain_cache": 1})
    assert (wrong["error"]["param"], wrong["error"]["code"]) == ("explain_cache", "invalid_type")
    fields = server.ask("/openapi.json", None, method="GET")["paths"]["/v1/messages"]["post"]["requestBody"]
    assert "explain_cache" in json.dumps(fields)


def test_the_metrics_count_every_request_by_reason_also_without_being_asked(server: Server) -> None:
    before = server.reasons()
    for _ in range(2):
        server.why("metrics", explain_cache=False, expect=False)
    after = server.reasons()
    grown = {name: (n - before[name][0], m - before[name][1]) for name, (n, m) in after.items()}
    assert grown["new"][0] + grown["template"][0] == grown["short"][0] == 1
    assert grown["new"][1] + grown["template"][1] > 40
    assert 0 < grown["short"][1] <= 16
    assert sum(n for n, _ in grown.values()) == 2


def test_a_conversation_that_goes_on_says_where(server: Server) -> None:
    first = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    said = server.ask("/v1/chat/completions", {"messages": first, "max_tokens": 30, "chat_template_kwargs": {"unit": "go"}})
    answer = said["choices"][0]["message"]["content"] or "Nothing."
    longer = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "And when is that?"}]
    why = server.why("go", longer)
    assert (why["reason"], why["message"] in (2, 3)) == ("new", True)
    assert why["cached_tokens"] > 0
    edited = [*first, {"role": "assistant", "content": "It is not so."}, {"role": "user", "content": "And when is that?"}]
    why = server.why("go", edited)
    assert (why["reason"], why["message"]) == ("new", 2)


# ---------------- keys
@pytest.mark.parametrize("by_key", ["on", "off"])
def test_other_keys_give_the_reason_alone(tmp_path: Path, by_key: str) -> None:
    for name, keys in (("users", "key-of-a-user-number-1\nkey-of-a-user-number-2\n"), ("admins", "key-of-an-administrator\n")):
        (tmp_path / name).write_text(keys)
    flags = ("--api-key-file", str(tmp_path / "users"), "--admin-api-key-file", str(tmp_path / "admins"))
    secret = [{"role": "user", "content": f"{QUESTION} The word of the day is parsnip, and that is all that I can say."}]
    guess = [{"role": "user", "content": f"{QUESTION} The word of the day is turnip, and that is all that I can say."}]
    with serving(tmp_path, "--salt-by-key", by_key, *flags) as server:
        server.why("k", secret, key="key-of-a-user-number-1")
        for key in ("key-of-a-user-number-2", "key-of-an-administrator"):
            why = server.why("k", guess, key=key)
            assert "parsnip" not in json.dumps(why)
            assert why["theirs"] is None
            assert why["reason"] in (("new",) if by_key == "on" else ("new", "evicted"))
            server.flush_with("key-of-an-administrator")
        mine = server.why("k", guess, key="key-of-a-user-number-1")
        assert mine["reason"] in ("new", "evicted")
        again = server.why("k", guess, key="key-of-a-user-number-2")
        assert again["reason"] in ("short", "evicted")
