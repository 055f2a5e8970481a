"""`minisgl journal replay` and `info`: what they print, and their exit codes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from journal.loads import random_load
from journal.test_mutations import mutate

from minisgl.__main__ import main
from minisgl.actors.scheduler.admission import Admission
from minisgl.actors.scheduler.slot_table import SlotTable
from minisgl.actors.scheduler.step_machine import StepMachine


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal of several parts."""
    path: Path = tmp_path_factory.mktemp("journal") / "j"
    loop = random_load(5, num_pages=24)
    for i, data in enumerate(loop.parts[False]):
        Path(f"{path}.part{i}" if i else path).write_bytes(data)
    path.with_suffix(".said").write_text(json.dumps([loop.machine.counters.steps, len(loop.asked)]))
    return path


def say(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["journal", *argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_replay_says_that_all_plans_are_equal(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, requests = json.loads(journal.with_suffix(".said").read_text())
    code, out, _ = say(capsys, "replay", str(journal))
    assert code == 0
    assert f"{requests} requests, all plans equal" in out


def test_a_changed_machine_ends_the_replay_with_code_1_and_the_step(
    journal: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = StepMachine._cut_chunk
    monkeypatch.setattr(StepMachine, "_cut_chunk", lambda self, slot, budget, builder: cut(self, slot, budget - 1, builder))
    code, out, _ = say(capsys, "replay", str(journal))
    assert code == 1
    assert "the replay differs: call " in out
    assert "(step " in out
    assert "recorded" in out


@pytest.mark.parametrize(
    ("mutation", "says"),
    [
        (
            (Admission, "_next_candidate", "(found[r.uid], -r.finish", "(-found[r.uid], -r.finish"),
            "joins (slot, cached tokens)",
        ),
        ((StepMachine, "_cut_chunk", "min(budget, ", "min(budget // 2 + 1, "), "prompt chunks (slot, flags, tokens)"),
        ((Admission, "_retract", "victim or max(", "victim or min("), "recorded"),
        ((SlotTable, "grant_decode", "grant(slots, ", "grant(slots[::-1], "), "page grants (slot, place, page)"),
    ],
    ids=["admission order", "prefill chunk size", "retraction choice", "page grant"],
)
def test_one_changed_line_of_the_policy_is_named_with_the_first_step_that_it_changes(
    journal: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mutation: Any, says: str
) -> None:
    mutate(monkeypatch, *mutation)
    code, out, _ = say(capsys, "replay", str(journal))
    assert code == 1
    found = re.search(r"the replay differs: call \d+ of the machine \(step (\d+), time [\d.]+\): (.*)", out)
    assert found is not None, out
    assert says in found[2]
    before = int(found[1]) - 1  # all steps before are those that were recorded
    assert say(capsys, "replay", str(journal), "--step", str(before))[0] == 0


def test_a_terminal_shows_how_far_a_replay_is(
    journal: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert say(capsys, "replay", str(journal))[2] == ""
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert say(capsys, "replay", str(journal))[0] == 0
    assert "steps" in terminal.getvalue()
    assert "100%" in terminal.getvalue()


def test_the_state_at_a_step_is_that_of_the_machine(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, "replay", str(journal), "--step", "10", "--json")
    state = json.loads(out)
    assert code == 0
    assert state["step"] == state["plan"]["step"] == 10
    pages = state["pages"]
    assert pages["free"] + pages["cached"] + pages["owned"] == pages["total"] == 24
    assert len(state["running"]) == state["slots"]["total"] - state["slots"]["free"]
    code, out, _ = say(capsys, "replay", str(journal), "--step", "10")
    assert code == 0
    assert f"{pages['free']} free" in out
    assert all(f"request {row['uid']}" in out for row in state["running"] + state["waiting"])


def test_a_step_that_is_not_there_is_a_sentence(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, _ = json.loads(journal.with_suffix(".said").read_text())
    code, _, err = say(capsys, "replay", str(journal), "--step", "99999")
    assert code == 2
    assert f"0 to {steps - 1}" in err


def test_what_if_compares_with_what_was_recorded(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = say(capsys, "replay", str(journal), "--lag", "1", "--order", "arrival", "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    assert found["recorded"]["requests"] == found["simulated"]["requests"] == found["what if"]["requests"] > 0
    assert found["recorded"]["output_tokens"] == found["simulated"]["output_tokens"] == found["what if"]["output_tokens"]
    code, out, _ = say(capsys, "replay", str(journal), "--policy", "cache=none")
    assert code == 0
    assert "| what if" in out
    assert "TTFT" in out
    assert "fitted to" in out


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--lag", "0"], "--lag"),
        (["--cache", "gold"], "--cache"),
        (["--order", "size"], "--order"),
        (["--step-tokens", "1"], "--step-tokens"),
        (["--lag", "1", "--step", "3"], "--step"),
    ],
)
def test_settings_that_cannot_be_are_refused(journal: Path, capsys: pytest.CaptureFixture[str], argv: Any, word: str) -> None:
    code, _, err = say(capsys, "replay", str(journal), *argv)
    assert code == 2
    assert word in err


def test_pdb_stops_in_the_step_machine_at_the_step(
    journal: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("p self.counters.steps\np len(list(inbox))\nc\n"))
    code, out, _ = say(capsys, "replay", str(journal), "--step", "12", "--pdb")
    assert code == 0
    assert "step_machine.py" in out
    assert "\n(Pdb) 12\n" in out


def test_info_says_what_a_journal_has(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, "info", str(journal), "--json")
    parts = json.loads(out)
    steps, requests = json.loads(journal.with_suffix(".said").read_text())
    assert code == 0
    assert sum(part["requests"] for part in parts) == requests
    assert parts[-1]["plans"][1] == steps - 1
    assert parts[0]["hashed"]
    assert say(capsys, "info", str(journal))[1].count(str(journal)) == len(parts)


def test_what_is_no_journal_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").write_bytes(b"hello, world, this is a file")
    for command in ("replay", "info"):
        code, _, err = say(capsys, command, str(tmp_path / "other"))
        assert code == 2
        assert "no journal" in err
        code, _, err = say(capsys, command, str(tmp_path / "none"))
        assert code == 2
        assert "no such journal" in err
