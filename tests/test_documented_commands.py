"""README.md and docs/ are true: their commands are understood, their snippets run, their flags, keywords and extras exist.

A fenced block is run here, or run by another test, or listed with the reason why it is not; a new one must be classified.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import contextlib
import functools
import inspect
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
from test_server import ScriptedEngine

from minisgl import LLM, SamplingParams
from minisgl.__main__ import main
from minisgl.api.http.app import build_app
from minisgl.commands.parser import Parser
from minisgl.config import EngineConfig, ServerConfig, settings_of
from minisgl.model.common import registry
from scripts.lib.live_server import live_server

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

TRANSCRIPT = "a transcript: its command is parsed"
PICTURE = "a picture"
TOUR = "tests/test_tour.py"
FRONT = "a program of others; tests/deploy checks its configuration, scripts/check/front_door.py runs vllm-router"
PLAYED = "scripts/pictures.py plays it, for the pictures"
# Document and first line -> why the block is not run here, or which test runs it.  Its commands are parsed all the same.
NOT_RUN = {
    ("README.md", "scripts/launch.sh"): "installs packages and serves until ^C",
    ("README.md", "HTTP / SSE ---> api"): PICTURE,
    ("README.md", "$ scripts/chat.sh"): TRANSCRIPT,
    ("docs/cache_explanation.md", '"cache_explanation"'): "a part of an answer",
    ("README.md", "$ head -1 in.jsonl"): TRANSCRIPT,
    ("README.md", "$ .venv/bin/minisgl selfcheck --tp 2"): TRANSCRIPT + " (tests/selfcheck runs it)",
    ("README.md", "minisgl: GPU 0: 139.8 GiB"): "a line of a machine with a GPU",
    ("README.md", "minisgl batch-keys"): "tests/commands/test_batch_keys.py",
    ("docs/ablations.md", "python -m minisgl bench --offline"): "minutes of measuring (tests/bench runs it small)",
    ("docs/adding-a-model.md", ".venv/bin/python -m pytest"): "a whole test file",
    ("docs/adding-a-model.md", ".venv/bin/python -m minisgl selfcheck"): "a model from the hub",
    (
        "docs/simulator.md",
        "python -m minisgl simulate TRACE.jsonl --limit 1500",
    ): "recorded traces, which are not in the repository",
    ("docs/capacity.md", "python -m minisgl simulate TRACE.jsonl --slo"): "recorded traces, which are not in the repository",
    ("docs/kv_events.md", "minisgl --port 8001"): "needs vllm-router (scripts/check/kv_router.py runs it)",
    ("docs/simulator.md", "from minisgl.cache.radix"): "runs in the test of the next block",
    ("docs/simulator.md", "python scripts/tune/fit_costs.py"): "minutes of measuring",
    ("docs/simulator.md", "python -m minisgl simulate TRACE --gpu"): "a recorded trace",
    ("docs/simulator.md", "python -m minisgl simulate TRACE --limit 1500"): "a recorded trace",
    ("docs/simulator.md", "python -m minisgl simulate TRACE --limit 4000"): "a recorded trace",
    ("docs/journal.md", "minisgl --journal"): "a server; tests/journal runs one, and these commands",
    ("docs/journal.md", "from minisgl.journal.replay"): "a journal of hours; tests/journal reads smaller ones",
    ("docs/deployment.md", "scripts/cluster.sh 3"): "installs packages and serves until ^C",
    ("docs/deployment.md", "scripts/cluster.sh 2"): "a model from the hub",
    ("docs/deployment.md", "mkdir -p front"): FRONT,
    ("docs/deployment.md", "pip install 'litellm[proxy]'"): FRONT,
    ("docs/deployment.md", "minisgl --host 0.0.0.0"): FRONT,
    ("docs/deployment.md", "vllm-router --host"): FRONT,
    ("docs/deployment.md", "pip install smg"): FRONT,
    ("docs/deployment.md", "pip install ai-dynamo-runtime"): FRONT,
    ("docs/deployment.md", "docker build"): "scripts/check/dockerfile.py runs what is in it",
    ("docs/deployment.md", "pip install '.[ray]'"): "scripts/check/ray_cluster.py serves it",
    ("docs/deployment.md", "kubectl apply"): "takes a cluster; tests/deploy validates what is applied",
    ("docs/reliability.md", "a client's stream"): PICTURE,
    ("docs/structures.md", "HTTP, SSE"): PICTURE,
    ("docs/structures.md", "scheduler   | plan k"): PICTURE,
    ("docs/structures.md", "routes (http/app.py)"): PICTURE,
    ("docs/walkthroughs.md", "minisgl --page-size 16"): PLAYED,
    ("docs/walkthroughs.md", "rules="): PLAYED,
    ("docs/walkthroughs.md", "minisgl --lag 1"): PLAYED,
    ("docs/walkthroughs.md", "for i in 0 1 2 3"): PLAYED,
    ("docs/walkthroughs.md", "minisgl --max-running 2"): PLAYED,
    ("docs/walkthroughs.md", "minisgl explain http"): "tests/commands/test_explain.py explains a live server",
    ("docs/walkthroughs.md", "step 41, 0.312 s"): "an example of its output; test_explain.py checks every number",
    ("docs/walkthroughs.md", "minisgl --data-dir state"): "tests/view/test_live_page.py walks through a journal",
    ("docs/tour.md", "# chunks.py"): TOUR,
    ("docs/tour.md", "$ .venv/bin/python chunks.py"): TOUR,
    ("docs/tour.md", "# lfu.py"): TOUR,
    ("docs/tour.md", "$ .venv/bin/python -m minisgl simulate synthetic:rate=30"): TOUR,
    ("docs/tour.md", "$ .venv/bin/python -m minisgl simulate synthetic:n=200"): TOUR,
}
RUN = {
    ("README.md", "curl -s"),
    ("README.md", "from openai import OpenAI"),
    ("README.md", "from minisgl import LLM, SamplingParams"),
    ("README.md", "class City(pydantic.BaseModel):"),
    ("docs/adding-a-model.md", '"MinistralForCausalLM": Arch('),
    ("docs/simulator.md", "python -m minisgl simulate synthetic:rate=30"),
    ("docs/simulator.md", "python -m minisgl simulate synthetic:rate=0"),
}

# Documents and flags of other programs: openssl, docker, curl, litellm, vllm-router, smg.
_OF_OTHERS = "build-arg cacert disable-tokenizer-autoload rm shm-size stop-timeout"
FOREIGN = {("deployment.md", f"--{flag}") for flag in _OF_OTHERS.split()}
NO_ROUTES = {
    "/reset",
    "/exit",
    "/system",
    "/help",
    "/tokens",
    "/proc",
    "/dev/shm",
    "/cache",
    "/tmp",
    "/add_worker",
    "/remove_worker",
    "/workers",
}  # commands of the chat; folders; routes of routers


# ---------------- what the documents show
@dataclass(frozen=True)
class Block:
    """A fenced block.  `after`: the text of the document behind it."""

    document: str
    text: str
    after: str

    @property
    def first(self) -> str:
        return next(line.strip() for line in self.text.splitlines() if line.strip())


@functools.cache
def blocks() -> tuple[Block, ...]:
    found = []
    for path in DOCUMENTS:
        text = path.read_text()
        for match in re.finditer(r"^```\w*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
            found.append(Block(str(path.relative_to(ROOT)), match[1], text[match.end() :]))
    return tuple(found)


def block(document: str, first: str) -> Block:
    [found] = [b for b in blocks() if b.document == document and b.first.startswith(first)]
    return found


def test_every_block_is_run_or_has_a_reason_why_not() -> None:
    classified = [*NOT_RUN, *RUN]
    for b in blocks():
        mine = [key for key in classified if b.document == key[0] and b.first.startswith(key[1])]
        assert len(mine) == 1, f"{b.document}: the block that begins with {b.first!r} is neither run nor listed in NOT_RUN"
    for document, first in classified:
        assert any(b.document == document and b.first.startswith(first) for b in blocks()), (
            f"{document} has no {first!r} any more"
        )


PROGRAM = re.compile(
    r"(?:\.venv/bin/)?(?:python (?:-m minisgl|scripts/)"
    r"|minisgl(?= (?:-|(?:serve|chat|batch|batch-keys|top|doctor|fit|explain|selfcheck|prebuild|simulate|journal|cluster)"
    r"\b[^:])))"
    r"|scripts/[\w/]+\.(?:sh|py)(?: |$)"
)


def lines_of(b: Block) -> Iterator[str]:
    for line in b.text.replace("\\\n", " ").splitlines():
        if PROGRAM.match(line := line.strip().removeprefix("$ ")):
            yield line


@functools.cache
def commands() -> tuple[str, ...]:
    """Every command of a block, and every one in a sentence; a script that is only named is none."""
    found = [line for b in blocks() for line in lines_of(b)]
    for path in DOCUMENTS:
        prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        for span in re.findall(r"`([^`]+)`", prose):
            text = " ".join(span.split())
            if PROGRAM.match(text) and (text.startswith(("python", ".venv")) or " " in text):
                found.append(text)
    return tuple(dict.fromkeys(found))


# ---------------- commands are parsed by their own parsers
class Parsed(BaseException):
    """Ends a program where its work would begin."""


KNOWN, PARSE = argparse.ArgumentParser.parse_known_args, Parser.parse_args
NUMBERS = {"N": "2", "P": "8000", "S": "1", "H": "127.0.0.1", "SECONDS": "1", "JSON": "{}"}


def arguments(command: str) -> list[str]:
    """The words of a command; its optional parts are given, and placeholders have a value."""
    text = re.sub(r"(--[\w-]+) \.\.\.", r"\1 VALUE", command)
    words = shlex.split(re.sub(r"[\[\]]|\.\.\.", " ", text), comments=True)
    return [NUMBERS.get(word, word) for word in words]


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a program until it has parsed its arguments.  An unknown flag raises SystemExit."""

    def strictly(self: Any, args: Any = None, namespace: Any = None) -> NoReturn:
        _, rest = KNOWN(self, args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        raise Parsed

    def leniently(self: Any, args: Any = None, namespace: Any = None) -> Any:
        found = KNOWN(self, args, namespace)
        if isinstance(self, Parser):  # a step of its `parse_args`
            return found
        raise Parsed

    def as_ever(self: Any, args: Any = None, namespace: Any = None) -> NoReturn:
        PARSE(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", as_ever)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", strictly)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", leniently)
    words = words[1:] if words[0].endswith("python") else words
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "path", list(sys.path))
    ways: dict[str, Callable[[], Any]] = {
        "-m": lambda: main(words[2:]),
        "minisgl": lambda: main(words[1:]),
        ".venv/bin/minisgl": lambda: main(words[1:]),
        "scripts/launch.sh": lambda: main(words[1:]),
        "scripts/cluster.sh": lambda: main(["cluster", *words[1:]]),
        "scripts/chat.sh": lambda: main(["chat", *words[1:]]),
    }
    if words[0].endswith(".py") and "ArgumentParser" not in (ROOT / words[0]).read_text():
        assert words[1:] == [], "a script without arguments"
        return
    with pytest.raises(Parsed):
        ways.get(words[0], lambda: runpy.run_path(str(ROOT / words[0]), run_name="__main__"))()


@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith("scripts/test.sh")])
def test_a_command_is_understood_by_its_program(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse(arguments(command), monkeypatch)


def test_a_flag_that_does_not_exist_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("python -m minisgl --no-such-flag", "scripts/launch.sh --tp two", "python scripts/bench/cpu.py --runds 2"):
        with pytest.raises(SystemExit):
            parse(arguments(command), monkeypatch)


def test_every_flag_that_is_named_exists() -> None:
    sources = [*(ROOT / "minisgl").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    known = {flag for path in sources for flag in re.findall(r"""["'](--[a-z][\w-]*)["']""", path.read_text())}
    known |= {s.flag or f"--{name.replace('_', '-')}" for c in (EngineConfig, ServerConfig) for name, _, s in settings_of(c)}
    known |= {"--help"}
    for path in DOCUMENTS:
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", path.read_text()):
            assert flag in known or (path.name, flag) in FOREIGN, f"{path.name} names {flag}"


def test_every_keyword_that_is_named_exists() -> None:
    known = {
        "LLM": {name for name, _, _ in settings_of(EngineConfig)} | set(inspect.signature(LLM).parameters),
        "SamplingParams": set(inspect.signature(SamplingParams).parameters),
    }
    for path in DOCUMENTS:
        for call, inside in re.findall(r"\b(LLM|SamplingParams)\(([^()]*)", path.read_text()):
            for keyword in re.findall(r"(\w+)=", inside):
                assert keyword in known[call], f"{path.name}: {call}({keyword}=...)"


def test_every_route_that_is_named_exists() -> None:
    def plain(path: str) -> str:
        return re.sub(r"\{[^}]*\}", "{}", path)

    known = {plain(resource.canonical) for resource in build_app(ScriptedEngine()).router.resources()}
    for path in DOCUMENTS:
        for route in re.findall(r"(?:(?:GET|POST) |`|, )(/[a-z][\w/{}]*[\w}])(?=[`, ])", path.read_text()):
            if route not in NO_ROUTES:
                assert plain(route) in known, f"{path.name} names {route}"


def test_every_extra_that_is_named_exists() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for path in DOCUMENTS:
        for what, extra in re.findall(r"pip install '?([\w.]+)\[([\w-]+)\]", path.read_text()):
            if (path.name, what) == ("deployment.md", "litellm"):
                continue
            assert what == ".", f"{path.name}: minisgl is installed from its repository, not from an index"
            assert extra in setup["options.extras_require"], f"{path.name} names the extra {extra}"


# ---------------- what is computed is what the documents say
def cells(table: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
    return [row for row in rows if not set("".join(row)) <= {"-", ":"}]


@pytest.mark.parametrize(
    "first", ["python -m minisgl simulate synthetic:rate=30", "python -m minisgl simulate synthetic:rate=0"]
)
def test_a_simulation_has_the_results_of_its_table(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_policy.py").write_text(block("docs/simulator.md", "from minisgl.cache.radix").text)
    monkeypatch.syspath_prepend(tmp_path)
    b = block("docs/simulator.md", first)
    [command] = lines_of(b)
    head, *documented = cells(re.match(r"\s*((?:\|.*\n)+)", b.after)[1])  # type: ignore[index]
    words = arguments(command)
    if "--compare" in words and words[-1] == "--compare":  # only what the table shows
        words.append(",".join(row[0] for row in documented))
    assert main(words[3:]) == 0
    columns, *rows = cells(capsys.readouterr().out)
    measured = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    for row in documented:
        assert row == [measured[row[0]][column] for column in head]


def test_an_entry_of_a_model_is_that_of_the_registry() -> None:
    entry = block("docs/adding-a-model.md", '"MinistralForCausalLM"').text
    [(name, arch)] = eval(f"{{{entry}}}", vars(registry)).items()  # noqa: S307  our own text
    assert registry.HF_ARCHS[name] == arch


# ---------------- snippets
@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live_server("--max-context", "1024", "--sample-seed", "1") as running:
        yield running


def execute(text: str, names: dict[str, Any]) -> str:
    """Run a snippet as a user would; returns what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(ast.parse(text), "<document>", "exec"), names)
    return out.getvalue()


def test_the_sdk_answers_as_the_readme_says(url: str) -> None:
    first = block("README.md", "from openai import OpenAI").text.replace("http://127.0.0.1:8000", url)
    names: dict[str, Any] = {}
    said = execute(first, names)
    assert said.strip() == re.search(r"# (.*)\s*$", first)[1]  # type: ignore[index]
    import pydantic

    forms = block("README.md", "class City").text.replace("model=...", 'model="SmolLM2-135M-Instruct"')
    names |= {"pydantic": pydantic, "answer": None}
    execute(forms, names)
    assert isinstance(names["answer"].choices[0].message.parsed, names["City"])


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl here")
def test_curl_answers_as_the_readme_says(url: str) -> None:
    command = block("README.md", "curl -s").text.replace("http://127.0.0.1:8000", url)
    said = subprocess.run(["bash", "-c", command], check=True, capture_output=True).stdout
    assert json.loads(said)["choices"][0]["message"]["content"].startswith("The capital of Germany is Berlin.")


def test_offline_works_as_the_readme_says() -> None:
    said = execute(block("README.md", "from minisgl import LLM, SamplingParams").text, {})
    *texts, scores, answer = said.splitlines()
    assert "Paris" in "".join(texts)
    assert answer == "The capital of Germany is Berlin."
    assert [len(pair) for pair in ast.literal_eval(scores)] == [2] * 5
