"""The wire format of KV events, as vLLM and SGLang publish them: msgpack of [time, [event, ...], rank].

An event is a map with its type (`map`, of releases since the middle of 2026), or the values alone (`array`, of older ones).
`medium` is "GPU" for the memory that the model computes in, on a CPU as well: routers tell it from slower tiers by that name.
The reason of a removal is a key that nobody else has; an array has no place for it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgpack

MEDIUM = "GPU"
RANK = 0  # of data parallelism, of which there is none; Dynamo reads no message without one
Event = dict[str, Any] | list[Any]
END = (struct.pack(">q", -1), b"")  # sequence number and payload that end a replay


class MapForm:
    """Events with names.  `block_size` in tokens."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def stored(self, hashes: list[int], parent: int | None, tokens: Sequence[int], salt: str = "") -> Event:
        """Blocks in a chain behind `parent`, None where a prompt begins.  `salt`: of a salted one that begins here."""
        event: dict[str, Any] = {
            "type": "BlockStored",
            "block_hashes": hashes,
            "parent_block_hash": parent,
            "token_ids": tokens,
            "block_size": self.block_size,
            "lora_id": None,
            "medium": MEDIUM,
            "lora_name": None,  # vllm-router reads no event without it
        }
        if salt:
            event["extra_keys"] = _keys(salt, len(hashes))
        return event

    def removed(self, hashes: list[int], reason: str) -> Event:
        return {"type": "BlockRemoved", "block_hashes": hashes, "medium": MEDIUM, "reason": reason}

    def cleared(self) -> Event:
        return {"type": "AllBlocksCleared"}


class ArrayForm(MapForm):
    """Events by position."""

    def stored(self, hashes: list[int], parent: int | None, tokens: Sequence[int], salt: str = "") -> Event:
        values = ["BlockStored", hashes, parent, tokens, self.block_size, None, MEDIUM, None]
        return [*values, _keys(salt, len(hashes))] if salt else values

    def removed(self, hashes: list[int], reason: str) -> Event:
        return ["BlockRemoved", hashes, MEDIUM]

    def cleared(self) -> Event:
        return ["AllBlocksCleared"]


FORMS: dict[str, type[MapForm]] = {"map": MapForm, "array": ArrayForm}  # as --kv-events-format names them


def _keys(salt: str, blocks: int) -> list[list[str] | None]:
    """`extra_keys`: what a block's identity has beyond its tokens; a salt is that of the first."""
    return [[salt], *[None] * (blocks - 1)]


def packed(events: list[Event], unix_time: float) -> bytes:
    """The payload of a message."""
    data: bytes = msgpack.packb((unix_time, events, RANK))
    return data


def number(seq: int) -> bytes:
    """A sequence number as it is sent."""
    return struct.pack(">Q", seq)
