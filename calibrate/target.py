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

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from llama4q.products import add_product, add_square, factor_dtype, mirror, product, rough_product

from .gptq import Factor, factorize
from .hessian import Hessian

COLUMNS = 256  # outputs that alpha is estimated on
HALVES = (0, 1)
HELD_OUT = 2  # what Pair.part says of a token that no moment may see


@dataclass(frozen=True)
class Batch:
    """Some tokens of a Pair, each times the root of its weight."""

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
    weights: torch.Tensor | None = None  # [N] F32, in any unit; None: all alike

    def rows(self, which: torch.Tensor) -> Pair:
        """Some of the tokens, by index."""
        return Pair(
            self.served[which],
            self.original[which],
            None if self.lacking is None else self.lacking[which],
            self.part[which],
            None if self.weights is None else self.weights[which],
        )

    def batch(self) -> Batch:
        """All of them, weighted: in F32 then, else as they are."""
        if self.weights is None:
            return Batch(self.served, self.original, self.lacking)
        root = self.weights.sqrt()[:, None]
        lacking = None if self.lacking is None else self.lacking.float() * root
        return Batch(self.served.float() * root, self.original.float() * root, lacking)


def concatenated(pairs: Iterable[Pair]) -> Pair:
    """All tokens of at least one pair as one."""
    every = list(pairs)
    lacking = [pair.lacking for pair in every if pair.lacking is not None]
    weights = [pair.weights for pair in every if pair.weights is not None]
    return Pair(
        torch.cat([pair.served for pair in every]),
        torch.cat([pair.original for pair in every]),
        torch.cat(lacking) if lacking else None,
        torch.cat([pair.part for pair in every]),
        torch.cat(weights) if weights else None,
    )


@dataclass
class Sums:
    """Second moments of some tokens."""

    square: torch.Tensor  # [I, I], above its diagonal alone
    cross: torch.Tensor  # [I, O], or [I, I] where nothing is lacking; no columns if B is not wanted
    tokens: int = 0
    total: float = 0.0  # of the tokens' weights

    def add(self, other: Sums) -> None:
        """Those of other tokens, which may come from another machine's memory."""
        self.square += other.square.to(self.square.device)
        self.cross += other.cross.to(self.cross.device)
        self.tokens += other.tokens
        self.total += other.total


class Moments:
    """What one half of the sequences tells of a weight, added up piece by piece.

    B has the shape of the weight. Where nothing is lacking it is a product with the weight, of
    which a few columns are enough for alpha, so the smaller E y^T (x - y) is kept instead.
    """

    def __init__(self, weight: torch.Tensor, lacking: bool, crossed: bool = True) -> None:
        """`lacking`: tokens tell what the output should make up for. `crossed`: B is wanted."""
        # a weight of the source is exact in that
        self.weight = weight.to(factor_dtype(weight.device))
        self.lacking = lacking
        self.crossed = crossed
        self.sums: Sums | None = None  # until there are tokens

    def another(self) -> Moments:
        """For tokens of the same weight that are added up by themselves."""
        other = copy.copy(self)
        other.sums = None
        return other

    def add(self, pair: Pair) -> None:
        """Some tokens of this half."""
        if not len(pair.part):
            return
        batch, sums = pair.batch(), self._begun()
        add_square(sums.square, batch.served)
        if self.crossed:
            moved = batch.original - batch.served
            if batch.lacking is not None:
                moved = rough_product(moved, self.weight).add_(batch.lacking)
            add_product(sums.cross, batch.served.T, moved)
        sums.tokens += len(pair.part)
        sums.total += len(pair.part) if pair.weights is None else float(pair.weights.sum())

    def take(self, sums: Sums | None) -> None:
        """What others have added up; the first such sums are kept as they are."""
        if self.sums is None:
            self.sums = sums
        elif sums is not None:
            self.sums.add(sums)

    def to_means(self, unit: float) -> None:
        """From sums to means over the tokens; `unit` is what a token weighs on average."""
        sums = self._begun()
        mirror(sums.square)
        divisor = max(1, sums.tokens) * (unit or 1.0)
        sums.square.div_(divisor)
        sums.cross.div_(divisor)

    def _begun(self) -> Sums:
        """The sums, which are zero where no token has come."""
        if self.sums is None:
            inputs, outputs = self.weight.shape
            columns = (outputs if self.lacking else inputs) if self.crossed else 0
            square, cross = (
                self.weight.new_zeros(inputs, width, dtype=torch.float32)
                for width in (inputs, columns)
            )
            self.sums = Sums(square, cross)
        return self.sums

    @property
    def tokens(self) -> int:
        return 0 if self.sums is None else self.sums.tokens

    @property
    def total(self) -> float:
        return 0.0 if self.sums is None else self.sums.total

    @property
    def hessian(self) -> Hessian:
        return Hessian(self._begun().square, self.tokens)

    @property
    def cross(self) -> torch.Tensor:
        return self._begun().cross

    def wanted(self, columns: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """B `[I, O]`, or some of its columns."""
        if self.lacking:
            return self.cross[:, columns]
        return rough_product(self.cross, self.weight[:, columns])


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
    return factor.divide(both(halves).wanted()).mul_(alpha).add_(weight), alpha


def both(halves: tuple[Moments, Moments]) -> Moments:
    """What all sequences tell; the halves' own cross moments are used up."""
    first, second = halves
    share = second.tokens / max(1, first.tokens + second.tokens)
    first.cross.lerp_(second.cross, share)
    return first


def _share(
    halves: tuple[Moments, Moments], damping: float, blend: Callable[[Hessian], Hessian]
) -> float | None:
    """Alpha by cross-fitting: what one half corrects, judged by the other half's moments.

    None when a half has no rows or its Hessian does not factor: it can judge nothing then.
    """
    outputs = halves[0].weight.shape[1]
    columns = torch.arange(0, outputs, max(1, outputs // COLUMNS), device=halves[0].weight.device)
    crosses = [half.wanted(columns) for half in halves]
    steps = []
    for half, cross in zip(halves, crosses, strict=True):
        factor = factorize(blend(half.hessian).matrix, damping, act_order=False)
        if half.tokens == 0 or factor is None:
            return None
        steps.append(factor.divide(cross))
    gain = (steps[0] * crosses[1]).sum() + (steps[1] * crosses[0]).sum()
    cost = sum(
        (step * product(other.hessian.matrix, step)).sum()
        for step, other in zip(steps, reversed(halves), strict=True)
    )
    return float((gain / cost).clamp(0, 1)) if cost > 0 else 0.0
