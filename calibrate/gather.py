"""One pass over the tokens that reach a linear, and all that is kept of it.

Moments of both halves; some rows, for the spread that shrinkage asks for; some tokens to judge by.
They come in pieces, so that they need not all be in memory, and leaf by leaf, so that ranks may
share them. Knows nothing of codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .judge import judging, spaced
from .leaves import Share
from .target import HELD_OUT, Moments, Pair, Sums, concatenated

MOST_ROWS = 8192  # kept for the mean of |x|^4


@dataclass(frozen=True)
class Gathered:
    """What the tokens told."""

    halves: tuple[Moments, Moments] | None  # None: nobody asked
    rows: torch.Tensor | None  # [n, I], evenly spaced over the tokens that moments saw
    judge: Pair | None  # None: no token is fit to judge


@dataclass(frozen=True)
class Leaf:
    """What is kept of some neighbouring tokens."""

    sums: list[Sums | None]  # of each half; empty where nobody asked
    rows: list[torch.Tensor]
    judges: list[Pair]

    def add_to(self, halves: Sequence[Moments]) -> None:
        for moments, sums in zip(halves, self.sums, strict=True):
            moments.take(sums)


def gather(
    piece: Callable[[int], Pair],
    share: Share,
    halves: tuple[Moments, Moments] | None,
    stand_in: bool,
) -> Gathered:
    """Go through all tokens of a weight once: those of this rank are `piece(0)`, `piece(1)`, ...

    `halves` are added to. With a `stand_in` for too few held-out tokens, others do not judge.
    Only the first of the share's ranks gets what all tokens told.
    """
    rows: list[torch.Tensor] = []
    judges: list[Pair] = []
    for leaf in share.ranks.to_first(_leaves(piece, share, halves, stand_in)):
        leaf.add_to(halves or ())
        rows += leaf.rows
        judges += leaf.judges
        del leaf  # the next one needs the room
    if not share.ranks.first:
        return Gathered(None, None, None)
    joined = torch.cat(rows) if rows else None
    if halves is not None:
        unit = sum(half.total for half in halves) / max(1, sum(half.tokens for half in halves))
        for moments in halves:
            moments.to_means(unit)
        if joined is not None and unit:
            joined.div_(unit**0.5)
    judge = concatenated(judges) if sum(len(pair.part) for pair in judges) else None
    return Gathered(halves, joined, judge)


def _leaves(
    piece: Callable[[int], Pair],
    share: Share,
    halves: tuple[Moments, Moments] | None,
    stand_in: bool,
) -> Iterator[Leaf]:
    """This rank's tokens, leaf by leaf."""
    parts = share.parts
    sampled = marked(spaced(torch.nonzero(parts != HELD_OUT).squeeze(1), MOST_ROWS), len(parts))
    judged = marked(judging(parts, stand_in), len(parts))
    start = share.start
    for numbers in share.leaves:
        moments = [half.another() for half in halves or ()]
        rows: list[torch.Tensor] = []
        judges: list[Pair] = []
        for number in numbers:
            pair = piece(number)
            here = slice(start, start := start + len(pair.part))
            judges.append(pair.rows(_which(judged[here])))
            for half, own in enumerate(moments):
                own.add(pair.rows(_which(pair.part == half)))
            if moments:
                some = pair.rows(_which(sampled[here])).batch().served
                rows.append(some.to(pair.served.dtype))
        yield Leaf([own.sums for own in moments], rows, judges)


def marked(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Row numbers as a mask `[count]`."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[rows] = True
    return mask


def _which(mask: torch.Tensor) -> torch.Tensor:
    return torch.nonzero(mask).squeeze(1)
