"""How much gate and up matter for each token: the weights of their Hessian.

The loss of gate and up is what their errors do behind the gate, not the errors themselves. To first
order an error e of the gate's output j moves the feed-forward's output by e silu'(g_j) u_j times
row j of down, an error of up's by e silu(g_j) times the same row. So token t weighs

    w_t = sum_j |down_j|^2 [ (silu'(g_tj) u_tj)^2 + silu(g_tj)^2 ],

scaled to a mean of 1: the average over outputs of the exact Gauss-Newton weights, which would be
one Hessian for each output. The idea is GuidedQuant's (arXiv 2505.07004), without a backward pass:
the gradient of the expert's own output instead of the model's loss. Knows nothing of codes.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from llama4q.model import Mlp
from llama4q.stream import TOKENS_AT_ONCE


def hidden_and_weights(mlp: Mlp, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What down sees of rows `[N, D]`, `[N, F]`, and the rows' weights, F32 `[N]`, in one pass."""
    energy = mlp.down.weight.float().square().sum(dim=1)
    hidden, weights = [], []
    for part in rows.split(TOKENS_AT_ONCE):
        gate_up = mlp.gate_up(part)
        hidden.append(mlp.activated(gate_up))
        weights.append(_unscaled(gate_up.float(), energy))
    return torch.cat(hidden), _scaled(torch.cat(weights))


def _unscaled(gate_up: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate)
    of_gate = sigmoid * (1 + gate * (1 - sigmoid)) * up
    of_up = functional.silu(gate)
    return (of_gate.square() + of_up.square()) @ energy


def _scaled(weights: torch.Tensor) -> torch.Tensor:
    mean = weights.mean() if len(weights) else 0.0
    return weights / mean if mean > 0 else torch.ones_like(weights)
