"""Finds the reason why no more of a prompt came from the prefix cache, and counts the reasons (docs/cache_explanation.md).

When a prompt is tokenized it is compared with what this process remembers of earlier ones (prompt_memory.py); when its first
token comes, the scheduler has said how much of it was cached, and what was remembered says why it was no more.  Runs in the api
process; a request costs some microseconds, a token nothing.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minisgl.api.prompt_memory import Found, PromptMemory, Tag, common_bytes
from minisgl.arrays import I32
from minisgl.config import Config
from minisgl.sampling_params import RequestOptions, SamplingParams

REASONS = ("new", "template", "evicted", "restart", "salt", "short", "off")
BEFORE, AFTER = 24, 8  # tokens that are shown on each side of the difference
_ROW, _NOWHERE = 12, (1 << 32) - 1  # bytes of a message in a shape: role, rest and place; see conversation.shape_of


@dataclass(frozen=True, slots=True)
class Windows:
    """The token ids around `miss_at`: what both prompts have before it, and how each goes on.  `theirs`: None if not compared.

    `begun`: tokens stand before these; `whole`: none follow `ours`.
    """

    before: tuple[int, ...]
    ours: tuple[int, ...]
    theirs: tuple[int, ...] | None
    begun: bool
    whole: bool


@dataclass(frozen=True, slots=True)
class CacheExplanation:
    """Why no more of a prompt was cached.

    `miss_at`: the first token that differs from an earlier prompt, or where there is none, the first that was not cached.
    `ours`, `theirs`: the text around it, with a bar before the first character that is not the same.  `message`: the index of
    the message with the difference.  `seconds_ago`: when the pages were evicted.  `windows`: what the texts are made of.
    """

    cached_tokens: int
    reason: str
    miss_at: int
    windows: Windows
    ours: str | None = None
    theirs: str | None = None
    message: int | None = None
    seconds_ago: float | None = None

    def render(self) -> dict[str, Any]:
        """The `cache_explanation` of an answer."""
        more: dict[str, Any] = {}
        if self.message is not None:
            more["message"] = self.message
        if self.seconds_ago is not None:
            more["seconds_ago"] = round(self.seconds_ago, 3)
        shown = {"ours": self.ours, "theirs": self.theirs}
        return {"cached_tokens": self.cached_tokens, "reason": self.reason, "miss_at": self.miss_at, **shown, **more}


@dataclass(slots=True, eq=False)
class Recollection:
    """What is known of one request's prompt, from its tokens to its end.

    `off`: it reads nothing from the cache.  `shape`: of its conversation.  `evicted`: the scheduler says that its next pages
    were, so many seconds before its start.
    """

    found: Found
    tag: Tag
    life: int  # of the cache
    off: bool
    shape: bytes
    evicted: float | None = None
    explanation: CacheExplanation | None = None


class CacheReasons:
    """`requests`, `tokens`: by reason, those whose first token has come, and their prompt tokens that were not cached.

    `life`: how often the cache has been lost, at most.
    """

    def __init__(self, config: Config) -> None:
        self.memory = PromptMemory(apart=config.server.salt_by_key == "on")
        self.life = 0
        self.requests: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self._page = config.engine.page_size
        self._off = config.engine.cache == "none"

    def recall(self, ids: I32, params: SamplingParams, options: RequestOptions, shape: bytes) -> Recollection:
        """A prompt has come."""
        tag = options.cache_salt, options.owner
        found = self.memory.enter(ids.tobytes(), tag, self.life, shape, AFTER if options.explain_cache else 0)
        off = self._off or (params.echo and params.logprobs is not None and len(ids) > 1) or options.pooling == "mean"
        return Recollection(found, tag, self.life, off, shape)

    def begin(self, known: Recollection, ids: I32, cached: int, explain: bool) -> None:
        """The first token of an answer has come."""
        reason, at, compared, message = self._judge(known, len(ids), cached)
        self.requests[reason] += 1
        self.tokens[reason] += len(ids) - cached
        self.prove(known)
        if not explain:
            return
        first = max(0, at - BEFORE)
        before, ours = tuple(ids[first:at].tolist()), tuple(ids[at : at + AFTER].tolist())
        theirs = tuple(np.frombuffer(known.found.theirs, np.int32).tolist()) if compared else None
        windows = Windows(before, ours, theirs, first > 0, at + AFTER >= len(ids))
        seconds = known.evicted if reason == "evicted" else None
        known.explanation = CacheExplanation(cached, reason, at, windows, message=message, seconds_ago=seconds)

    def _judge(self, known: Recollection, n: int, cached: int) -> tuple[str, int, bool, int | None]:
        """(the reason, miss_at, whether it is a difference to an earlier prompt, the index of the message that differs)."""
        if known.off:
            return "off", cached, False, None
        found, page, last = known.found, self._page, n - 1
        most = last // page * page  # whole pages, and never the last token
        if cached >= most:
            return "short", cached, False, None
        if cached + page <= min(found.proven, last):
            fresh = found.fresh if known.life == self.life else 0
            lost = cached + page > min(fresh, last) and known.evicted is None
            return "restart" if lost else "evicted", cached, False, None
        seen = min(found.common, last)
        if known.evicted is not None and cached + page <= seen:
            return "evicted", cached, False, None
        template, message = _place(known.shape, found.shape, found.common) if known.shape and found.shape else (False, None)
        elsewhere = min(found.other, last) // page * page
        if elsewhere > seen and 2 * (elsewhere - cached) > most - cached and not (template and message is None):
            return "salt", cached, False, None
        if known.evicted is not None and self.memory.forgotten:
            return "evicted", cached, False, None
        if cached + page < found.common or found.common < max(1, cached):
            return "new", cached, False, None  # not computed yet, but for the last token of an answer, or not remembered
        return ("template", found.common, True, None) if template else ("new", found.common, True, message)

    def prove(self, known: Recollection) -> None:
        """The prompt is in the cache now."""
        if known.found.end is not None:
            self.memory.prove(known.found.end, known.tag, self.life)

    def end(self, known: Recollection, said: list[int]) -> None:
        """The answer has ended."""
        if known.found.end is not None:
            self.memory.extend(known.found.end, array("I", said).tobytes(), known.tag, self.life)

    def lose(self) -> None:
        """The cache may be lost: from now on what is not in it has perhaps not been evicted."""
        self.life += 1


def _place(ours: bytes, theirs: bytes, common: int) -> tuple[bool, int | None]:
    """Where two conversations differ whose first `common` tokens are the same: (whether in what the template wrote, the index
    of the first message that differs, None if none does).

    Messages before the first one that differs are no cause.  So if the difference stands before it in the text, or no message
    differs, the template has made it: by its variables, by the tools, or by the clock.  A message that the other conversation
    does not have, or that has another role there, begins behind the one before it, which is the same.
    """
    n, first = min(len(ours), len(theirs)) // _ROW, common_bytes(ours, theirs) // _ROW
    while first < n and ours[_ROW * first : _ROW * first + 8] == theirs[_ROW * first : _ROW * first + 8]:
        first += 1
    if _ROW * first == len(ours) == len(theirs):
        return True, None
    at = _ROW * first
    same_role = first < n and ours[at : at + 4] == theirs[at : at + 4]
    for start in range(at + 8 if same_role else at - 4, 0, -_ROW):
        if (place := int.from_bytes(ours[start : start + 4], "little")) != _NOWHERE:
            return common < place, first if at < len(ours) else None
    return False, first if at < len(ours) else None


def shown(explanation: CacheExplanation, texts: list[str]) -> CacheExplanation:
    """With the texts of `before`, of `before` + `ours`, and of `before` + `theirs` if there is any.

    A token may end inside a character, so the bar stands before the first character that is not the same as a whole.
    """
    windows, (before, *wholes) = explanation.windows, texts
    cut = len(before)
    for whole in wholes:
        cut = next((i for i, (a, b) in enumerate(zip(before[:cut], whole, strict=False)) if a != b), min(cut, len(whole)))
    lines = []
    for i, whole in enumerate(wholes):
        head, tail = whole[:cut], whole[cut:]
        if windows.begun:
            head = "..." + head.lstrip("\N{REPLACEMENT CHARACTER}")
        if i or not windows.whole:
            tail = tail.rstrip("\N{REPLACEMENT CHARACTER}")
        lines.append(f"{head}|{tail}")
    return replace(explanation, ours=lines[0], theirs=lines[1] if len(lines) > 1 else None)
