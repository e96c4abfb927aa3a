"""Shares of prompts with their 95 % intervals, from counts alone.

Knows nothing of reports or of what was asked.
"""

from __future__ import annotations

import math

Z = 1.959964  # standard normal deviate of a two-sided 95 % interval

Interval = tuple[float, float]


def wilson(share: float, count: float) -> Interval:
    """Of a share of `count` > 0 prompts, 0 to 1 (Wilson, JASA 22, 1927)."""
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2)) / (1 + Z**2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def difference(share: float, other: float, count: float) -> Interval:
    """Of `share - other`, -1 to 1, where how the prompts pair up is not known.

    Two independent samples (Newcombe, Statistics in Medicine 17, 1998, method 10). Answers to the
    same prompts mostly go together, which would make the interval narrower: it errs to the wide.
    """
    low, high = wilson(share, count)
    other_low, other_high = wilson(other, count)
    below = math.hypot(share - low, other_high - other)
    above = math.hypot(high - share, other - other_low)
    return share - other - below, share - other + above
