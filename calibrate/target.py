"""The weight that codes should aim at when earlier layers have already damaged their inputs.

A linear that saw x in the original model sees y in the quantized one. The codes Q that bring its
output, with what the residual stream lacks (r), back to the original's minimise

    E |x W + r - y Q|^2,  whose least-squares answer is  W* = W + H^-1 B,
    H = E y^T y,  B = E y^T [(x - y) W + r].

Rounding W* with H is then ordinary GPTQ. With few tokens H^-1 B fits noise, so only a share alpha
of it is taken: the share that each half of the sequences would choose for the other's correction.
Source: the least squares behind GPTAQ (2504.02692), QEP (2504.09629) and Qronos (2505.11695),
solved exactly; the residual in the target as in SchurQuant (2608.15567). Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .gptq import Factor, factorize
from .hessian import ROWS_AT_ONCE, Hessian, measure

COLUMNS = 256  # outputs that alpha is estimated on


@dataclass(frozen=True)
class Pair:
    """The same N tokens in both streams, and which half of the sequences each belongs to."""

    served: torch.Tensor  # [N, I] what the quantized model feeds the linear
    original: torch.Tensor  # [N, I] what the original fed it; the served row where none compares
    lacking: torch.Tensor | None  # [N, O] what the output should make up for besides
    half: torch.Tensor  # [N] bool

    def rows(self, which: torch.Tensor) -> Pair:
        """Some of the tokens, by index."""
        lacking = None if self.lacking is None else self.lacking[which]
        return Pair(self.served[which], self.original[which], lacking, self.half[which])


def corrected(
    weight: torch.Tensor, pair: Pair, factor: Factor, blend: Callable[[Hessian], Hessian]
) -> tuple[torch.Tensor, float | None]:
    """W* for an F32 weight `[I, O]`, and the share alpha in 0..1 of the correction that it holds.

    None, and the weight as it was, when a half has no tokens or its Hessian does not factor.
    `factor` is of all rows; `blend` does to the Hessian of a half what was done to theirs.
    """
    halves = [_Half.of(weight, pair, pair.half == side) for side in (False, True)]
    tokens = sum(half.hessian.tokens for half in halves)
    alpha = _share(halves, factor.damping, blend)
    if not alpha:
        return weight, alpha
    cross = sum((half.cross * half.hessian.tokens for half in halves), torch.zeros_like(weight))
    return weight + alpha * factor.divide(cross / tokens), alpha


@dataclass(frozen=True)
class _Half:
    """The moments of one half of the sequences."""

    hessian: Hessian
    cross: torch.Tensor  # B, [I, O]

    @classmethod
    def of(cls, weight: torch.Tensor, pair: Pair, mine: torch.Tensor) -> _Half:
        rows = torch.nonzero(mine).squeeze(1)
        inputs = len(weight)
        moments, cross = torch.zeros(inputs, inputs), torch.zeros_like(weight)
        for part in rows.split(ROWS_AT_ONCE):
            served = pair.served[part].float()
            moments.addmm_(served.T, pair.original[part].float() - served)
            if pair.lacking is not None:
                cross.addmm_(served.T, pair.lacking[part].float())
        cross.addmm_(moments, weight)
        return cls(measure([pair.served[rows]], inputs), cross / max(1, len(rows)))


def _share(
    halves: list[_Half], damping: float, blend: Callable[[Hessian], Hessian]
) -> float | None:
    """Alpha by cross-fitting: what one half corrects, judged by the other half's moments.

    None when a half has no rows or its Hessian does not factor: it can judge nothing then.
    """
    outputs = halves[0].cross.shape[1]
    columns = torch.arange(0, outputs, max(1, outputs // COLUMNS))
    crosses = [half.cross[:, columns] for half in halves]
    steps = []
    for half, cross in zip(halves, crosses, strict=True):
        factor = factorize(blend(half.hessian).matrix, damping, act_order=False)
        if half.hessian.tokens == 0 or factor is None:
            return None
        steps.append(factor.divide(cross))
    gain = (steps[0] * crosses[1]).sum() + (steps[1] * crosses[0]).sum()
    cost = sum(
        (step * (other.hessian.matrix @ step)).sum()
        for step, other in zip(steps, reversed(halves), strict=True)
    )
    return float((gain / cost).clamp(0, 1)) if cost > 0 else 0.0
