"""Numbers the messages of the stream, and answers those that missed some.

A number is one more than the one before.  The first is the time at which the scheduler process was started, in microseconds
since 1970, and no message takes less than one: so a scheduler that is started again goes on above whatever the one before has
sent.  A router that takes numbers below its own for old ones, or a gap for lost messages, is right with it.  Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

MAX_MESSAGES = 10_000  # that may be asked for again,
MAX_BYTES = 64 << 20  # unless they are larger than this together
Message = tuple[int, bytes]  # sequence number, payload


class Feed:
    """The stream of one publisher.

    `everything`: the payload that tells the present tree, whatever was told before.  `nothing`: one without events.
    """

    def __init__(self, first: int, everything: Callable[[], bytes], nothing: bytes, max_messages: int = MAX_MESSAGES) -> None:
        self.next = first
        self._nothing = nothing
        self._everything = everything
        self._most = max_messages
        self._kept: deque[Message] = deque()
        self._bytes = 0
        self._present: Message | None = None  # the last answer with everything

    def add(self, payload: bytes) -> Message:
        """The next message, which is kept."""
        message = self.next, payload
        self.next += 1
        self._kept.append(message)
        self._bytes += len(payload)
        while len(self._kept) > self._most or self._bytes > MAX_BYTES:
            self._bytes -= len(self._kept.popleft()[1])
        return message

    def renew(self) -> Message:
        """The next message tells everything.  What came before need not be asked for any more, so it is not kept."""
        message = self.next, self._everything()
        self.next += 1
        self._kept.clear()
        self._bytes = 0
        return message

    def since(self, start: int) -> list[Message]:
        """What brings a reader up to date that has everything before `start`.

        Where that is not kept: a message that tells everything, under the number that is asked for, as some readers take no
        other, and one that tells nothing under the last, so that none believes it still lacks what is between them.
        """
        if start >= self.next:
            return []
        if self.keeps(start):
            return [message for message in self._kept if message[0] >= start]
        last = self.next - 1
        if self._present is None or self._present[0] != last:
            self._present = last, self._everything()
        return [(start, self._present[1]), *([(last, self._nothing)] if start < last else [])]

    def keeps(self, start: int) -> bool:
        """Whether `since` has the messages themselves."""
        return start >= self.next or bool(self._kept and self._kept[0][0] <= start)

    def has(self, start: int) -> bool:
        """Whether `since` need not write the whole tree anew."""
        return self.keeps(start) or (self._present is not None and self._present[0] == self.next - 1)
