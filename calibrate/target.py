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

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .gptq import Factor, factorize
from .hessian import ROWS_AT_ONCE, Hessian

COLUMNS = 256  # outputs that alpha is estimated on
HALVES = (0, 1)
HELD_OUT = 2  # what Pair.part says of a token that no moment may see


@dataclass(frozen=True)
class Batch:
    """Some tokens of a Pair in F32, each times the root of its weight."""

    served: torch.Tensor
    original: torch.Tensor
    lacking: torch.Tensor | None


@dataclass(frozen=True)
class Pair:
    """The same N tokens in both streams, and which part of the calibration text each belongs to."""

    served: torch.Tensor  # [N, I] what the quantized model feeds the linear
    original: torch.Tensor  # [N, I] what the original fed it; the served row where none compares
    lacking: torch.Tensor | None  # [N, O] what the output should make up for besides
    part: torch.Tensor  # [N] int8, one of HALVES or HELD_OUT
    weights: torch.Tensor | None = None  # [N] F32 with a mean of 1; None: all alike

    def rows(self, which: torch.Tensor) -> Pair:
        """Some of the tokens, by index."""
        return Pair(
            self.served[which],
            self.original[which],
            None if self.lacking is None else self.lacking[which],
            self.part[which],
            None if self.weights is None else self.weights[which],
        )

    def batches(self, part: int | None = None) -> Iterator[Batch]:
        """The tokens of one part, or all, ROWS_AT_ONCE at a time."""
        if part is None:
            which = torch.arange(len(self.part))
        else:
            which = torch.nonzero(self.part == part).squeeze(1)
        for index in which.split(ROWS_AT_ONCE):
            rows = self.rows(index)
            root = 1.0 if rows.weights is None else rows.weights.sqrt()[:, None]
            lacking = None if rows.lacking is None else rows.lacking.float() * root
            yield Batch(rows.served.float() * root, rows.original.float() * root, lacking)

    def seen(self) -> Iterator[torch.Tensor]:
        """The served rows that moments are made of."""
        for half in HALVES:
            yield from (batch.served for batch in self.batches(half))


@dataclass(frozen=True)
class Moments:
    """What one half of the sequences tells of a weight."""

    hessian: Hessian
    cross: torch.Tensor  # B, [I, O]

    @classmethod
    def of(cls, weight: torch.Tensor, pair: Pair, half: int) -> Moments:
        """One pass over the half's tokens; nothing of them is kept."""
        inputs = len(weight)
        square, moved = torch.zeros(inputs, inputs), torch.zeros(inputs, inputs)
        cross = torch.zeros_like(weight)
        tokens = 0
        for batch in pair.batches(half):
            square.addmm_(batch.served.T, batch.served)
            moved.addmm_(batch.served.T, batch.original - batch.served)
            if batch.lacking is not None:
                cross.addmm_(batch.served.T, batch.lacking)
            tokens += len(batch.served)
        cross.addmm_(moved, weight)
        count = max(1, tokens)
        return cls(Hessian(square.div_(count), tokens), cross.div_(count))


def corrected(
    weight: torch.Tensor,
    halves: tuple[Moments, Moments],
    factor: Factor,
    blend: Callable[[Hessian], Hessian],
) -> tuple[torch.Tensor, float | None]:
    """W* for an F32 weight `[I, O]`, and the share alpha in 0..1 of the correction that it holds.

    None, and the weight as it was, when a half has no tokens or its Hessian does not factor.
    `factor` is of all rows; `blend` does to the Hessian of a half what was done to theirs.
    """
    alpha = _share(halves, factor.damping, blend)
    if not alpha:
        return weight, alpha
    first, second = halves
    share = second.hessian.tokens / (first.hessian.tokens + second.hessian.tokens)
    return weight + alpha * factor.divide(torch.lerp(first.cross, second.cross, share)), alpha


def _share(
    halves: tuple[Moments, Moments], damping: float, blend: Callable[[Hessian], Hessian]
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
