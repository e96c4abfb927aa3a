"""The figures of a report as people read them: found, and written as a few characters.

Knows nothing of terminals or pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MINUS = "−"
UNKNOWN = "?"


def part(report: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The object at `keys`; empty where the report has none."""
    found: Mapping[str, Any] = report
    for key in keys:
        found = found.get(key) or {}
    return found


def pooled(cells: Iterable[Mapping[str, Any]]) -> tuple[float, float] | None:
    """The original's and the quantized model's share over all prompts of cells; None without."""
    held = [cell for cell in cells if cell.get("prompts")]
    prompts = sum(cell["prompts"] for cell in held)
    if not prompts:
        return None
    original, quantized = (
        sum(cell[side] * cell["prompts"] for cell in held) / prompts
        for side in ("original", "quantized")
    )
    return original, quantized


def ends(difference: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval of a paired difference."""
    low, high = difference.get("low"), difference.get("high")
    return None if low is None or high is None else (low, high)


def drawn(calibration: Mapping[str, Any]) -> str:
    """Which calibration tokens: a text and its samples, or those of each text of a mix."""
    parts = calibration.get("mix") or [calibration]
    texts = [
        f"{text.get('source')}"
        + (f" {percent(text['share'], 0)}" if len(parts) > 1 else "")
        + f", {count(text.get('samples'))} samples of {count(text.get('length'))} tokens"
        for text in parts
    ]
    return "; ".join([*texts, f"seed {calibration.get('seed')}"])


def measured(likelihood: Mapping[str, Any]) -> str:
    """Which tokens both models read."""
    name = f"{likelihood['text']}, " if likelihood.get("text") else ""
    stride = f", stride {count(likelihood['stride'])}" if likelihood.get("stride") else ""
    return (
        f"{name}{count(likelihood.get('tokens'))} tokens in {count(likelihood.get('windows'))} "
        f"windows{stride}"
    )


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
