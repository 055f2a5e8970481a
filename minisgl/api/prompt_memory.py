"""Remembers recent prompts and their answers as one tree over token ids, to say later which of their prefixes were cached.

    root --[system prompt]--+--[question A][answer A]
                            +--[question B]

It is no copy of the prefix cache but what this process knows of it: of every run of tokens, under which salts it was sent, and
how far it is *proven* to have been in the cache.  A prompt is proven by its first token of answer, because its pages are shared
before they are computed; an answer by its end, but for its last token, which is not computed.

A node is a run of tokens, up to where two sequences part: a conversation that goes on lengthens its node.  `enter` costs some
microseconds, about one for a node on the way, and a memcmp of the prompt; a token that is generated costs nothing.  The memory
is bounded: the least recently used leaves go first.  Pure; runs in the api process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

Tag = tuple[str, int]  # the salt of the cache, and the owner of a prompt: nothing of it is shown to others
MEGABYTES = 32
NODE_BYTES, SEEN_BYTES = 340, 100  # of a node and of each `Seen`, without key and shape
LONGEST = 1 << 16  # bytes of a node that is lengthened: each time it is copied
CROWD = 64  # of the tags that have sent a run, so many are asked whether it was in the cache


class Seen:
    """What is known of a node under one tag.

    `proven`: how many of the node's tokens, from the first, were in the cache; `fresh`: in its life number `life`.  `shape`: of
    the conversation that ends here (see Tokenized), b"" for none.  `below`: the child that was used last.
    """

    __slots__ = ("below", "fresh", "life", "proven", "shape")

    def __init__(self) -> None:
        self.proven, self.fresh, self.life, self.shape = 0, 0, 0, b""
        self.below: Node | None = None


class Node:
    """A run of tokens, `key` as i32 bytes, behind those of its parents.  `open`: prompts that end here and have no end yet.

    `name`: what its parent knows it by.  `size`: the bytes of the key, whose last part is joined to it when somebody reads it.
    """

    __slots__ = ("_key", "_more", "children", "name", "open", "parent", "seen", "size")

    def __init__(self, name: bytes, key: bytes, parent: Node | None) -> None:
        self.name = name
        self._key, self._more, self.size = key, b"", len(key)
        self.parent = parent  # None for the root, and for a node that is forgotten
        self.children: dict[bytes, Node] | None = None
        self.open = 0
        self.seen: dict[Tag, Seen] = {}

    @property
    def key(self) -> bytes:
        if self._more:
            self._key, self._more = self._key + self._more, b""
        return self._key

    def lengthen(self, data: bytes) -> None:
        self._key, self._more = self.key, data
        self.size += len(data)

    def cut(self, at: int) -> bytes:
        """Keep what follows the first `at` bytes, and return those."""
        front, self._key = self.key[:at], self.key[at:]
        self.name, self.size = self._key[:4], len(self._key)
        return front

    def is_end_of(self, tag: Tag) -> bool:
        """Whether only sequences of a tag end here, and none goes on or is open: then its next one may lengthen the node."""
        return self.children is None and not self.open and len(self.seen) == 1 and tag in self.seen and self.size < LONGEST


@dataclass(slots=True, eq=False)
class Found:
    """What was known of a prompt when it came, in tokens.

    `common`: the longest prefix that an earlier prompt of the same tag has, with its answer.  `proven`: the longest that was in
    the cache under the same salt, `fresh`: in this life of the cache; `other`: the same under another salt of the same owner.
    `shape`, `theirs`: of the latest prompt with that common prefix, its conversation and its next tokens.
    `end`: the node where the prompt itself ends.
    """

    common: int = 0
    proven: int = 0
    fresh: int = 0
    other: int = 0
    shape: bytes = b""
    theirs: bytes = b""
    end: Node | None = None


class PromptMemory:
    """The tree.  `bytes` is an estimate of what it takes; `forgotten`: it has forgotten a run.

    `apart`: each owner has a tree of its own, in which there is nothing of the others.
    """

    def __init__(self, megabytes: float = MEGABYTES, apart: bool = False) -> None:
        self.root = Node(b"", b"", None)
        self.bytes = 0
        self.forgotten = False
        self._most = int(megabytes * (1 << 20))
        self._apart = apart
        self._order: OrderedDict[Node, None] = OrderedDict()  # least recently used first, a node behind all below it

    def enter(self, data: bytes, tag: Tag, life: int, shape: bytes = b"", show: int = 0) -> Found:
        """A prompt, i32 bytes, has come; returns what was known of it.  `show`: tokens of `theirs`."""
        found = Found()
        node, inside, at = self.root, 0, 0  # `inside`: bytes of the last node that match
        last, last_inside = self.root, 0  # the same for the tag
        mine = in_proven = in_fresh = in_other = True  # so far
        name = data[:4] if not (self._apart and tag[1]) else tag[1].to_bytes(8, "little") + data[:4]
        while node.children is not None and (child := node.children.get(name)) is not None:
            key = child.key
            size = len(key)
            same = size if data.startswith(key, at) else common_bytes(key, data, at)
            node, inside, at, n = child, same, at + same, same // 4
            known = child.seen.get(tag)
            if mine and known is not None:
                found.common += n
                last, last_inside = child, same
            else:
                mine = False
            ever = now = elsewhere = 0
            if known is not None:
                ever, now = known.proven, known.fresh if known.life == life else 0
            if len(child.seen) > (known is not None):
                for (salt, owner), seen in islice(child.seen.items(), CROWD):
                    fresh = seen.fresh if seen.life == life else 0
                    if salt == tag[0]:
                        ever, now = max(ever, seen.proven), max(now, fresh)
                    elif owner == tag[1]:
                        elsewhere = max(elsewhere, fresh)
            if in_proven:
                found.proven, in_proven = found.proven + min(n, ever), ever >= n
            if in_fresh:
                found.fresh, in_fresh = found.fresh + min(n, now), now >= n
            if in_other:
                found.other, in_other = found.other + min(n, elsewhere), elsewhere >= n
            if same < size:
                break
            name = data[at : at + 4]
        if found.common and (show or shape):
            found.shape, found.theirs = _rest(last, last_inside, tag, show)
        if inside < node.size:
            node, name = self._split(node, inside), data[at : at + 4]
        found.end = self._grow(node, name, data[at:], tag, shape)
        found.end.open += 1
        return found

    def extend(self, end: Node, data: bytes, tag: Tag, life: int) -> None:
        """The answer to the prompt that ends in `end` is complete: its tokens, i32 bytes.  Called once for every `enter`."""
        end.open -= 1
        if end.parent is None or tag not in end.seen or not data:
            return
        if end.is_end_of(tag):  # nearly always; the node was used when the prompt came, which is late enough
            end.lengthen(data)
            self.bytes += len(data)
            self._shrink()
            self.prove(end, tag, life, but=1)
            return
        shape, node, inside, at, name = end.seen[tag].shape, end, end.size, 0, data[:4]
        while node.children is not None and (child := node.children.get(name)) is not None:
            key = child.key
            same = len(key) if data.startswith(key, at) else common_bytes(key, data, at)
            node, inside, at = child, same, at + same
            name = data[at : at + 4]
            if same < len(key):
                break
        if inside < node.size:
            node = self._split(node, inside)
        last = self._grow(node, name, data[at:], tag, shape)
        self.prove(last, tag, life, but=1)

    def prove(self, end: Node, tag: Tag, life: int, but: int = 0) -> None:
        """All tokens up to the end of a node, `but` the last ones of it, are in the cache now."""
        node: Node | None = end
        while node is not None and node.parent is not None:
            proven = node.size // 4 - but
            if (seen := node.seen.get(tag)) is not None:
                if seen.life == life and seen.fresh >= proven and not but:
                    return  # and all above it
                seen.proven = max(seen.proven, proven)
                seen.fresh, seen.life = max(seen.fresh, proven) if seen.life == life else proven, life
            node, but = node.parent, 0

    def _grow(self, node: Node, name: bytes, rest: bytes, tag: Tag, shape: bytes) -> Node:
        """Add what is left of a sequence below a node; all on its way is used now.  Returns its last node."""
        if rest and node.is_end_of(tag):  # nearly always: a conversation goes on
            node.lengthen(rest)
            self.bytes += len(rest)
        elif rest:
            leaf = Node(name, rest, node)
            if node.children is None:
                node.children = {}
            node.children[name] = leaf
            self.bytes += NODE_BYTES + len(rest)
            self._order[leaf] = None
            node = leaf
        walk, below, order = node, None, self._order
        while walk.parent is not None:
            if (seen := walk.seen.get(tag)) is None:
                seen = walk.seen[tag] = Seen()
                self.bytes += SEEN_BYTES
            if below is not None:
                seen.below = below
            order.move_to_end(walk)
            walk, below = walk.parent, walk
        if shape and node.parent is not None:
            seen = node.seen[tag]
            self.bytes += len(shape) - len(seen.shape)
            seen.shape = shape
        self._shrink()
        return node

    def _split(self, node: Node, cut: int) -> Node:
        """Cut a node after `cut` bytes.  Returns the new front; the node keeps its end."""
        parent = node.parent
        assert parent is not None
        assert parent.children is not None
        front = Node(node.name, node.cut(cut), parent)
        for tag, seen in node.seen.items():
            half = front.seen[tag] = Seen()
            half.life, half.below = seen.life, node
            half.proven, half.fresh = min(seen.proven, cut // 4), min(seen.fresh, cut // 4)
            if (above := parent.seen.get(tag)) is not None and above.below is node:
                above.below = front
            seen.proven, seen.fresh = max(0, seen.proven - cut // 4), max(0, seen.fresh - cut // 4)
        parent.children[front.name] = front
        front.children = {node.name: node}
        node.parent = front
        self.bytes += NODE_BYTES + SEEN_BYTES * len(front.seen)
        self._order[front] = None  # behind the node; it is used at once
        return front

    def _shrink(self) -> None:
        while self.bytes > self._most and self._order:
            self._forget(next(iter(self._order)))

    def _forget(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None
        assert parent.children is not None
        self.forgotten = True
        self.bytes -= NODE_BYTES + leaf.size + sum(SEEN_BYTES + len(s.shape) for s in leaf.seen.values())
        del parent.children[leaf.name]
        del self._order[leaf]
        leaf.parent = None
        if not parent.children:
            parent.children = None

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root, for checks."""
        stack = [self.root]
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend((node.children or {}).values())


def common_bytes(key: bytes, data: bytes, at: int = 0) -> int:
    """How many bytes of `key`, in whole tokens of 4, equal `data` from `at` on."""
    low, high = 0, min(len(key), len(data) - at) // 4
    while low < high:  # halves: each byte is compared about once, by memcmp
        middle = (low + high + 1) // 2
        if data.startswith(key[4 * low : 4 * middle], at + 4 * low):
            low = middle
        else:
            high = middle - 1
    return 4 * low


def _rest(node: Node, inside: int, tag: Tag, show: int) -> tuple[bytes, bytes]:
    """(shape, next tokens) of the latest prompt of a tag that goes on behind this place, or ends there."""
    need, below, seen = 4 * show, _below(node, tag), node.seen[tag]
    rest = node.key[inside : inside + need]
    shape = seen.shape if inside < node.size or below is None else b""
    while below is not None and (not shape or len(rest) < need):
        if len(rest) < need:
            rest += below.key[: need - len(rest)]
        shape = shape or below.seen[tag].shape
        below = _below(below, tag)
    return shape, rest


def _below(node: Node, tag: Tag) -> Node | None:
    """The child that was used last under a tag."""
    below = node.seen[tag].below
    return below if below is not None and below.parent is node else None
