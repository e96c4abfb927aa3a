"""When a run will be done: planned seconds, corrected by what finished units took.

A plan compares units well and the machine badly: what it leaves out, and how much slower than their
rates products are, is nearly the same factor for all layers of one kind. So each kind learns its
own. Knows nothing of what units do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Planned:
    """One unit; where its like has not been seen, its network's factor stands in, then any."""

    network: str
    schemes: str
    seconds: float

    def likenesses(self) -> Iterator[tuple[str, ...]]:
        """From the closest to the widest."""
        yield self.network, self.schemes
        yield (self.network,)
        yield ()


class Eta:
    """Seconds that are left, told which units are done; `guess` is the factor before any is."""

    def __init__(self, units: Sequence[Planned], guess: float = 1.0) -> None:
        self._waiting = list(reversed(units))
        self._guess = guess
        self._planned: dict[tuple[str, ...], float] = {}
        self._taken: dict[tuple[str, ...], float] = {}

    @property
    def learned(self) -> bool:
        """Whether any unit's time is known."""
        return bool(self._taken)

    def finished(self, seconds: float) -> None:
        """The next unit is done."""
        unit = self._waiting.pop()
        for likeness in unit.likenesses():
            self._planned[likeness] = self._planned.get(likeness, 0.0) + unit.seconds
            self._taken[likeness] = self._taken.get(likeness, 0.0) + seconds

    def replayed(self) -> None:
        """The next unit was done by an earlier run: its time says nothing of the others'."""
        self._waiting.pop()

    def remaining(self, spent: float = 0.0) -> float:
        """Seconds; `spent` of them have gone since the present unit began."""
        expected = [unit.seconds * self._factor(unit) for unit in self._waiting]
        return sum(expected) - min(spent, expected[-1]) if expected else 0.0

    def _factor(self, unit: Planned) -> float:
        for likeness in unit.likenesses():
            if self._planned.get(likeness):
                return self._taken[likeness] / self._planned[likeness]
        return self._guess
