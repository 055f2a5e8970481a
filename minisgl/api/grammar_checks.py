"""Has grammars checked by the checker actor, and once more when it has died over one.  Runs in the api process."""

from __future__ import annotations

from minisgl.actors.messages import CheckGrammar
from minisgl.actors.runtime.actor import Context
from minisgl.api.tokenizer_pool import MAX_DEATHS
from minisgl.errors import InvalidParam


class GrammarChecks:
    """The grammars that the checker has not answered, in the order in which it takes them."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._open: dict[int, CheckGrammar] = {}  # by uid
        self._deaths = (0, 0)  # the uid that was the next one when a checker died, and how often in a row

    def __len__(self) -> int:
        return len(self._open)

    def send(self, uid: int, grammar: str, field: str) -> None:
        """Have a grammar checked; `drop` must follow.  Raises InvalidParam if it is not valid text."""
        m = CheckGrammar(uid, grammar, field)
        try:
            self._ctx.send("checker", m)
        except UnicodeEncodeError as e:
            raise InvalidParam(field, f"{field} holds half of a surrogate pair, which is not text.") from e
        self._open[uid] = m

    def drop(self, uid: int) -> None:
        """It was answered, or nobody waits for it; one that is not there is ignored."""
        self._open.pop(uid, None)

    def resend(self, started: bool) -> list[int]:
        """The checker has died; its successor gets what it had to do, except for a grammar that has ended several.

        `started`: it took messages, and was not killed from outside.  Returns the uid of that grammar, if there is one.
        """
        deadly = []
        if started and self._open:
            first, (last, n) = next(iter(self._open)), self._deaths
            self._deaths = first, n + 1 if first == last else 1
            if self._deaths[1] >= MAX_DEATHS:
                deadly.append(first)
                self.drop(first)
        for question in self._open.values():
            self._ctx.send("checker", question)
        return deadly
