"""Writes the answers of `minisgl batch` to a file from which it can go on, whatever has ended it, or to stdout."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from minisgl.actors.messages import BatchResult
from minisgl.api.batches.log import Log, write_all
from minisgl.errors import UserError

_HEAD = b'{"id": "batch_req_'  # how every line of an output begins


def say(text: str) -> None:
    print(f"minisgl batch: {text}", file=sys.stderr)


class ResultLog(Log):
    """A log of results for one process at a time.  `done`: the ids that had status 200 when it was opened.

    Opening locks the file and drops a torn last line.  Raises UserError if the file holds anything else, and leaves it
    untouched then.
    """

    def __init__(self, path: str) -> None:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path}: the output must be a file, or - for stdout")
        try:
            super().__init__(Path(path))
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            self._file.close()
            raise UserError(f"{path}: another batch run is writing it") from e
        except OSError as e:
            raise UserError(f"{path}: cannot write it: {e.strerror or e}") from e
        try:
            self.done = set(self._read_done())
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ResultLog:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # told by `finish`, unless there is something worse
            self.close()

    def finish(self) -> None:
        """Close the log.  Raises UserError if its last lines cannot be written."""
        try:
            self.close()
        except OSError as e:
            raise UserError(f"{self.path}: cannot write it: {e.strerror}") from e

    def _read_done(self) -> Iterator[str]:
        end = 0
        for number, line in enumerate(self.lines(), 1):
            whole, lost = line.endswith(b"\n"), b"\0" in line  # NUL: a part that a machine without power has lost
            if not line.startswith(_HEAD if whole else _HEAD[: len(line)]) and not (lost and number > 1):
                raise UserError(f"{self.path}: line {number} is no result of a batch; name another output file")
            if lost or not whole:
                say(f"dropped the incomplete last line of {self.path}")
                self.cut(end)
                return
            end += len(line)
            with suppress(ValueError, KeyError, TypeError):  # damaged: repeat the request
                value = json.loads(line)
                if value["response"]["status_code"] == 200:
                    yield str(value["custom_id"])

    def add(self, result: BatchResult, body: Any) -> None:
        """Append a result.  Raises UserError when the disk is full."""
        response = {"status_code": result.status, "request_id": result.request_id, "body": body}
        try:
            self.append(
                {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": result.custom_id, "response": response, "error": None}
            )
        except OSError as e:
            raise UserError(f"{self.path}: cannot write it: {e.strerror}") from e


class Printed(ResultLog):
    """Answers on stdout: nothing is locked, kept or resumed."""

    def __init__(self) -> None:
        self.done, self.path = set(), Path("stdout")

    def append(self, value: dict[str, Any]) -> None:
        write_all(1, json.dumps(value).encode() + b"\n")

    def close(self) -> None:
        """There is nothing to sync."""


def open_log(path: str) -> ResultLog:
    """Raises UserError."""
    return Printed() if path == "-" else ResultLog(path)
