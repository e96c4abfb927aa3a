"""Where a value lies on an axis, and which values are named there. Knows nothing of drawing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, even in the value or in its logarithm."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """The share of the way from low to high, 0 to 1; the nearer end for what is beyond."""
        if value <= self.low:
            return 0.0
        low, high, there = map(self._even, (self.low, self.high, min(value, self.high)))
        return (there - low) / (high - low)

    def ticks(self, most: int = 6) -> list[float]:
        """At most `most` round values."""
        return self._decades(most) if self.log else self._steps(most)

    def _even(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def _decades(self, most: int) -> list[float]:
        first = math.ceil(math.log10(self.low) - 1e-9)
        last = math.floor(math.log10(self.high) + 1e-9)
        every = max(1, math.ceil((last - first + 1) / most))
        between = (1, 2, 5) if last - first < 2 else (1,)
        found = [10.0**power * step for power in range(first, last + 1, every) for step in between]
        return [value for value in found if value <= self.high * (1 + 1e-9)]

    def _steps(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(step * unit for step in (1, 2, 5, 10, 20) if step * unit >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [step * number for number in range(first, last + 1)]


def logarithmic(values: Iterable[float]) -> Axis:
    """Whole decades around all values above 0."""
    shown = [value for value in values if value > 0 and math.isfinite(value)] or [1.0]
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    return Axis(10.0**low, 10.0 ** max(high, low + 1), log=True)


def around(values: Iterable[float], middle: float) -> Axis:
    """As far to both sides of `middle` as the farthest value, at least a hundredth."""
    shown = [abs(value - middle) for value in values if math.isfinite(value)]
    room = 1.1 * max(0.01, *shown) if shown else 0.01
    return Axis(middle - room, middle + room)


def numbered(numbers: Iterable[int]) -> Axis:
    """Whole numbers, such as those of layers, with room for half a step at both ends."""
    shown = list(numbers) or [0]
    return Axis(min(shown) - 0.5, max(shown) + 0.5)


def whole_ticks(axis: Axis, most: int = 8) -> list[int]:
    """At most `most` whole numbers of a `numbered` axis, in steps of 1, 2, 4 or 8 and so on."""
    first, last = math.ceil(axis.low), math.floor(axis.high)
    step = 1
    while (last - first) // step >= most:
        step *= 2
    return [number for number in range(first, last + 1) if number % step == 0]


def named(value: float) -> str:
    """A tick's label: 0.01, 5, 1,000, 10⁻⁶."""
    if value and not 1e-3 <= abs(value) < 1e5:
        power = math.floor(math.log10(abs(value)) + 1e-9)
        if math.isclose(value, 10.0**power):
            return f"10{str(power).translate(_SUPERSCRIPT)}"
    return f"{value:,.6g}"
