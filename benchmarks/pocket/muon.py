"""Muon for matrices, AdamW for the rest: the optimiser of the pocket model.

Knows nothing of the model but the names and shapes of its weights. Muon replaces the momentum of
a matrix by the nearest orthogonal one (a few Newton-Schulz steps), scaled so that an entry moves
about as far as AdamW would move it; one learning rate and one weight decay then do for both.
Fused expert tensors [E, in, out] are E matrices each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ADAM_RMS = 0.2
"""Root mean square of a usual AdamW step, in units of the learning rate."""


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest orthogonal matrices, roughly; [n, rows, columns] with rows <= columns."""
    a, b, c = _QUINTIC
    x = matrices.bfloat16()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.float()


class MuonAdamW:
    """One step over a dictionary of weights whose `.grad` is filled."""

    def __init__(self, weights: dict[str, Tensor], decay: float = 0.1) -> None:
        self.weights = weights
        self.decay = decay
        self.step_count = 0
        by_muon = [name for name, weight in weights.items() if _is_muon(name, weight)]
        self.momentum = {name: torch.zeros_like(weights[name]) for name in by_muon}
        rest = [name for name in weights if name not in self.momentum]
        self.mean = {name: torch.zeros_like(weights[name]) for name in rest}
        self.square = {name: torch.zeros_like(weights[name]) for name in rest}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        self.step_count += 1
        self._muon(rate)
        for name in self.mean:
            self._adam(name, rate)

    def _muon(self, rate: float, beta: float = 0.95) -> None:
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for name, momentum in self.momentum.items():
            weight = self.weights[name]
            assert weight.grad is not None
            momentum.lerp_(weight.grad, 1 - beta)
            update = torch.lerp(weight.grad, momentum, beta)
            if update.dim() == 2:
                weight, update = weight[None], update[None]
            if update.shape[1] > update.shape[2]:
                weight, update = weight.mT, update.mT
            by_shape.setdefault((update.shape[1], update.shape[2]), []).append((weight, update))
        for (_, columns), pairs in by_shape.items():
            updates = orthogonalize(torch.cat([update for _, update in pairs]))
            size = rate * _ADAM_RMS * columns**0.5
            counts = [len(update) for _, update in pairs]
            for (weight, _), update in zip(pairs, updates.split(counts), strict=True):
                weight.mul_(1 - rate * self.decay).add_(update, alpha=-size)

    def _adam(self, name: str, rate: float, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        weight = self.weights[name]
        assert weight.grad is not None
        mean = self.mean[name].lerp_(weight.grad, 1 - betas[0])
        square = self.square[name].lerp_(weight.grad.square(), 1 - betas[1])
        mean = mean / (1 - betas[0] ** self.step_count)
        square = square / (1 - betas[1] ** self.step_count)
        if weight.dim() > 1:
            weight.mul_(1 - rate * self.decay)
        weight.sub_(mean / (square.sqrt() + 1e-8), alpha=rate)

    def state(self) -> dict[str, Any]:
        return {
            "step_count": self.step_count,
            "momentum": self.momentum,
            "mean": self.mean,
            "square": self.square,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.step_count = state["step_count"]
        self.momentum, self.mean, self.square = state["momentum"], state["mean"], state["square"]


def _is_muon(name: str, weight: Tensor) -> bool:
    apart = (".embed_tokens.", ".lm_head.", "lm_head.", ".router.")
    return weight.dim() > 1 and not any(part in name for part in apart)
