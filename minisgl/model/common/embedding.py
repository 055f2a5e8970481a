"""Token embedding, split over the ranks by rows of the vocabulary (tensor parallelism).  Runs in the workers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from minisgl.model.common.parallel import Parallel
from minisgl.model.common.shard import Range


class Embedding:
    """Token ids i64[T] -> [T, C].  A rank holds the rows `vocab` and contributes zero for all other tokens."""

    def __init__(self, weight: torch.Tensor, vocab: Range, parallel: Parallel) -> None:
        self._weight = weight
        self._vocab = vocab
        self._parallel = parallel

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if self._parallel.size == 1:
            return F.embedding(ids, self._weight)
        start, end = self._vocab
        mine = (ids >= start) & (ids < end)
        x = F.embedding((ids - start).masked_fill_(~mine, 0), self._weight)
        return self._parallel.all_reduce_(x.masked_fill_(~mine[:, None], 0))
