"""Runs `python -m minisgl batch in.jsonl out.jsonl`: answers a file of requests in OpenAI's batch format.

    in   {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    out  {"id": "batch_req_...", "custom_id": "a", "response": {"status_code", "request_id", "body"}, "error": null}

The output is a log: lines are appended as requests finish, in any order, and nothing is ever rewritten.  Running the same
command again continues, whatever has ended the former run: a torn last line is dropped, and requests with an answer of status
200 are skipped.  If an id has several lines, the last one counts.  That a server is full, ends or fails is no answer: those
requests stay open.  A server that ends is waited for (--wait).  `-` is stdin or stdout; what is on stdout cannot be resumed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from contextlib import ExitStack, suppress
from typing import Any

from tqdm import tqdm

from minisgl.client.batch_client import DEFAULT_URL, BatchClient, BatchRequest, answered
from minisgl.commands.batch_log import ResultLog, open_log, say
from minisgl.commands.flags import key_lines
from minisgl.commands.parser import Parser
from minisgl.errors import UserError

_SHOWN_ERRORS = 10


def run(argv: list[str]) -> int:
    """Exit code: 0 every request has an answer, 1 some do not (yet), 2 (UserError) the files cannot be used, 130 ^C."""
    args = _parse_args(argv)
    requests = read_requests(args.input)
    resume = "the answers so far are on stdout" if args.output == "-" else "run the same command again to go on"
    with ExitStack() as stack:
        log = stack.enter_context(open_log(args.output))
        errors = stack.enter_context(open_log(args.errors)) if args.errors else log
        todo = [r for r in requests if r.custom_id not in log.done]
        skipped = len(requests) - len(todo)
        if skipped:
            say(f"{skipped} of {len(requests)} requests are answered in {args.output} already")
        count = _Count(len(requests), skipped)
        try:
            _work(args, todo, log, errors, count)
            for each in (log, errors):
                each.finish()
        except KeyboardInterrupt:
            say(f"interrupted: {count.ok} of {count.total} done; {resume}")
            return 130
        except UserError as e:
            say(f"{e}\n{count.ok} of {count.total} done; {resume}")
            return 1
    say(count.summary())
    return 0 if count.ok == count.total else 1


def _parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="minisgl batch", description="Send a file of requests to a running server.")
    parser.add_argument("input", help="requests, one JSON object per line; - is stdin")
    parser.add_argument("output", help="answers, appended; may hold those of an earlier run; - is stdout")
    parser.add_argument("--errors", metavar="FILE", help="where answers other than 200 go; default: the output file")
    parser.add_argument("--url", help=f"the server, on this machine ({DEFAULT_URL})")
    parser.add_argument("--port", type=int, metavar="P", help="the same as --url http://127.0.0.1:P")
    parser.add_argument("--socket", metavar="ADDRESS", help="its batch socket (ipc:// or tcp://); default: as --url tells it")
    parser.add_argument("--server-key", default="", metavar="FILE", help="for tcp://: the server's public key, server.key")
    parser.add_argument("--client-key", default="", metavar="FILE", help="for tcp://: the pair of this client, NAME.key_secret")
    parser.add_argument("--api-key-file", metavar="FILE", help="its first key is an administrator's, where the server has any")
    parser.add_argument("--window", type=int, default=256, metavar="N", help="requests in flight at a time (%(default)s)")
    parser.add_argument(
        "--wait",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="for a server that ends meanwhile to come up again (%(default)g)",
    )
    args = parser.parse_args(argv)
    if not 0 <= args.wait < float("inf"):
        raise UserError(f"--wait must be a number of seconds, 0 or more, got {args.wait}")
    if args.port is not None and (args.url or args.socket):
        raise UserError(f"--port {args.port}: the server is named by {'--url' if args.url else '--socket'} already")
    if args.port is not None and not 0 < args.port < 65536:
        raise UserError(f"--port must be between 1 and 65535, got {args.port}")
    args.url = args.url or (DEFAULT_URL if args.port is None else f"http://127.0.0.1:{args.port}")
    paths = [p for p in (args.input, args.output, args.errors) if p and p != "-"]
    if any(_same(a, b) for a, b in itertools.combinations(paths, 2)):
        raise UserError("the input, the output and --errors must be different files")
    return args


def _same(a: str, b: str) -> bool:
    """Whether two paths are one file, also through links."""
    with suppress(OSError):
        return os.path.samefile(a, b)
    return os.path.realpath(a) == os.path.realpath(b)


class _Count:
    """The progress, for the bar and the summary."""

    def __init__(self, total: int, ok: int) -> None:
        self.total, self.ok, self.failed, self.unanswered, self.tokens, self.reason = total, ok, 0, 0, 0, ""
        self._start = time.monotonic()

    def add(self, status: int, body: Any) -> None:
        if status == 200:
            self.ok += 1
        else:
            self.failed += 1
        usage = body.get("usage") if isinstance(body, dict) else None
        self.tokens += usage.get("completion_tokens", 0) if isinstance(usage, dict) else 0

    def leave(self, body: Any) -> None:
        """A request stays open; `body` says why."""
        self.unanswered += 1
        with suppress(TypeError, KeyError):
            self.reason = f": {body['error']['message']}"

    @property
    def rate(self) -> float:
        """Generated tokens per second."""
        return self.tokens / max(1e-6, time.monotonic() - self._start)

    def summary(self) -> str:
        seconds = time.monotonic() - self._start
        text = f"{self.ok} of {self.total} done, {self.failed} failed"
        text += f", {self.tokens} tokens in {seconds:.1f} s ({self.rate:.0f} tok/s)"
        if self.unanswered:
            text += f", {self.unanswered} without an answer{self.reason}"
        return text + ("; run the same command again to retry" if self.failed or self.unanswered else "")


def _work(args: argparse.Namespace, todo: list[BatchRequest], log: ResultLog, errors: ResultLog, count: _Count) -> None:
    if not todo:
        return
    key = next(iter(key_lines(args.api_key_file)), "") if args.api_key_file else ""
    link: dict[str, Any] = {"api_key": key, "server_key": args.server_key, "client_key": args.client_key}
    bar = tqdm(total=count.total, initial=count.ok, unit="req", disable=None)  # None: only on a terminal
    with bar, BatchClient(args.url, args.socket, args.window, wait=args.wait, say=say, **link) as client:
        for result in client.run(todo):
            body = _json(result.body)
            if not answered(result):
                count.leave(body)
                continue
            (log if result.status == 200 else errors).add(result, body)
            count.add(result.status, body)
            bar.set_postfix_str(f"{count.rate:.0f} tok/s" + (f", {count.failed} failed" if count.failed else ""), refresh=False)
            bar.update()


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode("utf-8", "replace")


# ---------------- input
def read_requests(path: str) -> list[BatchRequest]:
    """The requests of a file, all checked before the first is sent.  Raises UserError listing the bad lines."""
    requests: list[BatchRequest] = []
    problems: list[str] = []
    lines: dict[str, int] = {}  # custom_id -> line
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    request = _parse_line(line)
                    first = lines.setdefault(request.custom_id, number)
                    if first != number:
                        raise ValueError(f"custom_id {request.custom_id!r} is that of line {first} already")
                    requests.append(request)
                except ValueError as e:
                    problems.append(f"line {number}: {e}")
    except OSError as e:
        raise UserError(f"{path}: cannot read it: {e.strerror}") from e
    if problems:
        shown = "\n  ".join(problems[:_SHOWN_ERRORS])
        more = f"\n  and {len(problems) - _SHOWN_ERRORS} more" if len(problems) > _SHOWN_ERRORS else ""
        raise UserError(f"{path}: nothing was sent, because these lines are no requests:\n  {shown}{more}")
    if not requests:
        raise UserError(f"{path}: there is no request in it")
    return requests


def _parse_line(line: bytes) -> BatchRequest:
    """Raises ValueError naming the fault."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not JSON ({e})") from e
    if not isinstance(value, dict):
        raise ValueError(f"should be an object, is a {type(value).__name__}")
    custom_id, url, body = value.get("custom_id"), value.get("url"), value.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError("custom_id must be a string")
    if value.get("method", "POST") != "POST":
        raise ValueError(f"method must be POST, is {value['method']!r:.40}")
    if not isinstance(url, str) or not (url.startswith("/") and url.isascii()):
        raise ValueError('url must be a path such as "/v1/chat/completions"')
    if not isinstance(body, dict):
        raise ValueError("body must be an object")
    return BatchRequest(custom_id, url, body)
