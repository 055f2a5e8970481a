"""Finds out, after whatever interruption, which requests of a batch have an answer."""

from __future__ import annotations

import contextlib
from typing import Any

from minisgl.api.batches.input import TOO_LONG
from minisgl.api.batches.store import Store

FILES = (("output", "output_file_id"), ("errors", "error_file_id"))  # kinds of answers, and the field of each one's file


def logs_of(store: Store, batch: dict[str, Any]) -> list[str]:
    """The kinds of answers of which a batch has a log, which is no file yet."""
    return [kind for kind, _ in FILES if store.log_path(batch["id"], kind).exists()]


def recover(store: Store, batch: dict[str, Any]) -> set[str]:
    """Read the ids of the requests with an answer, and count them.  Cuts off what is not a whole line.  Raises OSError."""
    counts, done = batch["request_counts"], set[str]()
    refused = sum(p["code"] == TOO_LONG for p in (batch["errors"] or {"data": ()})["data"])
    for kind, key in FILES:
        ids = set[str]()
        if kind in logs_of(store, batch):
            with contextlib.closing(store.log(batch["id"], kind)) as file:
                ids = set(file.recover())
        elif batch[key] is not None:  # a file already, and counted
            continue
        counts["completed" if kind == "output" else "failed"] = len(ids) + (refused if kind == "errors" else 0)
        done |= ids
    return done
