"""Stores files and batches on disk, under --data-dir.  Runs in the api process.

    files/ID            the content of a file, synced under another name and then renamed
    files/ID.json       the file object that the API shows; without it the content does not count
    batches/ID.json     the batch object, replaced atomically whenever its status changes
    batches/ID.output   answers with status 200, one JSON object per line, appended as they come
    batches/ID.errors   the other answers, in the same form
    salt                of the digests that say in an object's "owner" which API key made it; the API does not show them

After any interruption a reader finds a complete object or none, and a log whose last line may be torn; that line is dropped.
What was acknowledged is on disk, with its name (logs: see log.py); what is left over is removed by the next start.
What all of them may take is bounded (--data-dir-gb), and so is their number, which is what a list costs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minisgl.api.batches.log import Log, sync_file, write_new
from minisgl.errors import RequestError, UserError

_ID = re.compile(r"(?:file|batch)[-_][0-9a-f]{32}")
_OBJECT_BYTES = 4096  # counted for an object, which has a block of the disk
MAX_OBJECTS = 20_000  # files, and batches
FULL = "data_dir_full"
ENDED = ("completed", "failed", "cancelled")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WAY_OUT = "delete files that are no longer needed, or have its operator make room"


class Store:
    """The data directory, which one server uses at a time.  Raises UserError if it cannot be used."""

    def __init__(self, directory: str, max_bytes: int = 10 << 30) -> None:
        self.root, self.max_bytes = Path(directory), max_bytes
        self.used = 0  # bytes
        # By room: the purpose of each object by its id, the oldest first.
        self._lists: dict[str, dict[str, str]] = {"files": {}, "batches": {}}
        self._owners: dict[str, str] = {}  # of objects that have one
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
        try:
            self._tidy()
        except BaseException as e:
            self._lock.close()
            if isinstance(e, OSError):
                raise UserError(f"--data-dir {directory}: cannot be used: {e.filename}: {e.strerror}") from e
            raise

    def _tidy(self) -> None:
        """Remove what a server that died has left, and count the rest.

        Files without an object go, but for answers that a batch will make a file, objects without content (a deletion that was
        not finished), and logs of batches that have ended.
        """
        files, batches = self.root / "files", self.root / "batches"
        for part in (*files.glob("*.part"), *batches.glob("*.part")):
            part.unlink()
        objects = {"batches": self.all("batches"), "files": self.all("files")}
        due = {b[key] for b in objects["batches"] for key in ("output_file_id", "error_file_id") if b["status"] not in ENDED}
        live = {b["id"] for b in objects["batches"] if b["status"] not in ENDED}
        for value in objects["files"]:
            if not self.content(value["id"]).exists():
                self._object("files", value["id"]).unlink()
        for room, values in objects.items():
            for value in reversed(values):
                if self._object(room, value["id"]).exists():
                    self._enter(room, value)
        for path in (*files.iterdir(), *batches.iterdir()):
            if path.suffix == ".json":
                self.used += _OBJECT_BYTES
            elif path.stem in (live if path.parent == batches else due | self._lists["files"].keys()):
                self.used += path.stat().st_size
            elif _ID.fullmatch(path.stem):
                path.unlink()
        for directory in (files, batches, self.root, self.root.parent):
            sync_file(directory)

    def take(self, n: int) -> None:
        """Count `n` bytes that are about to be written.  Raises RequestError (413) if they do not fit."""
        if self.used + n > self.max_bytes:
            gigabytes = f"{self.max_bytes / (1 << 30):g}"
            text = f"The server's data directory is full ({gigabytes} GiB, --data-dir-gb): {_WAY_OUT}."
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
        path, new = self._object(room, value["id"]), value["id"] not in self._lists[room]
        part = path.with_suffix(".json.part")
        try:
            write_new(part, json.dumps(value).encode())
            os.replace(part, path)
            sync_file(path.parent)
        except OSError:
            for left in (part, path) if new else (part,):  # what is refused must not be there after a restart
                with contextlib.suppress(OSError):
                    left.unlink(missing_ok=True)
            raise

    def load(self, room: str, name: str, what: str) -> dict[str, Any]:
        """Read an object.  Raises RequestError (404) naming the parameter `what` if there is none."""
        if _ID.fullmatch(name):
            try:
                value: dict[str, Any] = json.loads(self._object(room, name).read_bytes())
                return value
            except FileNotFoundError:
                pass
        raise not_found(name, what)

    def all(self, room: str) -> list[dict[str, Any]]:
        """All objects, the newest first.  Raises UserError for one that cannot be read."""
        values = []
        for path in (self.root / room).glob("*.json"):
            try:
                value = json.loads(path.read_bytes())
                if value["id"] != path.stem or not isinstance(value["created_at"], int) or not value["status"]:
                    raise ValueError
            except (ValueError, TypeError, KeyError) as e:
                text = f"--data-dir {self.root}: {path} is damaged: restore it, or move it to another directory"
                raise UserError(text) from e
            values.append(value)
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
                write_new(part, secrets.token_bytes(16), 0o600)
                os.replace(part, path)
                sync_file(self.root)
            if len(salt := path.read_bytes()) == 16:
                return salt
        except OSError as e:
            raise UserError(f"--data-dir {self.root}: cannot be used: {e.strerror}") from e
        raise UserError(
            f"--data-dir {self.root}: the file salt is damaged: restore it, or remove it and all keys lose their files"
        )

    def _object(self, room: str, name: str) -> Path:
        return self.root / room / f"{name}.json"

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
            sync_file(part)
            if self.content(name).exists():  # under both names, after a crash between the syncs of the directories
                self.give(part.stat().st_size)
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
                with contextlib.suppress(OSError):
                    self.content(name).unlink(missing_ok=True)
            raise
        return value

    def delete(self, name: str) -> None:
        """Remove a file.  Its object goes first: without it there is no file.  Raises OSError."""
        content = self.content(name)
        size = content.stat().st_size
        self._object("files", name).unlink()
        del self._lists["files"][name]
        self._owners.pop(name, None)
        self.give(_OBJECT_BYTES)
        with contextlib.suppress(OSError):  # the next start removes it then
            content.unlink()
            self.give(size)
        sync_file(content.parent)

    def log(self, batch: str, kind: str) -> Log:
        """The log of a batch.  `kind`: "output" or "errors"."""
        return Log(self.log_path(batch, kind), self)

    def log_path(self, batch: str, kind: str) -> Path:
        """The path of that log."""
        return self.root / "batches" / f"{batch}.{kind}"


def not_found(name: str, what: str) -> RequestError:
    """The error (404) where nothing has this id, or the caller may not know of it; `what`: the parameter."""
    text = f"There is no {what.removesuffix('_id').removeprefix('input_')} {name[:80]!r}."
    return RequestError(text, status=404, param=what, code="not_found")


def new_file_id() -> str:
    """The id of a new file."""
    return f"file-{uuid.uuid4().hex}"


def disk_error(e: OSError) -> RequestError:
    """What a client is told when the disk refuses a change: 507 if it is full, 500 otherwise.  The log names the place."""
    full = e.errno in _NO_ROOM
    text = f"The server's data directory (--data-dir) cannot be written to ({e.strerror or e}): {_WAY_OUT}, and try again."
    return RequestError(text, status=507 if full else 500, code="disk_full" if full else "disk_error", retry_after=30)
