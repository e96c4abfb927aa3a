"""In which order calibration sequences travel, and which rank takes which.

They are dealt into LEAVES, as cards are, and travel leaf after leaf; a rank takes neighbouring
leaves. No batch mixes leaves, and sums over all tokens are made leaf by leaf and then added up, so
that any number of ranks has the same products and the same sums to the last bit. Knows nothing of
what is computed.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llama4q.errors import UserError
from llama4q.ranks import ALONE, Ranks

from .judge import parts_of

LEAVES = 8  # even: a leaf is in one half of the sequences. As many ranks may share the text


@dataclass(frozen=True)
class Dealt:
    """What one rank has of the calibration text, and what all of it is."""

    batches: list[torch.Tensor]  # [S, T] each, leaf after leaf
    ends: list[int]  # behind each of this rank's leaves, in tokens of this rank
    parts: torch.Tensor  # [N] int8, of the tokens of all ranks: a half or HELD_OUT
    start: int  # number of this rank's first token among them
    ranks: Ranks = ALONE

    @property
    def own(self) -> slice:
        """This rank's tokens among all."""
        return slice(self.start, self.start + self.ends[-1])

    def by_leaf(self, pieces: Sequence[slice]) -> list[range]:
        """The numbers of pieces of this rank's tokens, in order, for each of its leaves."""
        leaves = [bisect_right(self.ends, piece.start) for piece in pieces]
        bounds = [bisect_left(leaves, leaf) for leaf in range(len(self.ends) + 1)]
        return [range(*pair) for pair in itertools.pairwise(bounds)]

    def share(self, pieces: Sequence[slice]) -> Share:
        """Of a weight that all tokens reach, when they come in these pieces."""
        return Share(self.parts, self.start, self.by_leaf(pieces), self.ranks)


@dataclass(frozen=True)
class Share:
    """The tokens that reach one weight, and which of them this rank has: in pieces, by leaf."""

    parts: torch.Tensor  # [N] int8, of the tokens of all ranks
    start: int  # number of this rank's first token among them
    leaves: Sequence[range]  # numbers of this rank's pieces that are summed up together
    ranks: Ranks = ALONE


def deal(tokens: Sequence[torch.Tensor], ranks: Ranks = ALONE) -> Dealt:
    """Calibration tokens `[S, T]`, one tensor for each length, as rank `ranks.number` has them."""
    parts = parts_of([(len(batch), batch.shape[1]) for batch in tokens])
    sizes = [batch.numel() for batch in tokens]
    shaped = [part.view_as(batch) for part, batch in zip(parts.split(sizes), tokens, strict=True)]
    leaves, leaf_parts = leaves_of(tokens), leaves_of(shaped)
    first, end = (LEAVES * number // ranks.count for number in (ranks.number, ranks.number + 1))
    own = [leaf for leaf in leaves[first:end] if leaf]
    return Dealt(
        batches=[batch for leaf in own for batch in leaf],
        ends=list(itertools.accumulate(count(leaf) for leaf in own)),
        parts=torch.cat([part.flatten() for leaf in leaf_parts for part in leaf]),
        start=sum(count(leaf) for leaf in leaves[:first]),
        ranks=ranks,
    )


def leaves_of(batches: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The sequences of batches `[S, T]`, counted through all of them, dealt into LEAVES."""
    leaves: list[list[torch.Tensor]] = [[] for _ in range(LEAVES)]
    first = 0  # number of the batch's first sequence
    for batch in batches:
        for number, leaf in enumerate(leaves):
            dealt = batch[(number - first) % LEAVES :: LEAVES]
            if len(dealt):
                leaf.append(dealt)
        first += len(batch)
    return leaves


def count(batches: Sequence[torch.Tensor]) -> int:
    """Of tokens."""
    return sum(batch.numel() for batch in batches)


def check_ranks(ranks: Ranks, sequences: int) -> None:
    """Raises UserError where some rank would have no calibration sequence."""
    if ranks.count > LEAVES:
        raise UserError(f"{ranks.count} ranks; a run can be shared by at most {LEAVES}")
    if ranks.count > 1 and sequences < LEAVES:
        raise UserError(
            f"{sequences} calibration sequences for {ranks.count} ranks; "
            f"draw at least {LEAVES}, or start one process"
        )
