"""Stores files and batches on disk, under --data-dir.  Runs in the api process.

    files/ID            the content of a file, synced under another name and then renamed
    files/ID.json       the file object that the API shows; without it the content does not count
    batches/ID.json     the batch object, replaced atomically whenever its status changes
    batches/ID.output   answers with status 200, one JSON object per line, appended as they come
    batches/ID.errors   the other answers, in the same form

After any interruption a reader finds a complete object or none, and a log whose last line may be torn; that line is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from minisgl.errors import RequestError, UserError

_ID = re.compile(r"(?:file|batch)[-_][0-9a-f]{32}")
_SYNC_LINES = 128
_SYNC_SECONDS = 1.0


class Store:
    """The data directory, which one server uses at a time.  Raises UserError if it cannot be used."""

    def __init__(self, directory: str) -> None:
        self.root = Path(directory)
        try:
            for name in ("files", "batches"):
                (self.root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = open(self.root / "lock", "a")  # noqa: SIM115  held while the server runs
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            self._lock.close()
            raise UserError(f"--data-dir {directory}: another server is using it") from e
        except OSError as e:
            raise UserError(f"--data-dir {directory}: cannot be used: {e.strerror}") from e
        for room in ("files", "batches"):
            for part in (self.root / room).glob("*.part"):  # left by a server that died
                part.unlink()

    def close(self) -> None:
        """Release the directory.  Idempotent."""
        self._lock.close()

    # ---------------- objects
    def save(self, room: str, value: dict[str, Any]) -> None:
        """Write an object.  After a crash either the former version is there or this one."""
        path = self.root / room / f"{value['id']}.json"
        part = path.with_suffix(".json.part")
        with open(part, "w", encoding="utf-8") as f:
            json.dump(value, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        self._sync_directory(room)

    def load(self, room: str, name: str, what: str) -> dict[str, Any]:
        """Read an object.  Raises RequestError (404) naming the parameter `what` if there is none."""
        if _ID.fullmatch(name):
            try:
                value: dict[str, Any] = json.loads((self.root / room / f"{name}.json").read_bytes())
                return value
            except FileNotFoundError:
                pass
        text = f"There is no {what.removesuffix('_id').removeprefix('input_')} {name[:80]!r}."
        raise RequestError(text, status=404, param=what, code="not_found")

    def all(self, room: str) -> list[dict[str, Any]]:
        """All objects, the newest first."""
        values = [json.loads(path.read_bytes()) for path in (self.root / room).glob("*.json")]
        return sorted(values, key=lambda v: (v["created_at"], v["id"]), reverse=True)

    # ---------------- files
    def content(self, name: str) -> Path:
        """The path of a file's content.  `name`: the id of an object that was loaded or made here."""
        return self.root / "files" / name

    def new_part(self) -> Path:
        """A path for content that is not complete yet."""
        return self.root / "files" / f"{uuid.uuid4().hex}.part"

    def adopt(self, part: Path, filename: str, purpose: str, name: str = "") -> dict[str, Any]:
        """Make complete content a file; returns its object.  With a `name`, its id, the call may be repeated after a crash."""
        name = name or new_file_id()
        if part.exists():
            with open(part, "rb") as f:
                os.fsync(f.fileno())
            os.replace(part, self.content(name))
        value = {
            "id": name,
            "object": "file",
            "bytes": self.content(name).stat().st_size,
            "created_at": int(time.time()),
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        self.save("files", value)
        return value

    def delete(self, name: str) -> None:
        """Remove a file.  Its object goes first: without it there is no file."""
        (self.root / "files" / f"{name}.json").unlink()
        self.content(name).unlink(missing_ok=True)

    def log(self, batch: str, kind: str) -> Log:
        """The log of a batch.  `kind`: "output" or "errors"."""
        return Log(self.log_path(batch, kind))

    def log_path(self, batch: str, kind: str) -> Path:
        """The path of that log."""
        return self.root / "batches" / f"{batch}.{kind}"

    def _sync_directory(self, room: str) -> None:
        fd = os.open(self.root / room, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def new_file_id() -> str:
    """The id of a new file."""
    return f"file-{uuid.uuid4().hex}"


class Log:
    """An append-only file of JSON lines.  Every line reaches the kernel at once, and the disk as part of a group."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] = open(path, "a+b")  # noqa: SIM115  closed by `close`
        self._unsynced, self._synced = 0, time.monotonic()

    def recover(self) -> Iterator[dict[str, Any]]:
        """Read all lines.  A torn last line is cut off."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                self._file.truncate(end)
                return
            end += len(line)
            yield json.loads(line)

    def append(self, value: dict[str, Any]) -> None:
        """Raises OSError when the disk is full."""
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()
        self._unsynced += 1
        if self._unsynced >= _SYNC_LINES or time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Wait until all lines are on disk."""
        os.fdatasync(self._file.fileno())
        self._unsynced, self._synced = 0, time.monotonic()

    def close(self) -> None:
        """Sync and close.  Idempotent."""
        if not self._file.closed:
            self.sync()
            self._file.close()
