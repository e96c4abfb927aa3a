"""The figures of a report as people read them: found, and written as a few characters.

Knows nothing of terminals or pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MINUS = "−"
UNKNOWN = "?"


def part(report: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The object at `keys`; empty where the report has none."""
    found: Mapping[str, Any] = report
    for key in keys:
        found = found.get(key) or {}
    return found


def count(value: int | None) -> str:
    """1,234,567"""
    return UNKNOWN if value is None else f"{value:,}"


def percent(share: float, decimals: int) -> str:
    """93.56 % of a share of 0.9356."""
    return f"{100 * share:.{decimals}f} %"


def size(nbytes: float) -> str:
    """Bytes in decimal units: 1 GB is 10^9 bytes."""
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.2f} MB"


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant ones, without an exponent where that is readable: 0.00113, 24,600."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}".replace("-", MINUS)


def signed(value: float, decimals: int) -> str:
    """With its sign, but for what rounds to 0: +1.2, −0.3, 0.0."""
    shown = f"{value:+.{decimals}f}"
    return shown[1:] if not float(shown) else shown.replace("-", MINUS)


def length(tokens: int) -> str:
    """Tokens of a text as people name them: 512, 8k, 1M."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}"


def no_difference(interval: Sequence[float] | None) -> bool:
    """Whether a 95 % interval of a difference holds 0."""
    return interval is not None and interval[0] <= 0 <= interval[1]
