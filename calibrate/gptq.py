"""GPTQ with one factorisation: find the codes of one weight matrix that hurt its outputs least.

The loss of codes with residual R = W - Q on inputs with Hessian H is tr(R^T H R). With H = L L^T it
is sum_j D_j eps_j^2, where D_j = L_jj^2 and eps_j is what rounding row j leaves after the rows
behind it have been corrected for: rows are taken from the last to the first, and each is rounded
to w_j + sum_{i>j} (L_ij / L_jj) R_i. This is GPTQ, and Babai's nearest plane (arXiv 2507.18553);
the peers reach the same codes with three factorisations. Because D is known beforehand, scales are
chosen to minimise the very sum that rounding will leave.

Weights are in-major `[I, O]`. Knows nothing of models, names or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llama4q.products import add_rough_product, factor_dtype
from llama4q.schemes import Kind, QuantizedWeight, Scheme, absmax_scales, storable

from .cholesky import divide, factor_upper
from .kernel import kernel
from .lookahead import Rows, solve_block

BLOCK = 128  # rows between two large products
SMALLEST_CLIP = 0.6  # of the abs-max scale, the end of the scale search of integers
LARGEST_FLOAT = 2.0  # the same for E4M3: over one binade all mantissas have come up
DAMPING_RETRIES = 3  # each ten times the damping before


@dataclass(frozen=True)
class Factor:
    """One Hessian factored for any number of weights that share it."""

    order: torch.Tensor  # [I]; position -> row of the weight, the last position is rounded first
    correction: torch.Tensor  # [I, I]; unit upper triangular, L^T with its diagonal divided out
    rounded: torch.Tensor  # the same in factor_dtype(), for large products
    importance: torch.Tensor  # [I]; D, in the weight's own order
    damping: float  # of the mean diagonal, after retries
    attempts: int

    def divide(self, right: torch.Tensor) -> torch.Tensor:
        """The damped Hessian's inverse times `right [I, O]`."""
        found = torch.empty_like(right)
        squares = self.importance[self.order]
        found[self.order] = divide(self.correction, self.rounded, squares, right[self.order])
        return found


def factorize(hessian: torch.Tensor, damping: float, act_order: bool) -> Factor | None:
    """Factor an F32 Hessian `[I, I]` after adding `damping` times its mean diagonal.

    With `act_order` the rows with the largest activations are rounded first, while all others can
    still make up for them. Retries with ten times the damping; None when no retry succeeds or the
    Hessian is zero.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0:
        return None
    order = torch.argsort(diagonal, stable=True) if act_order else _back_to_front(diagonal)
    for attempt in range(DAMPING_RETRIES + 1):
        tried = damping * 10**attempt
        if act_order:
            damped = hessian.index_select(0, order).index_select(1, order)
        else:
            damped = hessian.flip((0, 1))
        damped.diagonal().add_(tried * mean)
        if factor_upper(damped):
            return _factor(order, damped, tried, attempt + 1)
    return None


def _back_to_front(diagonal: torch.Tensor) -> torch.Tensor:
    """The order in which the weight's own rows are rounded from the first to the last."""
    return torch.arange(len(diagonal) - 1, -1, -1, device=diagonal.device)


def _factor(order: torch.Tensor, upper: torch.Tensor, damping: float, attempts: int) -> Factor:
    diagonal = upper.diagonal().clone()
    importance = torch.empty_like(diagonal)
    importance[order] = diagonal.square()
    unit = upper.div_(diagonal[:, None])
    return Factor(order, unit, unit.to(factor_dtype(unit.device)), importance, damping, attempts)


def choose_scales(
    weight: torch.Tensor, importance: torch.Tensor, scheme: Scheme, points: int, signed: bool
) -> torch.Tensor:
    """The scale of each group that minimises sum_j D_j (w_j - s code_j)^2, `[I/group, O]`.

    Tries `points` fractions of the abs-max scale; 1 point is abs-max. `signed` makes the scale of a
    group negative whose largest weight is positive: integers reach one step further below zero than
    above. BF16 for integers, F32 with BF16's values for E4M3, whose grid is symmetric.
    """
    largest = absmax_scales(weight, scheme)
    grouped = weight.contiguous().view(len(largest), -1, weight.shape[1])
    if signed and scheme.kind is Kind.INT:
        largest = torch.where(grouped.amax(dim=1) > -grouped.amin(dim=1), -largest, largest)
    fractions = _fractions(scheme, points).to(weight.device)
    tried = storable(largest[:, None] * fractions[:, None])
    errors = [
        scale_errors(rows, weights, scales, scheme)
        for rows, weights, scales in zip(
            grouped, importance.view(len(grouped), -1), tried.float(), strict=True
        )
    ]
    best = torch.stack(errors).argmin(dim=1, keepdim=True)
    found = tried.gather(1, best).squeeze(1)
    return found.float() if scheme.kind is Kind.FLOAT8 else found


def scale_errors(
    rows: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor, scheme: Scheme
) -> torch.Tensor:
    """sum_j D_j (w_j - s code_j)^2 of one group `[I, O]` for each of its scales `[points, O]`."""
    compiled = kernel(scheme, 1, rows.device)
    if compiled is not None:
        return compiled.scale_errors(rows, importance, scales)
    errors = torch.empty_like(scales)
    for number, step in enumerate(scales):
        lost = torch.addcmul(rows, scheme.nearest(rows * step.reciprocal()), step, value=-1)
        errors[number] = importance @ lost.square_()
    return errors


def _fractions(scheme: Scheme, points: int) -> torch.Tensor:
    end = LARGEST_FLOAT if scheme.kind is Kind.FLOAT8 else SMALLEST_CLIP
    return torch.linspace(1, end, points)


def solve(
    weight: torch.Tensor, factor: Factor, scales: torch.Tensor, scheme: Scheme, beams: int = 1
) -> QuantizedWeight:
    """Codes of an F32 weight `[I, O]` for given scales `[I/group, O]`.

    Left-looking in blocks: each block gathers the corrections of all rows behind it in one product,
    so that a residual is written once and never rewritten. With several `beams`, roundings compete
    within a block (lookahead.py); with one this is GPTQ. The product has BF16 factors where the
    processor has them: 4 to 6 times faster, and the loss changes by 0.02 % at most, by 0.1 % where
    sums are rounded, too (5,120 inputs with outlier channels, INT4, INT8 and FP8). The weight and
    what is asked of it stay F32.
    """
    inputs = weight.shape[0]
    group = inputs // scales.shape[0]
    steps = scales.float()
    residual = weight.new_empty(weight.shape, dtype=factor_dtype(weight.device))
    codes = weight.new_empty(weight.shape, dtype=scheme.stored_codes(steps[:0]).dtype)
    for stop in range(inputs, 0, -BLOCK):
        block = slice(max(0, stop - BLOCK), stop)
        taken = factor.order[block]
        correction = factor.correction[block]
        target = weight[taken]
        rows = Rows(target, steps[taken // group], factor.importance[taken], correction[:, block])
        wanted = target.clone()
        add_rough_product(wanted, factor.rounded[block, stop:], residual[stop:])
        found = solve_block(wanted, rows, scheme, beams)
        residual[block] = torch.addcmul(target, found, rows.steps, value=-1)
        codes[taken] = scheme.stored_codes(found)
    return QuantizedWeight(scheme, codes, scales)


def relative_error(weight: torch.Tensor, found: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(R^T H R) / tr(W^T H W): the share of the output's energy that the codes lose."""
    residual = weight - found
    lost = ((hessian @ residual) * residual).sum()
    total = ((hessian @ weight) * weight).sum()
    return float(lost / total) if total > 0 else 0.0
