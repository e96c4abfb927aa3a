"""Where in a text two models differ most, in words that a person can read.

Knows nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .likelihood import Window

Decode = Callable[[list[int]], str]

AROUND = 40  # tokens shown before and after
MOST = 20  # passages


def worst(
    windows: Sequence[Window], tokens: Sequence[torch.Tensor], decode: Decode
) -> list[dict[str, Any]]:
    """The tokens at which the models' predictions are furthest apart, JSON for the report.

    `tokens` are those of each window, `[T]`, of which the window scores the last ones. Where one
    passage holds several, the worst stands for it.
    """
    found: list[tuple[int, int]] = []  # window, position in its tokens
    for window, position in _ranked(windows, tokens):
        if len(found) == MOST:
            break
        if all(window != other or abs(position - place) > AROUND for other, place in found):
            found.append((window, position))
    return [_passage(windows[at], at, tokens[at], position, decode) for at, position in found]


def _ranked(windows: Sequence[Window], tokens: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Enough of the worst tokens, the worst first."""
    divergence = torch.cat([window.divergence for window in windows])
    places = [
        (number, len(whole) - len(window.divergence) + step)
        for number, (window, whole) in enumerate(zip(windows, tokens, strict=True))
        for step in range(len(window.divergence))
    ]
    enough = min(len(divergence), MOST * (2 * AROUND + 1))
    order = divergence.sort(descending=True, stable=True).indices[:enough]
    return [places[rank] for rank in order.tolist()]


def _passage(
    window: Window, number: int, tokens: torch.Tensor, position: int, decode: Decode
) -> dict[str, Any]:
    step = position - (len(tokens) - len(window.divergence))
    ids = tokens.tolist()
    return {
        "kl": float(window.divergence[step]),
        "window": number,
        "position": position,
        "before": decode(ids[max(0, position - AROUND) : position]),
        "token": decode(ids[position : position + 1]),
        "after": decode(ids[position + 1 : position + 1 + AROUND]),
        "original": decode([int(window.original_choice[step])]),
        "quantized": decode([int(window.quantized_choice[step])]),
    }
