"""One pass over the tokens that reach a linear, and all that is kept of it.

Moments of both halves; some rows, for the spread that shrinkage asks for; some tokens to judge by.
They come in pieces, so that they need not all be in memory. Knows nothing of codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .judge import judging, spaced
from .target import HALVES, HELD_OUT, Moments, Pair

MOST_ROWS = 8192  # kept for the mean of |x|^4


@dataclass(frozen=True)
class Gathered:
    """What the tokens told."""

    halves: tuple[Moments, Moments] | None  # None: nobody asked
    rows: torch.Tensor | None  # [n, I], evenly spaced over the tokens that moments saw
    judge: Pair | None  # None: no token is fit to judge


def gather(
    pieces: Iterable[Pair],
    parts: torch.Tensor,
    halves: tuple[Moments, Moments] | None,
    stand_in: bool,
) -> Gathered:
    """Go through all tokens once; `parts [N]` says which part of the text each belongs to.

    `halves` are added to. With a `stand_in` for too few held-out tokens, others do not judge.
    """
    sampled = marked(spaced(torch.nonzero(parts != HELD_OUT).squeeze(1), MOST_ROWS), len(parts))
    judged = marked(judging(parts, stand_in), len(parts))
    rows: list[torch.Tensor] = []
    judges: list[Pair] = []
    start = 0
    for piece in pieces:
        here = slice(start, start := start + len(piece.part))
        judges.append(piece.rows(_which(judged[here])))
        if halves is not None:
            for half, moments in zip(HALVES, halves, strict=True):
                moments.add(piece.rows(_which(piece.part == half)))
            some = piece.rows(_which(sampled[here])).batch().served
            rows.append(some.to(piece.served.dtype))
    joined = torch.cat(rows) if rows else None
    if halves is not None:
        unit = sum(half.total for half in halves) / max(1, sum(half.tokens for half in halves))
        for moments in halves:
            moments.to_means(unit)
        if joined is not None and unit:
            joined.div_(unit**0.5)
    return Gathered(halves, joined, _joined(judges))


def marked(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Row numbers as a mask `[count]`."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[rows] = True
    return mask


def _which(mask: torch.Tensor) -> torch.Tensor:
    return torch.nonzero(mask).squeeze(1)


def _joined(pairs: list[Pair]) -> Pair | None:
    """All of them as one; None when there is no token."""
    if not sum(len(pair.part) for pair in pairs):
        return None
    lacking = [pair.lacking for pair in pairs if pair.lacking is not None]
    weights = [pair.weights for pair in pairs if pair.weights is not None]
    return Pair(
        torch.cat([pair.served for pair in pairs]),
        torch.cat([pair.original for pair in pairs]),
        torch.cat(lacking) if lacking else None,
        torch.cat([pair.part for pair in pairs]),
        torch.cat(weights) if weights else None,
    )
