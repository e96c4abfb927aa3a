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


def matched(lost: float, gained: float, count: float) -> Interval:
    """Of the change of a share, -1 to 1, between two models' answers to the same `count` prompts.

    `lost` of them only the first one got right, `gained` only the second one. Wald's interval with
    half a prompt more in each cell, so that answers which never changed do not claim that none ever
    will (Agresti and Min, Statistics in Medicine 24, 2005).
    """
    whole, changed = count + 2, lost + gained + 1
    change = (gained - lost) / whole
    half = Z * math.sqrt(changed - whole * change**2) / whole
    return max(-1.0, change - half), min(1.0, change + half)
