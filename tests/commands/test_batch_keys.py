"""A server with a batch socket over TCP, as README.md starts it, and its clients' keys while it runs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from processes import minisgl_command
from test_access import KEY, access, hang_up, server
from test_documented_commands import block, lines_of

from minisgl.api.batches.curve import ClientKeys
from minisgl.api.http.auth import Keys
from minisgl.client import curve
from minisgl.client.batch_client import BatchClient, BatchRequest
from minisgl.commands import batch_keys
from minisgl.errors import UserError

LINE = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 4}}


def readme() -> list[list[str]]:
    """The words of the commands that README.md shows, behind `minisgl`."""
    return [shlex.split(line)[1:] for line in lines_of(block("README.md", "minisgl batch-keys"))]


def run(folder: Path, *words: str) -> str:
    return subprocess.run(minisgl_command(*words), cwd=folder, check=True, capture_output=True, text=True).stdout


def asked(address: str, keys: Path, name: str) -> int:
    pair = {"server_key": str(keys / "server.key"), "client_key": str(keys / f"{name}.key_secret")}
    with BatchClient(socket=address, **pair) as client:
        [result] = client.run([BatchRequest("a", LINE["url"], LINE["body"])])  # type: ignore[arg-type]
        return int(result.status)


def test_the_commands_of_the_readme_work_and_hup_takes_keys_in_and_out(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(curve, "CONNECT_SECONDS", 20.0)
    make, serve, ask = readme()
    run(tmp_path, *make)
    keys = tmp_path / make[1]
    (tmp_path / ask[1]).write_text(json.dumps(LINE) + "\n")
    (run_dir := tmp_path / "run").mkdir()
    address = serve[serve.index("--batch-socket") + 1]
    assert re.fullmatch(r"tcp://0\.0\.0\.0:\d+", address)
    flags = ["tcp://127.0.0.1:0" if word == address else word for word in serve[1:]]
    flags[flags.index("--batch-keys") + 1] = str(keys)
    (tmp_path / "api-keys").write_text(f"{KEY}\n")
    with server(run_dir, *flags, "--api-key-file", str(tmp_path / "api-keys")) as (process, _, lines):
        assert process.stderr is not None
        [there] = [found[1] for line in lines if (found := re.match(r"batch socket: (tcp://\S+), where 1 client key is", line))]
        run(tmp_path, *[there if word.startswith("tcp://") else word for word in ask])
        [answer] = [json.loads(line) for line in (tmp_path / ask[2]).read_text().splitlines()]
        assert answer["response"]["status_code"] == 200
        name = make[2]
        run(tmp_path, *make[:2], "bob")
        with pytest.raises(UserError, match="does not know the key"):
            asked(there, keys, "bob")
        assert "1 API key is in force" in hang_up(process)
        assert process.stderr.readline() == "SIGHUP: 2 client keys are in force on the batch socket\n"
        assert asked(there, keys, "bob") == 200
        (keys / "clients" / f"{name}.key").unlink()
        (keys / "clients" / "notes.key").write_text("no key")
        hang_up(process)
        assert "the keys of the batch socket stay as they were: --batch-keys" in process.stderr.readline()
        assert asked(there, keys, name) == 200
        (keys / "clients" / "notes.key").unlink()
        hang_up(process)
        assert "1 client key is in force" in process.stderr.readline()
        with pytest.raises(UserError, match="does not know the key"):
            asked(there, keys, name)
    text = "".join(lines)
    assert "Traceback" not in text, text
    assert list(run_dir.iterdir()) == []


def test_without_api_keys_hup_reads_the_client_keys_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert batch_keys.run([str(tmp_path / "keys")]) == 0
    mine, clients = access(f"--batch-socket tcp://127.0.0.1:0 --batch-keys {tmp_path / 'keys'}"), ClientKeys((), str)
    with caplog.at_level("INFO", "minisgl"):
        mine.reload(Keys(()), clients)
    assert [record.message for record in caplog.records] == ["SIGHUP: 1 client key is in force on the batch socket"]
    assert list(clients._tenants) == batch_keys.client_keys(str(tmp_path / "keys"))
