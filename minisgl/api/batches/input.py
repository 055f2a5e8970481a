"""Reads the input of a batch: a file with a request on each line, of which one is in memory at a time.

Runs in the api process, in threads.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

from minisgl.api.endpoints.table import ENDPOINTS, compact
from minisgl.api.requests.fields import parse_json
from minisgl.config import Config
from minisgl.errors import RequestError

MAX_LINES = 50_000
MAX_LINE_BYTES = 1 << 20
MAX_ID_CHARS = 512  # of a custom_id
MAX_ERRORS = 100  # reported for one file
Place = tuple[int, int]  # where a request stands in its file: offset and length of the line
TOO_LONG = "line_too_long"


def read_requests(path: Path, endpoint: str) -> tuple[dict[str, Place], list[dict[str, Any]]]:
    """({custom_id: where its line is}, problems of the file).  Runs in a thread; no more than one line is in memory.

    Lines that are too long are told among the problems, but the others may be served.
    """
    requests: dict[str, Place] = {}
    problems: list[dict[str, Any]] = []
    wrong = 0  # of the problems, those that fail the batch
    with open(path, "rb") as file:
        for number in itertools.count(1):
            at = file.tell()
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                break
            try:
                if len(line) > MAX_LINE_BYTES and not (len(line) == MAX_LINE_BYTES + 1 and line.endswith(b"\n")):
                    while line and not line.endswith(b"\n"):
                        line = file.readline(1 << 16)
                    text = f"The line is longer than {MAX_LINE_BYTES} bytes; it is not answered."
                    problems.append(problem(TOO_LONG, text, number))
                elif line.strip():
                    custom_id = _parse_line(line, endpoint)[0]
                    if custom_id in requests:
                        raise ValueError("custom_id", f"custom_id {custom_id[:80]!r} occurs twice.")
                    requests[custom_id] = at, len(line)
            except ValueError as e:
                problems.append(problem("invalid_request", e.args[-1], number, e.args[0]))
                wrong += 1
            if len(requests) + len(problems) > MAX_LINES:
                problems.append(problem("too_many_requests", f"The file has more than {MAX_LINES} requests.", number))
                break
            if wrong >= MAX_ERRORS:
                break
    if not requests and not problems:
        problems.append(problem("empty_file", "There is no request in the file.", None))
    return requests, sorted(problems, key=lambda p: p["code"] == TOO_LONG)  # what fails the batch is told first


def body_at(source: int, place: Place) -> dict[str, Any]:
    """The body of the request at a place of an open file that `read_requests` has read.  Runs in a thread."""
    offset, length = place
    body: dict[str, Any] = parse_json(os.pread(source, length, offset))["body"]
    return body


def checked_at(path: Path, place: Place, url: str, config: Config) -> Any:
    """The checked request at a place of a file.  Runs in the reader process.  Raises RequestError."""
    with open(path, "rb") as source:
        return compact(config, ENDPOINTS[url].checked(config, body_at(source.fileno(), place)))


def _parse_line(line: bytes, endpoint: str) -> tuple[str, dict[str, Any]]:
    """(custom_id, body).  The line is JSON as strict as a body over HTTP.  Raises ValueError(field, sentence)."""
    try:
        value = parse_json(line)
    except RequestError as e:
        raise ValueError(None, e.message.replace("request body", "line")) from None
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
        raise ValueError("custom_id", f"custom_id must be a string of 1 to {MAX_ID_CHARS} characters.")
    if value.get("method", "POST") != "POST":
        raise ValueError("method", "method must be POST.")
    if value.get("url") != endpoint:
        raise ValueError("url", f"url must be that of the batch, {endpoint}.")
    if not isinstance(value.get("body"), dict):
        raise ValueError("body", "body must be an object.")
    return custom_id, value["body"]


def problem(code: str, text: str, line: int | None, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "message": text, "line": line, "param": param}
