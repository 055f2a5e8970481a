"""The viewer: lives through journals and writes views of them for all who look on, at most ten a second for each.

It takes messages and gives messages, lists of plain values (process.py carries them); every view that it has sent waits for a
`ready` before the next one, so that nothing piles up before a slow reader.

    ["journal", bytes, begins]   ["watch", who, client, text]   ["choose", who, opened, closed, whole]   ["ready", who]
    ["explain", who]   ["leave", who]   ["open", who, path, number]   ["seek", who, place]   ["ask", number, who, what, value]

    ["view", who, json]   ["answer", number, json]   ["again"]: the live journal cannot be followed, it must begin anew
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minisgl.arrays import I32
from minisgl.errors import UserError
from minisgl.journal.replay import Divergence, Replay
from minisgl.journal.witness import Watch, plain
from minisgl.view.scenes import Live, Opened, Scene
from minisgl.view.tree import Choice, tree
from minisgl.view.views import Sight, View, delta, life_of, sections

SECONDS = 0.1  # between two views
SHARE = 10  # a view that takes a second is not made again for so many
_NODE_TOKENS = 400  # whose text is shown
_PREVIEW = 10  # tokens that name a node
_BEFORE = 24  # tokens before a node, for context
_UNTOLD = 20_000  # facts of calls of the machine that wait for somebody who asks why
_TOLD = 1_000  # of a message: the api process reads it between two pieces of everybody's answers
_AT_ONCE = 20_000  # steps of a journal that is opened at its last one; a longer one is opened at its first

Pieces = Callable[[Iterable[int]], list[str]]


@dataclass(slots=True)
class Watcher:
    """Somebody who looks on.  `shown`: the view that it has; `told`: it has facts of steps instead, these wait."""

    sight: Sight
    choice: Choice = field(default_factory=Choice)
    opened: Opened | None = None
    shown: View = field(default_factory=dict)
    anew: bool = True  # the next view is a whole one
    ready: bool = True
    stale: bool = True  # it has asked for something
    calls: int = -1  # of the history, when the view was made
    next: float = 0.0
    next_tree: float = 0.0
    tree: dict[str, Any] = field(default_factory=dict)
    tree_calls: int = -1
    told: deque[dict[str, Any]] | None = None
    facts: int = 0  # in all that waits
    untold: int = 0  # calls that there was no room for

    def when(self, calls: int) -> float:
        """The time of the next view, of a history with so many calls: where the tree alone is old, it waits for the tree."""
        return self.next if self.calls != calls else max(self.next, self.next_tree)


class Viewer:
    """See above.  `pieces`: the texts of tokens, one by one; it waits for the tokenizer, `loaded` says whether it must.

    `model`: the name of the model that the tokenizer is of.
    """

    def __init__(
        self,
        pieces: Pieces,
        now: Callable[[], float] = time.monotonic,
        loaded: Callable[[], bool] = lambda: True,
        model: str = "",
    ) -> None:
        self.live = Live()
        self._pieces, self._now, self._loaded, self._model = pieces, now, loaded, model
        self._watchers: dict[int, Watcher] = {}
        self._trouble = ""
        self._watch_calls, self._plain_call = Watch(), Replay().call
        self.out: list[list[Any]] = []

    # ---------------- messages
    def take(self, kind: str, *values: Any) -> None:
        """A message has come."""
        getattr(self, f"_{kind}")(*values)

    def _journal(self, data: bytes, begins: bool) -> None:
        if self._trouble and not begins:
            return
        try:
            self.live.take(data, begins)
            self._trouble = ""
        except (Divergence, UserError, ValueError, KeyError, IndexError) as e:
            self._trouble = f"{type(e).__name__}: {e}"
            self.out.append(["again"])
        self._tell()
        if begins:
            for watcher in self._watchers.values():
                if watcher.opened is None:
                    self._afresh(watcher)

    def _watch(self, who: int, client: int | None, text: bool) -> None:
        self._watchers[who] = Watcher(Sight(client, text))

    def _choose(self, who: int, opened: list[int], closed: list[int], whole: list[int]) -> None:
        if (watcher := self._watchers.get(who)) is not None:
            watcher.choice, watcher.next_tree, watcher.stale = Choice(*map(frozenset, (opened, closed, whole))), 0.0, True

    def _ready(self, who: int) -> None:
        if (watcher := self._watchers.get(who)) is not None:
            watcher.ready = True

    def _leave(self, who: int) -> None:
        self._watchers.pop(who, None)
        if self.live.call is self._watch_calls and not any(w.told is not None for w in self._watchers.values()):
            self.live.call = self._plain_call
            self._watch_calls.leave()

    def _explain(self, who: int) -> None:
        """Tell somebody the facts of every call of the live machine from now on, with their reasons, instead of views."""
        if (watcher := self._watchers.get(who)) is not None:
            watcher.told = deque()
            self.live.call = self._watch_calls

    def _tell(self) -> None:
        facts, self._watch_calls.steps = self._watch_calls.steps, deque()
        values = [plain(step) for step in facts]
        for watcher in self._watchers.values():
            if watcher.told is not None:
                watcher.told.extend(values)
                watcher.facts += sum(map(_facts, values))
                while watcher.facts > _UNTOLD and len(watcher.told) > 1:
                    watcher.facts -= _facts(watcher.told.popleft())
                    watcher.untold += 1

    def _open(self, who: int, path: str, number: int = 0) -> None:
        """Show a journal of a file.  `number`: answer with its steps, or with what is wrong, which else the stream says."""
        if (watcher := self._watchers.get(who)) is None:
            return
        self._afresh(watcher)
        watcher.opened, trouble = None, ""
        try:
            watcher.opened = Opened(path)
            n = len(watcher.opened.steps)
            trouble = self._go(watcher, watcher.opened, n - 1 if n <= _AT_ONCE else 0)
        except Exception as e:
            trouble = _why(e)
        if watcher.opened is not None and watcher.opened.scene.machine is None:
            watcher.opened = None  # not even its first step
        if number:
            n = len(watcher.opened.steps) if watcher.opened is not None else 0
            self.out.append(["answer", number, _json({"steps": n, "trouble": "" if n else trouble})])
        if trouble and (watcher.opened is not None or not number):
            self._say(who, watcher, {"trouble": trouble, "kept": True})

    @staticmethod
    def _go(watcher: Watcher, opened: Opened, place: int) -> str:
        """Go to a step; returns what is wrong with it, if anything is.  A file may hold anything at all."""
        watcher.stale, watcher.next_tree = True, 0.0
        try:
            opened.seek(place)
            return ""
        except Exception as e:
            return _why(e)

    def _seek(self, who: int, place: int) -> None:
        watcher = self._watchers.get(who)
        if watcher is not None and watcher.opened is not None and (trouble := self._go(watcher, watcher.opened, place)):
            self._say(who, watcher, {"trouble": trouble, "kept": True})

    @staticmethod
    def _afresh(watcher: Watcher) -> None:
        watcher.shown, watcher.tree, watcher.choice = {}, {}, Choice()
        watcher.anew = watcher.stale = True
        watcher.next_tree = 0.0

    def _ask(self, number: int, who: int, what: str, value: int) -> None:
        watcher = self._watchers.get(who)
        scene = self._scene(watcher) if watcher is not None else self.live
        answer = b"null"
        if watcher is not None and scene.machine is not None:
            try:
                found = (self._life if what == "life" else self._node)(scene, watcher.sight, value)
                answer = _json(found, strict=watcher.opened is not None)
            except Exception:  # a file may hold anything at all
                if watcher.opened is None:
                    raise
        self.out.append(["answer", number, answer])

    # ---------------- views
    def _scene(self, watcher: Watcher) -> Scene:
        return watcher.opened.scene if watcher.opened is not None else self.live

    def due(self) -> float:
        """Make the views that are due; returns the seconds until the next may be."""
        wait = 60.0
        for who, watcher in self._watchers.items():
            if watcher.told is not None:
                if watcher.ready and watcher.told:
                    some: list[dict[str, Any]] = []
                    left = _TOLD
                    while watcher.told and (not some or _facts(watcher.told[0]) <= left):
                        some.append(watcher.told.popleft())
                        left -= _facts(some[-1])
                    watcher.facts -= _TOLD - left
                    self._say(who, watcher, {"told": some, "untold": watcher.untold, "began": _began(self.live)})
                    watcher.untold = 0
                continue
            scene = self._scene(watcher)
            calls = scene.history.calls
            if not watcher.ready or (not watcher.stale and watcher.calls == watcher.tree_calls == calls):
                continue
            now = self._now()
            if watcher.stale or now >= watcher.when(calls):
                try:
                    self._view(who, watcher, scene)
                except Exception as e:
                    if watcher.opened is None:
                        raise
                    watcher.opened, watcher.stale = None, True
                    self._say(who, watcher, {"trouble": _why(e), "kept": True})
                watcher.next = now + max(SECONDS, SHARE * (self._now() - now))
            wait = min(wait, max(0.0, watcher.when(calls) - now))
        return wait

    def _view(self, who: int, watcher: Watcher, scene: Scene) -> None:
        if scene.machine is None:
            if self._trouble:
                self._say(who, watcher, {"trouble": self._trouble})
            watcher.stale = False
            return
        machine, history = scene.machine, scene.history
        view = sections(machine, history, watcher.sight)
        began = self._now()
        if began >= watcher.next_tree:
            watcher.tree = tree(machine, history, scene.names, watcher.sight, watcher.choice)
            wanted = self._has_text(watcher.sight, scene)
            if wanted and (loaded := self._loaded()):
                self._preview(scene, watcher.tree)
            watcher.next_tree = began + max(SECONDS, 2 * SHARE * (self._now() - began))
            watcher.tree_calls = history.calls if not wanted or loaded else -1  # the next one has texts
        view["tree"] = watcher.tree
        view["journal"] = self._about(watcher, scene)
        change = delta(watcher.shown, view)
        message: dict[str, Any] = {"view" if watcher.anew else "change": change}
        watcher.shown, watcher.calls = view, history.calls
        watcher.anew = watcher.stale = False
        if change or "view" in message:
            self._say(who, watcher, message)

    def _preview(self, scene: Scene, rows: dict[str, Any]) -> None:
        """Append to the rows of nodes how their text begins."""
        old, scene.previews = scene.previews, {}
        for key, row in rows.items():
            if key.endswith("+"):
                continue
            raw = scene.names.by_name[int(key)].key
            known = key, len(raw)
            text = old.get(known)
            if text is None:
                text = "".join(self._pieces(np.frombuffer(raw, np.int32, min(_PREVIEW, len(raw) // 4)).tolist()))[:40]
            scene.previews[known] = text
            row.append(text)

    def _about(self, watcher: Watcher, scene: Scene) -> dict[str, Any]:
        out: dict[str, Any] = {"hashed": scene.hashed, "text": self._has_text(watcher.sight, scene)}
        out["model"] = str(scene.head.get("model", ""))[:200]
        out["everything"] = watcher.sight.client is None
        if watcher.opened is not None:
            steps = watcher.opened.steps
            out |= {"at": watcher.opened.at, "steps": len(steps), "step": steps[watcher.opened.at][0]}
        return out

    def _has_text(self, sight: Sight, scene: Scene) -> bool:
        """Whether its ids are tokens of the model whose tokenizer is here, and somebody may read them."""
        return sight.text and not scene.hashed and scene.head.get("model", self._model) == self._model

    def _say(self, who: int, watcher: Watcher, message: dict[str, Any]) -> None:
        watcher.ready = False
        self.out.append(["view", who, _json(message, strict=watcher.opened is not None)])

    # ---------------- questions
    def _life(self, scene: Scene, sight: Sight, uid: int) -> Any:
        life = scene.history.find(uid)
        if life is None or scene.machine is None or not sight.of(life):
            return None
        out = life_of(scene.machine, scene.history, life)
        if self._has_text(sight, scene):
            out["prompt_pieces"], out["said_pieces"] = self._pieces(life.prompt.tolist()), self._pieces(life.said)
        return out

    def _node(self, scene: Scene, sight: Sight, name: int) -> Any:
        node = scene.names.by_name.get(name)
        if node is None or str(name) not in self._seen(sight, scene):
            return None
        ids: I32 = np.frombuffer(node.key, np.int32)
        above: I32 = np.zeros(0, np.int32)
        walk = node.parent
        while walk is not None and len(above) < _BEFORE:
            above = np.concatenate([np.frombuffer(walk.key, np.int32), above])
            walk = walk.parent
        out: dict[str, Any] = {"name": name, "tokens": len(ids)}
        if self._has_text(sight, scene):
            out["before"] = "".join(self._pieces(above[-_BEFORE:].tolist()))
            out["pieces"] = self._pieces(ids[:_NODE_TOKENS].tolist())
            out["ids"] = ids[:_NODE_TOKENS].tolist()
        return out

    def _seen(self, sight: Sight, scene: Scene) -> set[str]:
        """The names of nodes that may be asked about: all, or those that were shown to somebody with this sight."""
        if sight.client is None:
            return {str(name) for name in scene.names.by_name}
        return {key for w in self._watchers.values() if w.sight.client == sight.client for key in w.tree}


def _facts(told: dict[str, Any]) -> int:
    """How many facts there are of a call, about: every request in the queue is one."""
    return 1 + len(told["waits"])


def _began(scene: Scene) -> float:
    return float(scene.head.get("time", 0.0))


def _why(e: Exception) -> str:
    """What is wrong with a journal, in words."""
    if isinstance(e, OSError):
        said = f"it cannot be read ({e.strerror})"
    elif isinstance(e, MemoryError):
        said = "it takes more memory than there is for journals"
    elif isinstance(e, Divergence):
        said = f"it can be followed no further: {e}"
    elif type(e) is UserError:
        said = str(e)
    else:
        said = f"it is damaged, or written by another version ({type(e).__name__}: {e})"
    return f"The journal cannot be shown: {said[:500]}"


def _json(value: Any, *, strict: bool = False) -> bytes:
    """strict: raise ValueError for NaN and infinity, which no page can read."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=not strict).encode("utf-8", "replace")
