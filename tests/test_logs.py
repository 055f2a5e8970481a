"""Lines on stderr: nothing that clients send can forge one, and nobody who does not read them holds the server up."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minisgl import logs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _undo() -> Iterator[None]:
    yield
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if not isinstance(h, logs.Lines)]
    logs.LOGGER.setLevel(logging.NOTSET)
    logging.captureWarnings(False)
    sys.excepthook = sys.__excepthook__


def printed(stream: io.StringIO, log_format: str = "text", environ: dict[str, str] | None = None) -> io.StringIO:
    logs.setup(log_format, stream, environ or {})
    return stream


NASTY = st.text(st.characters() | st.sampled_from("\n\r\x1b\x00\x85\u2028\u202e\ud800"))


@given(NASTY)
@example("a\nready in 0.1 s: http://evil/v1")
def test_a_line_cannot_be_ended_or_coloured_by_what_it_quotes(text: str) -> None:
    line = logs.one_line(text)
    assert line.isprintable()
    assert len(f"x{line}x".splitlines()) == 1
    assert text.isprintable() is (line == text)


@pytest.mark.parametrize("log_format", ["text", "json"])
@given(NASTY)
@example("    four spaces, as before the lines of a traceback")
def test_whoever_logs_a_clients_text_gets_one_line(log_format: str, text: str) -> None:
    out = printed(io.StringIO(), log_format)
    logging.getLogger("some.library").error("it said %s", text)
    assert out.getvalue().count("\n") == 1
    logs.say("load", text, client=text)
    assert out.getvalue().count("\n") == 2
    try:
        raise ValueError(text)
    except ValueError:
        logging.getLogger("minisgl.api").exception("bug with %s", text)
    lines = out.getvalue().split("\n")
    assert lines.pop() == ""
    assert len(lines) == 3 if log_format == "json" else all(line.startswith("    ") for line in lines[3:])
    assert all(line.isprintable() for line in lines)
    if log_format == "json":
        objects = [json.loads(line) for line in lines]
        assert objects[1]["client"] == objects[1]["message"] == text
        assert "ValueError" in objects[2]["traceback"]


def test_a_json_line_has_time_level_event_and_fields() -> None:
    out = printed(io.StringIO(), "json")
    logs.say("ready", "ready in 0.1 s", url="http://x/v1", seconds=0.1)
    logging.getLogger("minisgl").info("weights in float32")
    logging.getLogger("asyncio").warning("slow")
    first, second, third = map(json.loads, out.getvalue().splitlines())
    assert datetime.fromisoformat(first.pop("time").replace("Z", "+00:00")).utcoffset().total_seconds() == 0
    assert first == {"level": "info", "event": "ready", "message": "ready in 0.1 s", "url": "http://x/v1", "seconds": 0.1}
    assert (second["event"], second["message"], third["level"]) == ("log", "weights in float32", "warning")


def test_text_lines_begin_as_their_readers_know_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_clock", lambda record: "12:00:00")
    out = printed(io.StringIO())
    logs.say("ready", "ready in 0.1 s: http://x/v1")
    logs.say("load", "load: 1 running")
    logging.getLogger("minisgl").info("weights in float32")
    logging.getLogger("minisgl.api").error("batch %s waits", "b")
    assert out.getvalue().splitlines() == [
        "ready in 0.1 s: http://x/v1",
        "12:00:00 load: 1 running",
        "minisgl: weights in float32",
        "12:00:00 error: batch b waits",
    ]


@pytest.mark.parametrize(
    ("stream", "environ", "coloured"),
    [
        (Terminal, {"TERM": "xterm"}, True),
        (Terminal, {"TERM": "xterm", "NO_COLOR": ""}, True),  # as no-color.org has it
        (Terminal, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal, {"TERM": "dumb"}, False),
        (io.StringIO, {"TERM": "xterm"}, False),
    ],
)
def test_colours_are_for_terminals_whose_users_want_them(stream: Any, environ: dict[str, str], coloured: bool) -> None:
    for log_format, expected in (("text", coloured), ("json", False)):
        out = printed(stream(), log_format, environ)
        logs.say("load", "load")
        logging.getLogger("x").error("e")
        assert ("\x1b[" in out.getvalue()) is expected


def test_setting_up_again_replaces_the_last_time() -> None:
    first, second = printed(io.StringIO()), printed(io.StringIO())
    logs.say("load", "once")
    assert (first.getvalue(), second.getvalue().count("once")) == ("", 1)


def test_a_reader_that_has_stopped_costs_lines_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_PATIENCE", 0.0)
    read, write = os.pipe()
    with open(read) as reader, open(write, "w", buffering=1) as stream:
        logs.setup("text", stream, {})
        for _ in range(1000):  # more than a pipe holds
            logs.say("ready", "x" * 200)
        os.set_blocking(read, False)
        before = reader.read().count("\n")
        assert 100 < before < 1000
        logs.say("ready", "again")
        told, again = reader.read().splitlines()
        assert told.endswith(f"warning: {1000 - before} lines were lost: nobody has read them")
        assert again == "again"


def test_what_a_library_warns_of_is_an_object_too() -> None:
    import warnings

    out = printed(io.StringIO(), "json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)  # pytest has replaced what `setup` set
        warnings.warn("old", stacklevel=1)
    assert "old" in json.loads(out.getvalue())["message"]


def test_an_exception_that_nobody_catches_is_an_object_too() -> None:
    out = printed(io.StringIO(), "json")
    try:
        raise RuntimeError("a bug")
    except RuntimeError as e:
        sys.excepthook(RuntimeError, e, e.__traceback__)
    line = json.loads(out.getvalue())
    assert line["level"] == "critical"
    assert "RuntimeError: a bug" in line["traceback"]


def test_nothing_in_the_package_prints_past_the_log() -> None:
    """Of what runs in a server: commands that are not `serve` talk to their own terminal."""
    import ast
    from pathlib import Path

    package = Path(logs.__file__).parent
    own = {"bench", "commands", "deploy", "selfcheck", "simulation", "client"}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).parts
        if (parts[0] in own and path.name != "serve.py") or path.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = node.func
                assert getattr(called, "id", "") != "print", path
                assert getattr(called, "attr", "") not in {"print_exc", "print_exception"}, path
    assert sys.stderr is not None
