"""Rounding with several answers in the race: the rows of one block, from the last to the first.

GPTQ takes the nearest code, row by row, and never looks back. Here each output keeps the `beams`
cheapest sequences of codes so far, and each of them tries its two nearest codes for the next row.
A sequence costs what it adds to the loss, sum_j D_j eps_j^2, exactly. The cheapest one of a block
is kept; one beam is GPTQ. This is the K-best search of lattice decoding (Schnorr and Euchner 1994)
on the lattice in which GPTQ is Babai's nearest plane (arXiv 2507.18553).

`solve_block` hands over to the same search in C (kernel.c) where that could be compiled. Both take
the same codes but where two sequences cost the same to five digits. Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llama4q.schemes import Scheme

from .kernel import kernel, name_mask

STRIP = 16  # rows between two large products
OUTPUTS_AT_ONCE = 2048  # independent of each other; so many stay in the cache


@dataclass(frozen=True)
class Rows:
    """The rows of a block, in the order of the solver: the last one is rounded first."""

    target: torch.Tensor  # [B, O]
    steps: torch.Tensor  # [B, O]
    importance: torch.Tensor  # [B], D
    correction: torch.Tensor  # [B, B], unit upper triangular

    def outputs(self, part: slice) -> Rows:
        return Rows(self.target[:, part], self.steps[:, part], self.importance, self.correction)


def solve_block(wanted: torch.Tensor, rows: Rows, scheme: Scheme, beams: int) -> torch.Tensor:
    """Values of the codes `[B, O]`; `wanted [B, O]` is the target and what rows behind ask for."""
    compiled = kernel(scheme, beams, wanted.device)
    if compiled is not None:
        return compiled.solve_block(
            wanted, rows.target, rows.steps, rows.importance, rows.correction
        )
    codes = torch.empty_like(wanted)
    for start in range(0, wanted.shape[1], OUTPUTS_AT_ONCE):
        part = slice(start, start + OUTPUTS_AT_ONCE)
        codes[:, part] = _race(wanted[:, part], rows.outputs(part), scheme, beams)
    return codes


def _race(wanted: torch.Tensor, rows: Rows, scheme: Scheme, beams: int) -> torch.Tensor:
    """The codes of the cheapest sequence of each output."""
    ahead, cost = wanted[None], wanted.new_zeros(1, wanted.shape[1])  # [K, rows to come, O], [K, O]
    strips = []
    for stop in range(len(wanted), 0, -STRIP):
        start = max(0, stop - STRIP)
        strip, cost = _strip(ahead[:, start:stop], cost, rows, start, scheme, beams)
        residual = rows.target[start:stop] - strip.codes * rows.steps[start:stop]
        ahead = _pick(ahead[:, :start], strip.origin)
        ahead += rows.correction[:start, start:stop] @ residual
        strips.append(strip)
    best = cost.argmin(dim=0, keepdim=True)
    found = []
    for strip in reversed(strips):
        found.append(_pick(strip.codes, best)[0])
        best = strip.origin.gather(0, best)
    return torch.cat(found)


@dataclass(frozen=True)
class _Strip:
    """What K sequences do in some rows, and which sequence before the strip each goes on from."""

    codes: torch.Tensor  # [K, R, O]
    origin: torch.Tensor  # [K, O]


def _strip(
    ahead: torch.Tensor, cost: torch.Tensor, rows: Rows, start: int, scheme: Scheme, beams: int
) -> tuple[_Strip, torch.Tensor]:
    """Round a strip's rows; with the cost of each sequence at its end, `[K, O]`."""
    taken = []
    for row in range(start + ahead.shape[1] - 1, start - 1, -1):
        step = rows.steps[row]
        codes, parent, cost = _branch(
            ahead[:, -1] * step.reciprocal(), step, rows.importance[row], cost, scheme, beams
        )
        taken.append((codes, parent))
        ahead = _pick(ahead[:, :-1], parent)
        residual = (rows.target[row] - codes * step)[:, None]
        ahead.addcmul_(rows.correction[start:row, row, None], residual)
    origin = _numbers(cost)
    found = []
    for codes, parent in reversed(taken):  # back along the sequences that are left
        found.append(codes.gather(0, origin))
        origin = parent.gather(0, origin)
    return _Strip(torch.stack(found, dim=1), origin), cost


def _branch(
    exact: torch.Tensor,
    step: torch.Tensor,
    importance: torch.Tensor,
    cost: torch.Tensor,
    scheme: Scheme,
    beams: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best next codes `[K', O]`, the sequences that they continue, and what those cost then."""
    codes = scheme.nearest(exact)
    if beams == 1:
        return codes, _numbers(cost), cost
    second = scheme.second_nearest(exact, codes)
    added = [importance * ((exact - codes) * step).square()]
    added.append(importance * ((exact - second) * step).square())
    added[1].masked_fill_(second == codes, torch.inf)
    name = name_mask(beams)
    keys = torch.cat((_named(cost + added[0], 0, name), _named(cost + added[1], 1, name)))
    codes = torch.cat((codes, second))
    keys, which = keys.topk(min(beams, len(keys)), dim=0, largest=False, sorted=False)
    return codes.gather(0, which), which % len(cost), (keys & ~name).view(torch.float32)


def _named(costs: torch.Tensor, code: int, name: int) -> torch.Tensor:
    """The bits of costs, which sort as costs do, the last ones replaced by a candidate's number."""
    numbers = 2 * torch.arange(len(costs), dtype=torch.int32, device=costs.device) + code
    return (costs.view(torch.int32) & ~name) | numbers[:, None]


def _numbers(cost: torch.Tensor) -> torch.Tensor:
    """The number of each sequence, `[K, O]`."""
    return torch.arange(len(cost), device=cost.device)[:, None].expand(cost.shape)


def _pick(beams: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """`beams [K, R, O]` by number `[K', O]`."""
    if len(beams) == 1 and len(which) == 1:
        return beams.clone()
    return beams.gather(0, which[:, None, :].expand(-1, beams.shape[1], -1))
