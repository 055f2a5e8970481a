"""The lines that a server and its processes print on stderr, for people or (`--log-format json`) for programs.

Every line is a record of Python's `logging`: modules that know nothing of this one, the core and libraries among them, use
`logging.getLogger`.  `say` makes a line with an event and fields.  `setup` runs at the start of each process of a server; a
program that uses the LLM class keeps its own logging.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:  # no generic class in Python 3.10
    _StreamHandler = logging.StreamHandler

LOGGER = logging.getLogger("minisgl")
LOADING, LOAD, REQUEST, REFUSED = "loading", "load", "request", "refused"  # events; what starts and stops has others
_TIMED = {LOAD, REQUEST, REFUSED}  # printed with the time of day
_PATIENCE = 0.1  # seconds that a line waits for a reader
_DIM, _BOLD, _YELLOW, _RED, _PLAIN = (f"\x1b[{n}m" for n in (2, 1, 33, 31, 0))


def say(event: str, text: str, level: int = logging.INFO, **fields: Any) -> None:
    """Print one line: `text` for people, `event` and `fields` for programs."""
    LOGGER.log(level, "%s", text, extra={"event": event, "fields": fields})


def setup(log_format: str, stream: TextIO | None = None, environ: Mapping[str, str] = os.environ) -> logging.Handler:
    """Send what this process logs to `stream` (stderr), as "text" or "json".  Again: instead of the last time."""
    stream = stream or sys.stderr
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, Lines)]:
        root.removeHandler(old)
    handler = Lines(stream)
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines(colours(stream, environ)))
    root.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    if log_format == "json":
        logging.captureWarnings(True)
        sys.excepthook = lambda kind, e, trace: LOGGER.critical("the process failed", exc_info=(kind, e, trace))
    return handler


def on_terminal(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a line of the stream can be written over, as progress bars do."""
    return stream.isatty() and environ.get("TERM", "") != "dumb"


def colours(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the stream shows colours, and nobody has asked for none (https://no-color.org)."""
    return on_terminal(stream, environ) and not environ.get("NO_COLOR")


def one_line(text: str) -> str:
    """Text that cannot end its line, or command a terminal: what is not printable is escaped as in a Python string."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Lines(_StreamHandler):
    """Writes lines to a stream, but waits for nobody: a reader that has stopped reading (^S, a full pipe) holds nothing up.

    Lines that find no room are counted, and the number precedes the next one.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        if not _has_room(self.stream, 0.0 if self.lost else _PATIENCE):
            self.lost += 1
            return
        if lost := self.lost:
            self.lost = 0
            text = f"{lost} {'line was' if lost == 1 else 'lines were'} lost: nobody has read them"
            super().emit(logging.makeLogRecord({**_WARNING, "msg": text, "fields": {"lines": lost}}))
        super().emit(record)


_WARNING: dict[str, Any] = {"name": LOGGER.name, "levelno": logging.WARNING, "levelname": "WARNING", "event": "lost"}


def _has_room(stream: TextIO, seconds: float) -> bool:
    """Whether a line of usual length (a page) can be written without waiting for longer than `seconds`."""
    try:
        return bool(select.select([], [stream], [], seconds)[1])
    except (OSError, ValueError):  # a stream without a descriptor never makes anybody wait
        return True


class TextLines(logging.Formatter):
    """One line a record, with the time of day where things happen again and again; a traceback's lines are indented."""

    def __init__(self, coloured: bool) -> None:
        super().__init__()
        self._coloured = coloured

    def format(self, record: logging.LogRecord) -> str:
        event, text = getattr(record, "event", ""), one_line(record.getMessage())
        if not event and record.levelno < logging.WARNING:
            text = f"minisgl: {text}"
        elif not event or event == "lost":
            text = f"{_clock(record)} {record.levelname.lower()}: {text}"
        elif event in _TIMED:
            text = f"{_clock(record)} {text}"
        if self._coloured and (colour := _colour(event, record.levelno)):
            text = f"{colour}{text}{_PLAIN}"
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        return "\n    ".join([text, *map(one_line, trace.splitlines())])


class JsonLines(logging.Formatter):
    """One JSON object a record: time (ISO 8601, UTC), level, event, message, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        seconds, milliseconds = divmod(int(record.created * 1000), 1000)
        line = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{milliseconds:03}Z",
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "log"),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _clock(record: logging.LogRecord) -> str:
    return time.strftime("%H:%M:%S", time.localtime(record.created))


def _colour(event: str, level: int) -> str:
    if level >= logging.WARNING:
        return _RED if level >= logging.ERROR else _YELLOW
    return {"ready": _BOLD, LOAD: _DIM, REQUEST: _DIM, REFUSED: _YELLOW}.get(event, "")
