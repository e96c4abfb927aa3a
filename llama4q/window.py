"""Which files lie on the disk while they are gone through in order: a few ahead, none behind.

A thread fetches them in the order in which they are needed, as far as a number of bytes allows that
is known beforehand. Knows nothing of the Hub, of tensors or of layers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from .stopping import stop_if_asked

AHEAD = 2  # steps whose files may be there beside those of the step at work
POLL = 0.2  # seconds between two looks at whether to stop


@dataclass(frozen=True)
class Schedule:
    """In which order files are needed, for how long, and how many bytes are there at most."""

    first: Mapping[str, int]  # file -> the step that needs it first, in that order
    last: Mapping[str, int]  # the step after which nobody needs it
    most: int  # bytes

    def needed(self, step: int) -> set[str]:
        """The files that may be there during a step."""
        return {
            name
            for name, first in self.first.items()
            if first <= step + AHEAD and self.last[name] >= step
        }


def schedule(steps: Sequence[Collection[str]], sizes: Mapping[str, int]) -> Schedule:
    """Of the files that each step needs, and the bytes of each."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for step, names in enumerate(steps):
        for name in sorted(names):
            first.setdefault(name, step)
            last[name] = step
    found = Schedule(first, last, 0)
    held = (sum(sizes[name] for name in found.needed(step)) for step in range(len(steps)))
    return Schedule(first, last, max(held))


class Window:
    """The files that are there now. `fetch` and `drop` get and remove one by its name."""

    def __init__(
        self,
        plan: Schedule,
        sizes: Mapping[str, int],
        fetch: Callable[[str], None],
        drop: Callable[[str], None],
    ) -> None:
        self.plan, self.sizes = plan, sizes
        self._fetch, self._drop = fetch, drop
        self._step = 0
        self._here: set[str] = set()  # and the one that is coming
        self._ready: set[str] = set()
        self._problem: BaseException | None = None
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="window", daemon=True)
        self._thread.start()

    @property
    def held(self) -> int:
        """Bytes of the files that are there or coming."""
        return sum(self.sizes[name] for name in self._here)

    def need(self, name: str) -> float:
        """Returns when the file is there: the seconds until it was. Raises what its fetching
        raised."""
        began = time.monotonic()
        with self._changed:
            if self._step > self.plan.last[name]:
                raise AssertionError(f"{name} is needed after step {self.plan.last[name]}")
            while name not in self._ready:
                if self._problem is not None:
                    raise self._problem
                self._changed.wait(POLL)
                stop_if_asked()
        return time.monotonic() - began

    def passed(self, step: int) -> None:
        """The steps up to this one are done: files that only they needed go."""
        with self._changed:
            self._step = step + 1
            gone = {name for name in self._ready if self.plan.last[name] <= step}
        for name in sorted(gone):
            self._drop(name)
        with self._changed:
            self._here -= gone
            self._ready -= gone
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing more is fetched; what is on its way is not waited for."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            for name in self.plan.first:
                if not self._may_come(name):
                    return
                self._fetch(name)
                with self._changed:
                    self._ready.add(name)
                    self._changed.notify_all()
        except BaseException as problem:  # for whoever needs the file
            with self._changed:
                self._problem = problem
                self._changed.notify_all()

    def _may_come(self, name: str) -> bool:
        """Waits until there is room for it; whether it is still wanted."""
        with self._changed:
            while self.held + self.sizes[name] > self.plan.most:
                if self._ended:
                    return False
                self._changed.wait()
            self._here.add(name)
            return not self._ended
