"""Second moments of a linear's input, the Hessian of its layer loss, and how to trust few tokens.

An expert's Hessian is built from the rows routed to it alone. With few rows it is blended with the
moments of all tokens, and those with their own diagonal, by Ledoit and Wolf's closed form. Knows
nothing of models or codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llama4q.device import HOST
from llama4q.products import add_square, mirror

ROWS_AT_ONCE = 8192  # bounds the F32 copies, not the result's meaning
MOST_TOKEN_DAMPING = 0.3  # beyond it hardly anything changes, down to no tokens at all


@dataclass(frozen=True)
class Hessian:
    """The mean of `x x^T` over `tokens` rows, F32 `[I, I]`; `shrinkage` is its target's share."""

    matrix: torch.Tensor
    tokens: int
    shrinkage: float = 0.0

    def blended(self, target: Hessian, share: float) -> Hessian:
        """(1 - share) of this and `share` of `target`."""
        return Hessian(torch.lerp(self.matrix, target.matrix, share), self.tokens, share)

    def alone(self) -> Hessian:
        """Only its diagonal: inputs that have nothing to do with each other."""
        return Hessian(torch.diag(self.matrix.diagonal()), self.tokens)


def measure(batches: Iterable[torch.Tensor], inputs: int, device: torch.device = HOST) -> Hessian:
    """The Hessian of rows `[N, I]`, given in batches. Products of BF16 are exact in F32."""
    total = torch.zeros(inputs, inputs, device=device)
    tokens = 0
    for rows in batches:
        add_square(total, rows)
        tokens += len(rows)
    mirror(total)
    return Hessian(total.div_(max(tokens, 1)), tokens)


def joined(first: Hessian, second: Hessian) -> Hessian:
    """The Hessian of both sets of rows."""
    tokens = first.tokens + second.tokens
    return Hessian(torch.lerp(first.matrix, second.matrix, second.tokens / max(tokens, 1)), tokens)


def damping_for(hessian: Hessian, base: float, by_tokens: float) -> float:
    """The share of the mean diagonal to add: `base`, and more the fewer tokens an input has.

    A sample of T tokens misses the true moments by about sqrt(I / T), most in the directions of the
    smallest ones, where the solver would put its errors. The form was found by measuring, NOTES.md.
    """
    short = by_tokens * len(hessian.matrix) / max(hessian.tokens, 1)
    return base + min(short, MOST_TOKEN_DAMPING)


def shrink(own: Hessian, target: Hessian, batches: Iterable[torch.Tensor]) -> Hessian:
    """Blend `own` with `target`: the fewer tokens it was measured on, the more of it.

    `batches` of some of its rows `[n, I]` tell the mean of |x|^4.

    (1 - rho) S + rho P with rho = [(mean |x|^4 - |S|^2) / N] / |S - P|^2, clipped to [0, 1], in
    coordinates where P has a unit diagonal. Source: Ledoit and Wolf 2004, "A well-conditioned
    estimator for large-dimensional covariance matrices", with another target than theirs: the
    moments of all tokens for an expert, the matrix's own diagonal for those of all tokens.
    """
    if own.tokens == 0:
        return Hessian(target.matrix, 0, 1.0)
    spread = target.matrix.diagonal().sqrt()
    scale = torch.where(spread > 0, 1 / spread, torch.ones_like(spread))
    distance = _energy(own.matrix - target.matrix, scale)
    if distance == 0:
        return own
    fourth = torch.cat(
        [
            (part.float() * scale).square().sum(dim=1).square()
            for rows in batches
            for part in rows.split(ROWS_AT_ONCE)
        ]
    )
    noise = (fourth.mean() - _energy(own.matrix.clone(), scale)) / own.tokens
    share = float((noise / distance).clamp(0, 1))
    return own.blended(target, share)


def _energy(matrix: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """|diag(scale) M diag(scale)|^2; the matrix is used up, as memory is what takes time here."""
    weight = scale.square()
    return weight @ (matrix.square_() @ weight)
