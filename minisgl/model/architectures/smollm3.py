"""SmolLM3: a Llama in which every fourth layer does not rotate its heads ("NoPE", arXiv:2501.18795).  Runs in the workers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minisgl.model.architectures.llama import Llama
from minisgl.model.common.interfaces import Rotation


class SmolLM3(Llama):
    """SmolLM3ForCausalLM."""

    def rotations(self, positions: torch.Tensor) -> Sequence[Rotation | None]:
        rotation = self.rope(positions)
        return [None if i in self.spec.nope_layers else rotation for i in range(len(self.layers))]
