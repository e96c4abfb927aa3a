"""How much gate and up matter for each token: the weights of their Hessian.

The loss of gate and up is what their errors do behind the gate, not the errors themselves. To first
order an error e of the gate's output j moves the feed-forward's output by e silu'(g_j) u_j times
row j of down, an error of up's by e silu(g_j) times the same row. So token t weighs

    w_t = sum_j |down_j|^2 [ (silu'(g_tj) u_tj)^2 + silu(g_tj)^2 ],

of which only ratios count: the average over outputs of the exact Gauss-Newton weights, which would
be one Hessian for each output. The idea is GuidedQuant's (arXiv 2505.07004), without a backward
pass: the gradient of the expert's own output instead of the model's loss. Knows nothing of codes.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from llama4q.model import Mlp

ROWS_AT_ONCE = 256  # whose values in F32 stay in the cache


def output_energy(mlp: Mlp) -> torch.Tensor:
    """|down_j|^2 of each of the hidden outputs j, F32 `[F]`."""
    return mlp.down.weight.float().square().sum(dim=1)


def token_weights(gate_up: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """w_t of tokens with gate and up `[N, 2F]`, F32 `[N]`, up to a common factor."""
    return torch.cat([_weights(rows, energy) for rows in gate_up.split(ROWS_AT_ONCE)])


def _weights(gate_up: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate)
    of_gate = sigmoid * (1 + gate * (1 - sigmoid)) * up
    of_up = functional.silu(gate)
    return (of_gate.square() + of_up.square()) @ energy
