"""Lays out the inputs of a step with prompt chunks: named int32 fields in one buffer, which the host packs and the GPU views.

One copy brings them all to the device.  In a graph the buffer has a fixed address and fixed sizes, and padding fills what
the step leaves free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from minisgl.arrays import I32
from minisgl.model.common.slots import StepBatch
from minisgl.plan import StepPlan

Field = Any  # integers on the host (any width), an i32 view of the buffer on the device, or the value of padding
_NONE = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lengths of the fields: T tokens, R rows, S rows that sample, and tiles of prefill attention."""

    tokens: int
    rows: int
    samples: int
    tiles: int

    @property
    def lengths(self) -> list[int]:
        """Words of every field of StepInputs, in their order."""
        return [self.tokens] * 3 + [self.rows] * 2 + [self.samples] * 4 + [4 * self.tiles]


class StepInputs(NamedTuple):
    """The fields, in the order of the buffer."""

    ids: Field  # [T] token ids; -1 - s stands for the last token of slot s, which the host does not know
    positions: Field  # [T]
    kv_index: Field  # [T] page * page_size + offset of each token's key and value
    row_slots: Field  # [R] prompt chunks, then decode rows
    row_lens: Field  # [R] tokens in the KV cache after the step
    sample_rows: Field  # [S] tokens whose logits are sampled, as indices into [T]
    sample_slots: Field  # [S]
    sample_positions: Field  # [S] positions of the sampled tokens
    targets: Field  # [S] where the sampled tokens go
    tiles: Field  # [tiles * 4] see `prefill_attention.tiles_of`; empty outside graphs

    @classmethod
    def of(cls, plan: StepPlan, batch: StepBatch) -> StepInputs:
        """The fields of a plan, laid out as `batch`, without tiles.  Decode rows take their last tokens from the device."""
        decode = batch.decode_slots
        return cls(
            ids=np.concatenate((batch.ids[: len(batch.ids) - len(decode)], -1 - decode)),
            positions=batch.positions,
            kv_index=batch.kv_index,
            row_slots=np.concatenate((plan.prefill["slot"].astype(np.int64), decode)),
            row_lens=batch.kv_lens,
            sample_rows=batch.sample_rows,
            sample_slots=batch.sample_slots,
            sample_positions=batch.sampling.positions,
            targets=np.arange(len(batch.sample_slots)),
            tiles=_NONE,
        )

    @property
    def sizes(self) -> Sizes:
        """The smallest sizes that hold these fields."""
        return Sizes(len(self.ids), len(self.row_slots), len(self.sample_rows), len(self.tiles) // 4)

    def pack(self, sizes: Sizes, padding: StepInputs) -> I32:
        """The words of a buffer of `sizes`."""
        words, at = np.empty(sum(sizes.lengths), np.int32), 0
        for values, length, value in zip(self, sizes.lengths, padding, strict=True):
            words[at : at + len(values)] = values
            words[at + len(values) : at + length] = value
            at += length
        return words

    @classmethod
    def views(cls, buffer: torch.Tensor, sizes: Sizes) -> StepInputs:
        """The fields of a buffer i32[sum(sizes.lengths)] on the device."""
        return cls(*torch.split(buffer, sizes.lengths))


NOTHING = StepInputs(*[_NONE] * len(StepInputs._fields))  # a step of padding alone
