"""`minisgl batch` through deaths of either side and full disks: every request has one line in the end."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from disk import Died, Disk
from test_batch_client import Answer, FakeServer, echo, line

from minisgl import __main__ as cli
from minisgl.client import batch_client, connection
from minisgl.commands.batch_log import ResultLog
from minisgl.errors import UserError

IDS = [f"r{i}" for i in range(9)]


class Servers:
    """One server after another; `find` is what /server_info says."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.all: list[FakeServer] = []
        self.asked = 0
        self.start()

    def start(self) -> FakeServer:
        self.all.append(FakeServer(self._directory / f"sock{len(self.all)}"))
        return self.all[-1]

    def end(self) -> None:
        """As a server that is killed: its socket is gone."""
        self.all[-1].silent = True
        Path(self.all[-1].address.removeprefix("ipc://")).unlink()

    def find(self, url: str, key: str) -> str:
        self.asked += 1
        if not os.path.exists(self.all[-1].address.removeprefix("ipc://")):
            raise UserError("no minisgl server answers")
        return self.all[-1].address

    @property
    def prompts(self) -> list[list[str]]:
        return [[json.loads(m.body)["prompt"] for m in server.seen] for server in self.all]


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    monkeypatch.setattr(connection, "PING_SECONDS", 0.02)
    monkeypatch.setattr(batch_client, "MAX_BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(batch_client, "RECONNECT_SECONDS", 0.01)
    (tmp_path / "sockets").mkdir()
    (tmp_path / "work").mkdir()
    several = Servers(tmp_path / "sockets")
    monkeypatch.setattr(batch_client, "find_socket", several.find)
    monkeypatch.chdir(tmp_path / "work")
    Path("in.jsonl").write_text("".join(line(name, name) for name in IDS))
    yield several
    for server in several.all:
        server.close()


def command(*flags: str) -> int:
    return cli.main(["batch", "in.jsonl", "out.jsonl", *flags])


def lines(raw: bytes | None = None) -> Counter[str]:
    raw = Path("out.jsonl").read_bytes() if raw is None else raw
    assert raw.endswith(b"\n") or not raw
    return Counter(json.loads(each)["custom_id"] for each in raw.splitlines())


def refusal(status: int, code: str | None, **more: Any) -> Answer:
    return status, {"error": {"message": f"because of {code}", "code": code, **more}}


def test_a_server_that_comes_up_at_another_address_is_sent_what_has_no_answer(servers: Servers, capsys: Any) -> None:
    first = servers.all[0]
    first.group = 1

    def reply(body: Any) -> Answer:
        if len(first.seen) == 4:
            servers.end()
            servers.start()
        return echo(body)

    first.reply = reply
    assert command("--window", "3") == 0
    assert lines() == Counter(IDS)
    after = servers.prompts[1]
    assert set(IDS[4:]) <= set(after)
    assert len(after) == len(set(after)) < len(IDS), "an answered request is asked again"
    assert "waiting up to 60 s" in capsys.readouterr().err


def test_a_server_that_does_not_come_again_is_waited_for_so_long_and_no_longer(servers: Servers, capsys: Any) -> None:
    servers.all[0].group = 1
    servers.all[0].reply = lambda body: servers.end() or echo(body)  # type: ignore[func-returns-value]
    assert command("--wait", "0.05", "--window", "1") == 1
    err = capsys.readouterr().err
    assert "server has ended" in err
    assert f"1 of {len(IDS)} done; run the same command again to go on" in err
    servers.start()
    assert command() == 0
    assert lines() == Counter(IDS)
    assert IDS[0] not in servers.prompts[1]


@pytest.mark.parametrize(
    "refused", [refusal(503, "model_loading"), refusal(503, "server_draining"), refusal(500, "engine_error"), refusal(429, "x")]
)
def test_that_a_server_cannot_serve_now_is_no_answer_of_a_request(servers: Servers, capsys: Any, refused: Answer) -> None:
    """Loading and ending do not even count as attempts; the others are given up for this run, and stay to be done."""
    tries: Counter[str] = Counter()
    patient = refused[1]["error"]["code"] in ("model_loading", "server_draining")

    def reply(body: Any) -> Answer:
        tries[body["prompt"]] += 1
        served = body["prompt"] != "r3" or (patient and tries["r3"] > 2 * batch_client.MAX_ATTEMPTS)
        return echo(body) if served else refused

    servers.all[0].reply = reply
    assert command() == (0 if patient else 1)
    assert lines() == Counter(IDS if patient else [name for name in IDS if name != "r3"])
    if not patient:
        assert tries["r3"] == batch_client.MAX_ATTEMPTS
        assert f"1 without an answer: {refused[1]['error']['message']}" in capsys.readouterr().err
        servers.all[0].reply = echo
        assert command() == 0
        assert lines() == Counter(IDS)


def test_a_client_that_dies_at_any_call_goes_on_where_it_was(servers: Servers, tmp_path: Path, capsys: Any) -> None:
    servers.all[0].group = 1
    disk = Disk(tmp_path / "work")
    with disk.attached():
        assert command() == 0
    assert disk.calls.count("write") == len(IDS)
    for at, call in enumerate(disk.calls):
        for fault in ("before", "torn") if call == "write" else ("before",):
            Path("out.jsonl").unlink()
            died = Disk(tmp_path / "work", at, fault)
            with died.attached(), pytest.raises(Died):
                command()
            kept = Path("out.jsonl").read_bytes().splitlines(keepends=True) if Path("out.jsonl").exists() else []
            kept = [each for each in kept if each.endswith(b"\n")]
            assert command() == 0
            assert lines() == Counter(IDS)
            assert Path("out.jsonl").read_bytes().startswith(b"".join(kept)), "what was written stays"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
def test_a_full_disk_ends_a_client_with_a_sentence_and_no_torn_line(
    servers: Servers, tmp_path: Path, capsys: Any, number: int
) -> None:
    servers.all[0].group = 1
    calls = Disk(tmp_path / "work")
    with calls.attached():
        command()
    for at, call in enumerate(calls.calls):
        Path("out.jsonl").unlink()
        capsys.readouterr()
        with Disk(tmp_path / "work", at, number).attached():
            code = command()
        assert code == (2 if at < 2 else 1), (at, call)  # 2: the output could not even be opened
        err = capsys.readouterr().err
        assert "out.jsonl: cannot write it" in err
        assert os.strerror(number) in err
        assert "run the same command again" in err or code == 2
        if Path("out.jsonl").exists():
            assert max(lines().values(), default=1) == 1
        assert command() == 0
        assert lines() == Counter(IDS)


def test_a_part_that_a_machine_has_lost_is_repeated_and_other_files_are_left_alone(servers: Servers, capsys: Any) -> None:
    assert command() == 0
    whole = Path("out.jsonl").read_bytes().splitlines(keepends=True)
    for tail in (b"\0" * 100, whole[3][:50] + b"\0" * 400 + b"\n", whole[3][:50] + b"\0" * 9, b"\0" * 50 + whole[3]):
        Path("out.jsonl").write_bytes(b"".join(whole[:3]) + tail)
        assert command() == 0
        assert lines() == Counter(IDS)
    for precious in (b"\0" * 100, b"\x7fELF\0\0\n", b"GGUF\0"):
        Path("out.jsonl").write_bytes(precious)
        assert command() == 2
        assert Path("out.jsonl").read_bytes() == precious


def test_requests_come_from_stdin_and_answers_go_to_stdout(servers: Servers, monkeypatch: Any, capfd: Any) -> None:
    def stdin() -> None:
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(Path("in.jsonl").read_bytes())))

    stdin()
    assert cli.main(["batch", "-", "-"]) == 0
    assert lines(capfd.readouterr().out.encode()) == Counter(IDS)
    stdin()
    assert cli.main(["batch", "-", "out.jsonl"]) == 0
    assert lines() == Counter(IDS)
    servers.all[0].reply = lambda body: (400, {"error": {"message": "no"}}) if body["prompt"] == "r1" else echo(body)
    stdin()
    assert cli.main(["batch", "-", "-", "--errors", "errors.jsonl"]) == 1
    assert lines(capfd.readouterr().out.encode()) == Counter(name for name in IDS if name != "r1")
    assert lines(Path("errors.jsonl").read_bytes()) == Counter(["r1"])
    assert not Path("-").exists()


def test_the_output_must_be_a_file_of_its_own(servers: Servers, capsys: Any) -> None:
    os.link("in.jsonl", "hard.jsonl")
    os.symlink("in.jsonl", "soft.jsonl")
    os.mkfifo("pipe")
    before = Path("in.jsonl").read_bytes()
    for output, text in (
        *((same, "different files") for same in ("in.jsonl", "./in.jsonl", "hard.jsonl", "soft.jsonl")),
        *((odd, "must be a file, or -") for odd in ("pipe", "/dev/null", ".")),
    ):
        assert cli.main(["batch", "in.jsonl", output]) == 2
        assert text in capsys.readouterr().err
    assert Path("in.jsonl").read_bytes() == before
    assert cli.main(["batch", "in.jsonl", "out.jsonl", "--wait", "-1"]) == 2
    assert "--wait" in capsys.readouterr().err
    with ResultLog("out.jsonl"), pytest.raises(UserError, match="another batch run"):
        ResultLog("out.jsonl")
