"""Which scheme each part of a model gets, so that all fit a number of bytes with the least error.

A multiple-choice knapsack: of every part's options one is taken. It is an integer programme, which
HiGHS solves (scipy's `milp`). Knows nothing of what a part is, nor where errors come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from llama4q.weights import Component

GAP = 1e-4  # of the least error: near enough
STEPS = 24  # of the frontier


@dataclass(frozen=True)
class Option:
    """A scheme that a part may have."""

    scheme: str
    nbytes: int
    error: float  # that it adds


@dataclass(frozen=True)
class Part:
    """One component of one layer, and what may become of it."""

    layer: int
    component: Component
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Mix:
    """One option for each part, in their order."""

    options: tuple[Option, ...]

    @property
    def nbytes(self) -> int:
        return sum(option.nbytes for option in self.options)

    @property
    def error(self) -> float:
        return sum(option.error for option in self.options)


def smallest(parts: Sequence[Part]) -> Mix:
    """The fewest bytes that there can be; the least error among those."""
    return Mix(tuple(min(part.options, key=lambda one: (one.nbytes, one.error)) for part in parts))


def best(parts: Sequence[Part], room: int) -> Mix | None:
    """The mix of at most `room` bytes with the least error; None when no mix is so small."""
    if smallest(parts).nbytes > room:
        return None
    limit = room
    while (mix := _solved(parts, limit)).nbytes > room:  # by what HiGHS takes for nothing
        limit -= mix.nbytes - room
    return mix


def _solved(parts: Sequence[Part], room: int) -> Mix:
    """The same, but for a millionth of the room."""
    every = [option for part in parts for option in part.options]
    errors = np.array([option.error for option in every])
    sizes = np.array([[option.nbytes for option in every]]) / room
    numbers = np.repeat(np.arange(len(parts)), [len(part.options) for part in parts])
    one_each = csr_array((np.ones(len(every)), (numbers, np.arange(len(every)))))
    found = milp(
        errors / (errors.max() or 1.0),
        integrality=np.ones(len(every)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes, 0, 1)],
        options={"mip_rel_gap": GAP},
    )
    assert found.x is not None, found.message
    mix = Mix(tuple(one for one, taken in zip(every, found.x, strict=True) if taken > 0.5))
    assert len(mix.options) == len(parts), found.message
    return mix


def frontier(parts: Sequence[Part]) -> list[Mix]:
    """The best mixes for rooms in equal steps, from the smallest to the one of least error."""
    least = smallest(parts).nbytes
    most = sum(min(part.options, key=lambda one: one.error).nbytes for part in parts)
    found = [best(parts, least + (most - least) * step // STEPS) for step in range(STEPS + 1)]
    return [mix for mix in found if mix is not None]
