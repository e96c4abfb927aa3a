"""Whether calibrated codes beat plain rounding on tokens that the solver has not seen.

One run of neighbouring tokens in every HELD_EVERY is kept from all moments. Where too few of those
reached an expert, the held-out tokens of all experts stand in for its own. Knows nothing of how
codes are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llama4q.packing import StoredWeight
from llama4q.products import rough_product

from .target import HELD_OUT, Pair

LONGEST_RUN = 64  # tokens held out together: one alone would resemble its neighbours
HELD_EVERY = 16
RUNS = 64  # at least that many, as long as there are tokens: short texts have shorter runs
LEAST_TOKENS = 32  # fewer held-out tokens than that judge nothing
# On 144 groups of either pocket model 256 tokens tell as 1,024 do: a group's error against
# rounding's within 4 % (1 % where both are close), no judgement another.
MOST_TOKENS = 256


def parts_of(shapes: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Which part each token of batches of `shapes` (S, T) belongs to, flat, int8.

    A half, every other sequence, or HELD_OUT.
    """
    total = sum(sequences * length for sequences, length in shapes)
    longest = min(LONGEST_RUN, max(1, total // RUNS))
    parts, first = [], 0
    for sequences, length in shapes:
        number = torch.arange(first, first + sequences)[:, None]
        run = torch.arange(length)[None] // longest
        held = (run + number) % HELD_EVERY == HELD_EVERY - 1
        parts.append(torch.where(held, HELD_OUT, number % 2).to(torch.int8).flatten())
        first += sequences
    return torch.cat(parts)


def judging(parts: torch.Tensor, stand_in: bool) -> torch.Tensor:
    """The numbers of the tokens that a weight's codes are judged on, at most MOST_TOKENS.

    Held-out ones, evenly spaced. Where they are too few, none if there is a stand-in, else of all.
    """
    held = torch.nonzero(parts == HELD_OUT).squeeze(1)
    if len(held) >= LEAST_TOKENS:
        return spaced(held, MOST_TOKENS)
    return held[:0] if stand_in else spaced(torch.arange(len(parts)), MOST_TOKENS)


def spaced(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of them, evenly spaced."""
    return rows[:: max(1, -(-len(rows) // most))]


class Judge:
    """What codes of a weight are held against: outputs on tokens that no moment has seen.

    Where the weight's own tokens cannot judge, others stand in; None where nobody does.
    """

    def __init__(self, weight: torch.Tensor, own: Pair | None, stand_in: Pair | None) -> None:
        """`weight [I, O]` is the original, in F32."""
        self.own = own
        self.stand_in = stand_in if stand_in is not None and len(stand_in.part) else None
        self.wanted = None if own is None else _wanted(weight, own)

    def error(self, aim: torch.Tensor, found: StoredWeight) -> float | None:
        """The share of the wanted outputs' energy that codes get wrong; None: nobody judges.

        What the original gives is wanted. A stand-in cannot judge what the correction is for: it
        wants what `aim`, the weight that codes were found for, gives. Products have BF16 factors,
        which inputs and original are anyway, and codes when they are served.
        """
        if self.own is not None and self.wanted is not None:
            return _share(self.own, self.wanted, found)
        if self.stand_in is None:
            return None
        other = replace(self.stand_in, original=self.stand_in.served, lacking=None)
        return _share(other, _wanted(aim, other), found)


def _wanted(weight: torch.Tensor, judge: Pair) -> torch.Tensor:
    """What a weight gives, and what the stream lacks besides, F32 `[N, O]`."""
    wanted = rough_product(judge.original, weight)
    return wanted if judge.lacking is None else wanted.add_(judge.lacking)


def _share(judge: Pair, wanted: torch.Tensor, found: StoredWeight) -> float:
    lost = wanted - rough_product(judge.served, found.dequantize())
    weights = wanted.new_ones(len(wanted)) if judge.weights is None else judge.weights
    total = weights @ wanted.square().sum(dim=1)
    return float(weights @ lost.square_().sum(dim=1) / total) if total > 0 else 0.0
