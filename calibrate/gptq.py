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

from llama4q.schemes import QuantizedWeight, Scheme, absmax_scales, storable

BLOCK = 128  # rows between two large products
STRIP = 16  # rows between two small ones
SMALLEST_CLIP = 0.6  # of the abs-max scale, the end of the scale search
DAMPING_RETRIES = 3  # each ten times the damping before


@dataclass(frozen=True)
class Factor:
    """One Hessian factored for any number of weights that share it."""

    order: torch.Tensor  # [I]; position -> row of the weight, the last position is rounded first
    correction: torch.Tensor  # [I, I]; unit upper triangular, L^T with its diagonal divided out
    importance: torch.Tensor  # [I]; D, in the weight's own order
    damping: float  # of the mean diagonal, after retries
    attempts: int

    def divide(self, right: torch.Tensor) -> torch.Tensor:
        """The damped Hessian's inverse times `right [I, O]`."""
        diagonal = self.importance[self.order].sqrt()
        lower = self.correction.T * diagonal
        found = torch.empty_like(right)
        found[self.order] = torch.cholesky_solve(right[self.order], lower)
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
    order = torch.argsort(diagonal, stable=True) if act_order else _back_to_front(len(diagonal))
    permuted = hessian[order][:, order]
    for attempt in range(DAMPING_RETRIES + 1):
        tried = damping * 10**attempt
        damped = permuted + tried * mean * torch.eye(len(order), device=hessian.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return _factor(order, lower, tried, attempt + 1)
    return None


def _back_to_front(size: int) -> torch.Tensor:
    """The order in which the weight's own rows are rounded from the first to the last."""
    return torch.arange(size - 1, -1, -1)


def _factor(order: torch.Tensor, lower: torch.Tensor, damping: float, attempts: int) -> Factor:
    diagonal = lower.diagonal()
    importance = torch.empty_like(diagonal)
    importance[order] = diagonal.square()
    return Factor(order, (lower / diagonal).T.contiguous(), importance, damping, attempts)


def choose_scales(
    weight: torch.Tensor, importance: torch.Tensor, scheme: Scheme, points: int
) -> torch.Tensor:
    """The BF16 scale of each group that minimises sum_j D_j (w_j - s code_j)^2, `[I/group, O]`.

    Tries `points` fractions of the abs-max scale between 1 and SMALLEST_CLIP; 1 point is abs-max.
    """
    largest = absmax_scales(weight, scheme)
    groups = largest.shape[0]
    grouped = weight.view(groups, -1, weight.shape[1])
    weights = importance.view(groups, -1, 1)
    best = storable(largest)
    least = torch.full_like(largest, torch.inf)
    for fraction in torch.linspace(1, SMALLEST_CLIP, points).tolist():
        scales = storable(largest * fraction)
        step = scales.float()[:, None, :]
        codes = torch.round(grouped / step).clamp_(scheme.code_min, scheme.code_max)
        error = ((grouped - codes * step).square_() * weights).sum(dim=1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scales, best)
    return best


def solve(
    weight: torch.Tensor, factor: Factor, scales: torch.Tensor, scheme: Scheme
) -> QuantizedWeight:
    """Codes of an F32 weight `[I, O]` for given BF16 scales `[I/group, O]`.

    Left-looking in blocks: each block gathers the corrections of all rows behind it in one product,
    so that a residual is written once and never rewritten.
    """
    inputs = weight.shape[0]
    group = inputs // scales.shape[0]
    steps = scales.float()[factor.order // group]
    target = weight[factor.order]
    residual = torch.zeros_like(target)
    codes = torch.empty(target.shape, dtype=torch.int8, device=weight.device)
    for stop in range(inputs, 0, -BLOCK):
        start = max(0, stop - BLOCK)
        wanted = target[start:stop] + factor.correction[start:stop, stop:] @ residual[stop:]
        _solve_block(
            wanted,
            factor.correction[start:stop, start:stop],
            target[start:stop],
            steps[start:stop],
            residual[start:stop],
            codes[start:stop],
            scheme,
        )
    found = torch.empty_like(codes)
    found[factor.order] = codes
    return QuantizedWeight(scheme, found, scales)


def _solve_block(
    wanted: torch.Tensor,
    correction: torch.Tensor,
    target: torch.Tensor,
    steps: torch.Tensor,
    residual: torch.Tensor,
    codes: torch.Tensor,
    scheme: Scheme,
) -> None:
    """Round the rows of one block from the last to the first; fills `residual` and `codes`."""
    for stop in range(len(wanted), 0, -STRIP):
        start = max(0, stop - STRIP)
        for row in range(stop - 1, start - 1, -1):
            code = torch.round(wanted[row] / steps[row]).clamp_(scheme.code_min, scheme.code_max)
            codes[row] = code.to(torch.int8)
            residual[row] = target[row] - code * steps[row]
            wanted[start:row].addr_(correction[start:row, row], residual[row])
        wanted[:start].addmm_(correction[:start, start:stop], residual[start:stop])


def relative_error(weight: torch.Tensor, found: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(R^T H R) / tr(W^T H W): the share of the output's energy that the codes lose."""
    residual = weight - found
    lost = ((hessian @ residual) * residual).sum()
    total = ((hessian @ weight) * weight).sum()
    return float(lost / total) if total > 0 else 0.0
