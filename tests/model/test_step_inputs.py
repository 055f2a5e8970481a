"""The buffer of a step with prompt chunks: what the host packs by name, the device finds by name."""

from __future__ import annotations

import numpy as np
import torch
from tiny_models import Driver

from minisgl.model.common.slots import SlotState
from minisgl.model.cuda.step_inputs import NOTHING, Sizes, StepInputs

PADDING = StepInputs(*range(-10, 0))  # another value for every field


def inputs() -> StepInputs:
    """A chunk of three tokens and one of two, of which the second draws, beside a decode row."""
    mirror, driver = SlotState(8, 64, 4), Driver(20, 4)
    for slot in range(3):
        driver.join(slot)
    mirror.apply(driver.plan([(2, [5, 6, 7, 8], True)], []))
    plan = driver.plan([(0, [11, 12, 13], False), (1, [14, 15], True)], [2])
    return StepInputs.of(plan, mirror.apply(plan))._replace(tiles=np.arange(8))


def test_every_field_is_found_where_it_was_packed_with_its_padding_behind_it() -> None:
    packed, sizes = inputs(), Sizes(tokens=9, rows=5, samples=4, tiles=3)
    views = StepInputs.views(torch.from_numpy(packed.pack(sizes, PADDING)), sizes)
    for name, values, view, padding in zip(StepInputs._fields, packed, views, PADDING, strict=True):
        got = view.tolist()
        assert got[: len(values)] == values.tolist(), name
        assert len(got) > len(values), name
        assert set(got[len(values) :]) == {padding}, name


def test_a_step_needs_no_padding_at_its_own_sizes() -> None:
    packed = inputs()
    assert packed.sizes == Sizes(tokens=6, rows=3, samples=2, tiles=2)
    words = packed.pack(packed.sizes, PADDING)
    assert words.tolist() == [value for field in packed for value in field.tolist()]


def test_decode_rows_stand_for_the_token_that_only_the_device_knows() -> None:
    assert inputs().ids.tolist() == [11, 12, 13, 14, 15, -3]
    assert inputs().row_slots.tolist() == [0, 1, 2]
    assert inputs().row_lens.tolist() == [3, 2, 5]


def test_a_step_of_nothing_is_all_padding() -> None:
    sizes = Sizes(tokens=2, rows=1, samples=1, tiles=1)
    assert NOTHING.pack(sizes, PADDING).tolist() == [-10, -10, -9, -9, -8, -8, -7, -6, -5, -4, -3, -2, -1, -1, -1, -1]
