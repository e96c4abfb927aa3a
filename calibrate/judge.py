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

from .target import HELD_OUT, Pair

LONGEST_RUN = 64  # tokens held out together: one alone would resemble its neighbours
HELD_EVERY = 16
RUNS = 64  # at least that many, as long as there are tokens: short texts have shorter runs
LEAST_TOKENS = 32  # fewer held-out tokens than that judge nothing
MOST_TOKENS = 1024  # that the judgement is made on


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


def error(
    weight: torch.Tensor,
    aim: torch.Tensor,
    found: StoredWeight,
    judge: Pair | None,
    stand_in: Pair | None,
) -> float | None:
    """The share of the wanted output's energy that codes get wrong, on tokens not seen.

    What the original gives is wanted. Where a weight's own tokens cannot judge, it is what `aim`,
    the weight that codes were found for, gives on the stand-in's: other tokens cannot judge the
    correction that it holds. None where there is nobody to judge.
    """
    if judge is not None:
        return _error(weight, found, judge)
    if stand_in is not None and len(stand_in.part):
        return _error(aim, found, replace(stand_in, original=stand_in.served, lacking=None))
    return None


def _error(weight: torch.Tensor, found: StoredWeight, judge: Pair) -> float:
    batch = judge.batch()
    wanted = batch.original @ weight
    if batch.lacking is not None:
        wanted = wanted + batch.lacking
    total = wanted.square().sum()
    wrong = (wanted - batch.served @ found.dequantize()).square().sum()
    return float(wrong / total) if total > 0 else 0.0
