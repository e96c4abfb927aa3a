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


def pooled(cells: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Original's and quantized's share of right answers over all prompts of the cells."""
    prompts = sum(cell["prompts"] for cell in cells)
    original, quantized = (
        sum(cell[side] * cell["prompts"] for cell in cells) / prompts
        for side in ("original", "quantized")
    )
    return original, quantized


def ends(difference: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval of a paired difference."""
    low, high = difference.get("low"), difference.get("high")
    return None if low is None or high is None else (low, high)


def drawn(calibration: Mapping[str, Any]) -> str:
    """The calibration tokens: a text and its samples, or those of each text of a mix."""
    mix = calibration.get("mix") or []
    if len(mix) > 1:
        texts = [
            f"{text['source']} {percent(text['share'], 1)} in {_samples(text)}" for text in mix
        ]
    else:
        texts = [str(calibration.get("source", UNKNOWN)), _samples(mix[0] if mix else calibration)]
    return ", ".join([*texts, f"seed {calibration.get('seed', UNKNOWN)}"])


def _samples(text: Mapping[str, Any]) -> str:
    return f"{count(text.get('samples'))} samples of {count(text.get('length'))} tokens"


def measured(likelihood: Mapping[str, Any]) -> str:
    """Which tokens both models read."""
    name = f"{likelihood['text']}, " if likelihood.get("text") else ""
    stride = f", stride {count(likelihood['stride'])}" if likelihood.get("stride") else ""
    return (
        f"{name}{count(likelihood.get('tokens'))} tokens in {count(likelihood.get('windows'))} "
        f"windows{stride}"
    )


def cards(fit: Mapping[str, Any]) -> str:
    """The GPUs of a fit line: one H100-80GB, 4 × H100-80GB."""
    device, number = str(fit.get("device", UNKNOWN)).upper(), fit.get("cards", 1)
    return f"one {device}" if number == 1 else f"{number} × {device}"


def requests(fit: Mapping[str, Any]) -> str:
    """What they are to serve: a context of 8,192 tokens, 4 requests of 8,192 tokens."""
    tokens, number = f"{count(fit.get('context'))} tokens", fit.get("concurrency", 1)
    return f"a context of {tokens}" if number == 1 else f"{number} requests of {tokens}"


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
