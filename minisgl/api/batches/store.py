"""Stores files and batches on disk, under --data-dir.  Runs in the api process.

    files/ID            the content of a file, synced under another name and then renamed
    files/ID.json       the file object that the API shows; without it the content does not count
    batches/ID.json     the batch object, replaced atomically whenever its status changes
    batches/ID.output   answers with status 200, one JSON object per line, appended as they come
    batches/ID.errors   the other answers, in the same form
    salt                of the digests that say in an object's "owner" which API key made it; the API does not show them

After any interruption a reader finds a complete object or none, and a log whose last line may be torn; that line is dropped.
What all of them may take is bounded (--data-dir-gb), and so is their number, which is what a list costs.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from minisgl.api.rendering import json_pieces
from minisgl.errors import RequestError, UserError

_ID = re.compile(r"(?:file|batch)[-_][0-9a-f]{32}")
_SYNC_LINES = 128
_OBJECT_BYTES = 4096  # counted for an object, which has a block of the disk
MAX_OBJECTS = 20_000  # files, and batches
_SYNC_SECONDS = 1.0
_CUSTOM_ID = b'"custom_id": '


FULL = "data_dir_full"


class Store:
    """The data directory, which one server uses at a time.  Raises UserError if it cannot be used."""

    def __init__(self, directory: str, max_bytes: int = 10 << 30) -> None:
        self.root, self.max_bytes = Path(directory), max_bytes
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
        self.used = 0  # bytes
        self._lists: dict[str, dict[str, str]] = {}  # by room: the purpose of each object by its id, the oldest first
        self._owners: dict[str, str] = {}  # of objects that have one
        for room in ("files", "batches"):
            self._lists[room] = {}
            for value in reversed(self.all(room)):
                self._enter(room, value)
            if room == "files":
                self._drop_orphans()
            sizes = (p.stat().st_size for p in (self.root / room).iterdir() if p.suffix != ".json")
            self.used += sum(sizes) + _OBJECT_BYTES * len(self._lists[room])

    def _drop_orphans(self) -> None:
        """Remove content whose object was not written before a crash, but for answers that a batch will make a file."""
        due = {b[key] for b in self.all("batches") for key in ("output_file_id", "error_file_id")}
        for path in (self.root / "files").iterdir():
            if path.suffix != ".json" and path.name not in self._lists["files"] and path.name not in due:
                path.unlink()

    def take(self, n: int) -> None:
        """Count `n` bytes that are about to be written.  Raises RequestError (413) if they do not fit."""
        if self.used + n > self.max_bytes:
            gigabytes = f"{self.max_bytes / (1 << 30):g}"
            text = (
                f"The server's data directory is full ({gigabytes} GiB, --data-dir-gb): delete files that are no longer needed."
            )
            raise RequestError(text, status=413, code=FULL)
        self.used += n

    def give(self, n: int) -> None:
        """Count bytes that are not there any more."""
        self.used -= n

    def close(self) -> None:
        """Release the directory.  Idempotent."""
        self._lock.close()

    # ---------------- objects
    def save(self, room: str, value: dict[str, Any], *, always: bool = False) -> None:
        """Write an object.  After a crash either the former version is there or this one.

        Raises OSError when the disk is full, and RequestError when the directory is, unless it is written `always`.
        """
        new = value["id"] not in self._lists[room]
        if new and not always:
            if len(self._lists[room]) >= MAX_OBJECTS:
                text = f"The server keeps {MAX_OBJECTS} {room}, its limit: delete files that are no longer needed."
                raise RequestError(text, status=413, code=FULL)
            self.take(_OBJECT_BYTES)
        try:
            self._write(room, value)
        except BaseException:
            self.give(_OBJECT_BYTES if new and not always else 0)
            raise
        self.used += _OBJECT_BYTES if new and always else 0
        self._enter(room, value)

    def _enter(self, room: str, value: dict[str, Any]) -> None:
        self._lists[room][value["id"]] = value.get("purpose", "")
        if owner := value.get("owner"):
            self._owners[value["id"]] = owner

    def _write(self, room: str, value: dict[str, Any]) -> None:
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
        raise not_found(name, what)

    def all(self, room: str) -> list[dict[str, Any]]:
        """All objects, the newest first."""
        values = [json.loads(path.read_bytes()) for path in (self.root / room).glob("*.json")]
        return sorted(values, key=lambda v: (v["created_at"], v["id"]), reverse=True)

    def names(self, room: str, purpose: str | None = None, owns: Callable[[str], bool] = lambda _: True) -> list[str]:
        """The ids of all objects, or of those with a purpose, whose owner `owns` admits, the newest first.

        Reads nothing from the disk.
        """
        found = reversed(self._lists[room].items())
        return [name for name, p in found if purpose in (None, p) and owns(self._owners.get(name, ""))]

    def salt(self) -> bytes:
        """The 16 secret bytes of this directory, made when they are first needed.  Raises UserError."""
        path = self.root / "salt"
        try:
            if not path.exists():
                part = path.with_suffix(".part")
                with open(part, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as f:
                    f.write(secrets.token_bytes(16))
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(part, path)
                self._sync_directory(".")
            if len(salt := path.read_bytes()) == 16:
                return salt
        except OSError as e:
            raise UserError(f"--data-dir {self.root}: cannot be used: {e.strerror}") from e
        raise UserError(
            f"--data-dir {self.root}: the file salt is damaged: restore it, or remove it and all keys lose their files"
        )

    # ---------------- files
    def content(self, name: str) -> Path:
        """The path of a file's content.  `name`: the id of an object that was loaded or made here."""
        return self.root / "files" / name

    def new_part(self) -> Path:
        """A path for content that is not complete yet."""
        return self.root / "files" / f"{uuid.uuid4().hex}.part"

    def adopt(self, part: Path, filename: str, purpose: str, name: str = "", *, owner: str = "") -> dict[str, Any]:
        """Make complete content a file; returns its object.  With a `name`, its id, the call may be repeated after a crash."""
        answers, name = bool(name), name or new_file_id()
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
            **({"owner": owner} if owner else {}),
        }
        try:
            self.save("files", value, always=answers)
        except BaseException:
            if not answers:
                self.content(name).unlink(missing_ok=True)
            raise
        return value

    def delete(self, name: str) -> None:
        """Remove a file.  Its object goes first: without it there is no file."""
        size = self.content(name).stat().st_size
        (self.root / "files" / f"{name}.json").unlink()
        del self._lists["files"][name]
        self._owners.pop(name, None)
        self.give(_OBJECT_BYTES + size)
        self.content(name).unlink(missing_ok=True)

    def log(self, batch: str, kind: str) -> Log:
        """The log of a batch.  `kind`: "output" or "errors"."""
        return Log(self.log_path(batch, kind), self)

    def log_path(self, batch: str, kind: str) -> Path:
        """The path of that log."""
        return self.root / "batches" / f"{batch}.{kind}"

    def _sync_directory(self, room: str) -> None:
        fd = os.open(self.root / room, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def not_found(name: str, what: str) -> RequestError:
    """The error (404) where nothing has this id, or the caller may not know of it; `what`: the parameter."""
    text = f"There is no {what.removesuffix('_id').removeprefix('input_')} {name[:80]!r}."
    return RequestError(text, status=404, param=what, code="not_found")


def new_file_id() -> str:
    """The id of a new file."""
    return f"file-{uuid.uuid4().hex}"


class Log:
    """An append-only file of JSON lines.  Every line reaches the kernel at once, and the disk as part of a group."""

    def __init__(self, path: Path, store: Store | None = None) -> None:
        self.path, self._store = path, store
        self._file: IO[bytes] = open(path, "a+b")  # noqa: SIM115  closed by `close`
        self._unsynced, self._synced = 0, time.monotonic()

    def recover(self) -> Iterator[str]:
        """Read the custom_id of every line.  A torn last line is cut off."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                self._file.truncate(end)
                return
            end += len(line)
            yield _custom_id(line)

    def append(self, value: dict[str, Any]) -> None:
        """Raises OSError when the disk is full, and RequestError when the directory is."""
        line = b"".join(json_pieces(value)) + b"\n"
        if self._store is not None:
            self._store.take(len(line))
        self._file.write(line)
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
            try:
                self.sync()
            finally:
                self._file.close()


def _custom_id(line: bytes) -> str:
    """The custom_id of a line, which stands before the answer: that may be megabytes."""
    if (at := line.find(_CUSTOM_ID, 0, 200)) < 0:
        return str(json.loads(line)["custom_id"])
    value, _ = json.JSONDecoder().raw_decode(line[at + len(_CUSTOM_ID) : at + (1 << 16)].decode("utf-8", "replace"))
    return str(value)
