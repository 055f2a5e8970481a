"""Keeps the state of every slot on the GPU, and applies plans to it.  Runs in the workers.

The host keeps a mirror (SlotState) for what must be laid out there: prompt chunks, and the order of the decode rows.  New slots
and page grants travel as the bytes of the record; a decode batch that stays the same is not sent again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from minisgl.arrays import I32
from minisgl.model.kernels.apply_plan import apply_plan
from minisgl.model.kernels.penalties import enter_extras
from minisgl.model.kernels.sampling import Extras, SamplingState
from minisgl.model.kernels.uploads import Uploads
from minisgl.plan import StepPlan


class DeviceState(SamplingState):
    """Sampling parameters, KV lengths, last tokens and page tables by slot.  Slot `max_running` is for padding rows."""

    def __init__(
        self, max_running: int, max_context: int, page_size: int, lag: int, device: torch.device, *, vocab: int
    ) -> None:
        super().__init__(max_running + 1, device)
        self._vocab, self._device = vocab, device
        self.spare = max_running
        self.page_size = page_size
        width = -(-max_context // page_size)
        self.page_table = torch.zeros(max_running + 1, width, dtype=torch.int32, device=device)
        self._plans = Uploads(1 << 16, lag, device)
        self._rows = Uploads(2 * (max_running + 64) + 64, lag, device)
        # Decode rows, longest context first (the last programs of a launch are then the short ones), and where in the
        # plan's order each row's token goes; padding rows write behind the result.
        self.decode_rows = torch.full((2, max_running + 64), max_running, dtype=torch.int32, device=device)

    def spare_page(self, page: int) -> None:
        """Set the page where padding rows keep their keys and values."""
        self.page_table[self.spare].fill_(page)

    def apply(self, plan: StepPlan) -> None:
        """Enter new slots, page grants and extras."""
        self._plans.turn()
        n_new_slots, n_page_grants, n_extra = len(plan.new_slots), len(plan.page_grants), len(plan.extras)
        if n_new_slots or n_page_grants:
            extras = self._lay_out(plan) if n_extra else []
            words = self._plans.send([_words(plan.new_slots), _words(plan.page_grants), *extras])
            apply_plan(words, n_new_slots, n_page_grants, self, self.page_table)
            if n_extra:
                enter_extras(words[len(words) - sum(len(part) for part in extras) :], n_extra, self)

    def _lay_out(self, plan: StepPlan) -> list[I32]:
        """The words of `enter_extras`; allocates what the device does not have yet."""
        e, n = plan.extras, len(plan.extras)
        if self.extras is None:
            self.extras = Extras(len(self.kv_len), self._vocab, self._device)
        if ((e["presence"] != 0) | (e["frequency"] != 0) | (e["repetition"] != 1)).any():
            self.extras.count()
        bias, history = 3 * e["n_bias"], e["n_prompt"] + e["n_output"]
        starts = np.zeros((n, 2), np.int32)
        starts[:, 0] = 10 * n + np.cumsum(bias) - bias
        starts[:, 1] = 10 * n + bias.sum() + np.cumsum(history) - history
        return [_words(e), starts.ravel(), _words(plan.bias), plan.history]

    def set_decode(self, slots: I32, order: npt.NDArray[np.int64]) -> None:
        """Make slots[order] the decode rows; row i's token is number order[i] of the result."""
        self._rows.turn()
        width = self.decode_rows.shape[1]
        rows = np.full((2, width), self.spare, np.int32)
        rows[1] = width - 1
        rows[0, : len(slots)] = slots[order]
        rows[1, : len(slots)] = order
        self._rows.send([rows], into=self.decode_rows.view(-1))


def _words(rows: npt.NDArray[np.void]) -> I32:
    return np.frombuffer(rows.tobytes(), np.int32)
