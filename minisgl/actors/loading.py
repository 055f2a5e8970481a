"""Shows how far the loading of a model is: a bar on a terminal, elsewhere a line every few seconds.  Runs in worker 0."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from minisgl.logs import LOADING, on_terminal, say

SECONDS = 5.0  # between two lines
_DELAY = 1.0  # what takes less has no bar


class LoadingLines:
    """The observer for logs (see minisgl.model.checkpoint.progress): nothing is said of what takes less than SECONDS."""

    def __init__(self, name: str, layers: int, now: Callable[[], float] = time.monotonic) -> None:
        self._name, self._layers, self._now = name, layers, now
        self._began = self._told = now()

    def __call__(self, done: int) -> None:
        now = self._now()
        if done < self._layers and now - self._told < SECONDS:
            return
        if done == self._layers and self._told == self._began:
            return
        self._told, seconds = now, now - self._began
        share = f"{100 * done // max(self._layers, 1)} %"
        text = f"loading {self._name}: {share}, {done} of {self._layers} layers in {seconds:.0f} s"
        say(LOADING, f"minisgl: {text}", layers=self._layers, loaded=done, seconds=round(seconds, 1))


class LoadingBar:
    """The observer for terminals."""

    def __init__(self, name: str, layers: int) -> None:
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())  # its own lock is one of several processes, which a process that is killed leaves
        self._layers = layers
        self._bar: tqdm[None] = tqdm(
            total=layers, desc=f"loading {name}", unit="layer", file=sys.stderr, delay=_DELAY, leave=False, dynamic_ncols=True
        )

    def __call__(self, done: int) -> None:
        self._bar.update(done - self._bar.n)
        if done == self._layers:
            self._bar.close()


def show_loading(name: str, layers: int, log_format: str) -> Callable[[int], None]:
    """The observer for this process's stderr."""
    bar = log_format == "text" and on_terminal(sys.stderr)
    return LoadingBar(name, layers) if bar else LoadingLines(name, layers)
