"""Second moments of a linear's input, the Hessian of its layer loss, and how to trust few tokens.

An expert's Hessian is built from the rows routed to it alone. With few rows it is blended with the
moments of all tokens, by Ledoit and Wolf's closed form. Knows nothing of models or codes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

ROWS_AT_ONCE = 8192  # bounds the F32 copies, not the result's meaning


@dataclass(frozen=True)
class Hessian:
    """The mean of `x x^T` over `tokens` rows, F32 `[I, I]`; `shrinkage` is the pool's share."""

    matrix: torch.Tensor
    tokens: int
    shrinkage: float = 0.0

    def blended(self, pool: Hessian, share: float) -> Hessian:
        """(1 - share) of this and `share` of `pool`."""
        return Hessian(torch.lerp(self.matrix, pool.matrix, share), self.tokens, share)


def measure(batches: Iterable[torch.Tensor], inputs: int) -> Hessian:
    """The Hessian of rows `[N, I]`, given in batches. Products of BF16 are exact in F32."""
    total = torch.zeros(inputs, inputs)
    tokens = 0
    for batch in batches:
        for rows in batch.split(ROWS_AT_ONCE):
            exact = rows.float()
            total.addmm_(exact.T, exact)
            tokens += len(rows)
    return Hessian(total / max(tokens, 1), tokens)


def shrink(own: Hessian, pool: Hessian, rows: torch.Tensor) -> Hessian:
    """Blend `own`, measured on `rows [N, I]`, with `pool`: the fewer the rows, the more pool.

    (1 - rho) S + rho P with rho = [(mean |x|^4 - |S|^2) / N] / |S - P|^2, clipped to [0, 1], in
    coordinates where P has a unit diagonal. Source: Ledoit and Wolf 2004, "A well-conditioned
    estimator for large-dimensional covariance matrices", with the pool as the target.
    """
    if own.tokens == 0:
        return Hessian(pool.matrix, 0, 1.0)
    spread = pool.matrix.diagonal().sqrt()
    scale = torch.where(spread > 0, 1 / spread, torch.ones_like(spread))
    estimate = own.matrix * scale[:, None] * scale
    target = pool.matrix * scale[:, None] * scale
    distance = (estimate - target).square().sum()
    if distance == 0:
        return own
    fourth = sum(
        (part.float() * scale).square().sum(dim=1).square().sum().item()
        for part in rows.split(ROWS_AT_ONCE)
    )
    noise = (fourth / own.tokens - estimate.square().sum()) / own.tokens
    share = float((noise / distance).clamp(0, 1))
    return own.blended(pool, share)
