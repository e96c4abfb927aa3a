"""Rounding with several answers in the race: the rows of one block, from the last to the first.

GPTQ takes the nearest code, row by row, and never looks back. Here each output keeps the `beams`
cheapest sequences of codes so far, and each of them tries its two nearest codes for the next row.
A sequence costs what it adds to the loss, sum_j D_j eps_j^2, exactly. The cheapest one of a block
is kept; one beam is GPTQ. This is the K-best search of lattice decoding (Schnorr and Euchner 1994)
on the lattice in which GPTQ is Babai's nearest plane (arXiv 2507.18553). Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llama4q.schemes import Scheme

STRIP = 16  # rows between two large products


@dataclass(frozen=True)
class Rows:
    """The rows of a block, in the order of the solver: the last one is rounded first."""

    target: torch.Tensor  # [B, O]
    steps: torch.Tensor  # [B, O]
    importance: torch.Tensor  # [B], D
    correction: torch.Tensor  # [B, B], unit upper triangular


def solve_block(
    wanted: torch.Tensor, rows: Rows, scheme: Scheme, beams: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the codes and residuals, `[B, O]` each.

    `wanted [B, O]` is the target and what the rows behind this block ask for.
    """
    empty = wanted.new_empty(1, 0, wanted.shape[1])
    race = _Race(wanted[None], empty, empty, wanted.new_zeros(1, wanted.shape[1]))
    for stop in range(len(wanted), 0, -STRIP):
        race = _strip(race, rows, max(0, stop - STRIP), stop, scheme, beams)
    best = race.cost.argmin(dim=0, keepdim=True)
    return _pick(race.codes, best)[0], _pick(race.residual, best)[0]


@dataclass(frozen=True)
class _Race:
    """K sequences for each output, over the rows that are done."""

    wanted: torch.Tensor  # [K, rows to come, O]
    codes: torch.Tensor  # [K, rows done, O]
    residual: torch.Tensor  # [K, rows done, O]
    cost: torch.Tensor  # [K, O]


def _strip(race: _Race, rows: Rows, start: int, stop: int, scheme: Scheme, beams: int) -> _Race:
    """Round rows start..stop; what lies outside of them follows in one product at the end."""
    inner = _Race(race.wanted[:, start:stop], race.codes[:, :0], race.residual[:, :0], race.cost)
    count, outputs = race.cost.shape
    origin = torch.arange(count)[:, None].expand(count, outputs)  # beam before the strip
    for row in range(stop - 1, start - 1, -1):
        inner, parent = _row(inner, rows, start, row, scheme, beams)
        origin = origin.gather(0, parent)
    wanted = _pick(race.wanted[:, :start], origin)
    return _Race(
        wanted + rows.correction[:start, start:stop] @ inner.residual,
        torch.cat((inner.codes, _pick(race.codes, origin)), dim=1),
        torch.cat((inner.residual, _pick(race.residual, origin)), dim=1),
        inner.cost,
    )


def _row(
    race: _Race, rows: Rows, start: int, row: int, scheme: Scheme, beams: int
) -> tuple[_Race, torch.Tensor]:
    """Round one row in all sequences; with the old beam `[K, O]` that each new one goes on from."""
    step = rows.steps[row]
    exact = race.wanted[:, -1] / step
    codes = scheme.nearest(exact)
    if beams > 1:
        second = scheme.second_nearest(exact, codes)
        exact, codes = torch.cat((exact, exact)), torch.cat((codes, second))
    parts = len(codes) // len(race.cost)
    cost = race.cost.repeat(parts, 1) + rows.importance[row] * ((exact - codes) * step).square()
    if parts == 2:
        cost[len(race.cost) :].masked_fill_(second == codes[: len(race.cost)], torch.inf)
    which = torch.arange(len(codes))[:, None].expand_as(cost)
    if len(codes) > beams:
        cost, which = cost.topk(beams, dim=0, largest=False)
        codes = codes.gather(0, which)
    parent = which % len(race.cost)
    residual = (rows.target[row] - codes * step)[:, None]
    ahead = _pick(race.wanted[:, :-1], parent)
    found = _Race(
        ahead.addcmul_(rows.correction[start:row, row, None], residual),
        torch.cat((codes[:, None], _pick(race.codes, parent)), dim=1),
        torch.cat((residual, _pick(race.residual, parent)), dim=1),
        cost,
    )
    return found, parent


def _pick(beams: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """`beams [K, R, O]` by number `[K', O]`."""
    if len(beams) == 1 and len(which) == 1:
        return beams.clone()
    return beams.gather(0, which[:, None, :].expand(-1, beams.shape[1], -1))
