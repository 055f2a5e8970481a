"""Copies small int32 arrays from the host to the GPU without waiting for it.  Runs in the workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[Any]  # integers of any width, which travel as int32


def upload(values: Ints, device: torch.device) -> torch.Tensor:
    """`values` as i32 on the device, through a pinned buffer of its own: for what few steps need."""
    host = torch.from_numpy(values.astype(np.int32, copy=False))
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


class Uploads:
    """Pinned buffers in rotation, for what most steps need.

    A buffer may be written again once the copy from it has run.  A worker gets plan k + lag only after the result of step k, so
    lag + 1 buffers are enough.
    """

    def __init__(self, words: int, lag: int, device: torch.device) -> None:
        self._device = device
        self._ring = [torch.empty(words, dtype=torch.int32, pin_memory=device.type == "cuda") for _ in range(lag + 1)]
        self._staging = torch.empty(words, dtype=torch.int32, device=device)
        self._next = 0

    def send(self, parts: Sequence[Ints], into: torch.Tensor | None = None) -> torch.Tensor:
        """Copy the arrays, one behind the other, to `into` or to a buffer that is valid for the step being launched."""
        total = sum(p.size for p in parts)
        if total > len(self._staging):  # rare: a plan that grants very many pages
            words = upload(np.concatenate([p.ravel() for p in parts]), self._device)
            return words if into is None else into.copy_(words)
        pinned = self._ring[self._next]
        host, at = pinned.numpy(), 0
        for part in parts:
            host[at : at + part.size] = part.ravel()
            at += part.size
        return (self._staging[:total] if into is None else into).copy_(pinned[:total], non_blocking=True)

    def turn(self) -> None:
        """The next step uses the next buffer."""
        self._next = (self._next + 1) % len(self._ring)
