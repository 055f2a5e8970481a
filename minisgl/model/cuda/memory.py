"""Divides a GPU's memory between weights, steps, graphs and KV cache: `Ledger`.  No torch.

In the workers from measurements; `minisgl fit` predicts what they measure.
"""

from __future__ import annotations

from dataclasses import dataclass

from minisgl.config import EngineConfig, ModelSpec
from minisgl.errors import UserError
from minisgl.model.common.memory import extras_bytes
from minisgl.plan import SCORED_TOKENS

GRAPHS = 1 << 30  # kept free for the temporaries of graphs, which are captured later; their logits come on top
_GIB = 1 << 30


def graph_bytes(engine: EngineConfig, spec: ModelSpec, item: int) -> int:
    """Bytes kept free for graphs, their logits and the extras of all slots.  item: bytes of a number of the model's dtype."""
    # Logits of the largest decode step and of the largest short one; ranks also gather and join theirs.
    rows = engine.max_running + SCORED_TOKENS
    logits = rows * spec.vocab_size * item * (2 if engine.tp == 1 else 6)
    return GRAPHS + logits + extras_bytes(engine.max_running + 65, spec.vocab_size)


@dataclass(frozen=True, slots=True)
class Ledger:
    """Bytes of one GPU.  `other`: taken before the engine started, by other programs and by CUDA itself."""

    total: int
    other: int
    weights: int
    step: int  # the largest step's activations, measured by running it
    page: int  # one page of the KV cache over all layers
    page_size: int
    graphs: int = GRAPHS

    @property
    def room(self) -> int:
        """Bytes left for the KV cache and for the share that stays free."""
        return self.total - self.other - self.weights - self.step - self.graphs

    def pages(self, kv_tokens: int, fraction: float, device: int) -> int:
        """The number of pages for kv_tokens, or for `fraction` of the room.  Raises UserError naming the flags to change."""
        most = max(0, self.room // self.page)
        if kv_tokens and most:
            needed = -(-kv_tokens // self.page_size)
            if needed > most:
                raise UserError(
                    f"--kv-tokens {kv_tokens}: GPU {device} has room for {most * self.page_size} tokens. {self.describe(0)}. "
                    f"Use --kv-tokens {most * self.page_size} or less, a smaller --step-tokens, or a larger --tp."
                )
            return needed
        pages = int(self.room * fraction) // self.page if most else 0
        if pages < 1:
            raise UserError(
                f"no memory for the KV cache on GPU {device}: {self.describe(0)}. "
                "Use a smaller --step-tokens, --quantization fp8, a larger --tp, or a smaller model."
            )
        return pages

    def describe(self, pages: int) -> str:
        """One line with every entry, in GiB."""

        def gib(n: int) -> str:
            return f"{n / _GIB:.1f}"

        kv = pages * self.page
        return (
            f"{gib(self.total)} GiB = {gib(self.other)} taken before + {gib(self.weights)} weights + {gib(self.step)} largest "
            f"step + {gib(self.graphs)} graphs + {gib(kv)} KV cache ({pages * self.page_size} tokens) + "
            f"{gib(self.room - kv)} free"
        )
