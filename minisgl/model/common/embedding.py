"""Token embedding whose table is split over the ranks by rows of the vocabulary.  Runs in the workers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from minisgl.model.common.parallel import Parallel
from minisgl.model.common.shard import Range


class Embedding:
    """Token ids i64[T] -> [T, C].  Each rank looks up the tokens in its range; an all-reduce adds the rest."""

    def __init__(self, table: torch.Tensor, vocab: Range, parallel: Parallel) -> None:
        """table [end - start, C]: the rows of the tokens `vocab`."""
        self._table, self._vocab, self._parallel = table, vocab, parallel

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if self._parallel.size == 1:
            return F.embedding(ids, self._table)
        start, end = self._vocab
        foreign = (ids < start) | (ids >= end)
        x = F.embedding((ids - start).masked_fill_(foreign, 0), self._table)
        return self._parallel.all_reduce_(x.masked_fill_(foreign[:, None], 0))
