"""How much gate and up matter: for which tokens, and which of their outputs together.

The loss of gate and up is what their errors do behind the gate, not the errors themselves. To first
order an error e of the gate's output j moves the feed-forward's output by e silu'(g_j) u_j times
row j of down, an error of up's by e silu(g_j) times the same row. So token t weighs

    w_t = sum_j |down_j|^2 [ (silu'(g_tj) u_tj)^2 + silu(g_tj)^2 ],

scaled to a mean of 1: the average over outputs of the exact Gauss-Newton weights, which would be
one Hessian for each output. The idea is GuidedQuant's (arXiv 2505.07004), without a backward pass:
the gradient of the expert's own output instead of the model's loss.

Where errors of the feed-forward's output are weighed by a metric M (routing.py), outputs j and k of
the gate matter together by down_j M down_k^T times the mean of what moves j and k,
a_tj = silu'(g_tj) u_tj; those of up by the same with b_tj = silu(g_tj). Knows nothing of codes.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from llama4q.model import Mlp
from llama4q.stream import TOKENS_AT_ONCE

ROWS = 2  # times the outputs: rows that a metric is estimated from
RIDGE = 1e-3  # of the mean diagonal: an output may move nothing at all


def hidden_and_weights(mlp: Mlp, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What down sees of rows `[N, D]`, `[N, F]`, and the rows' weights, F32 `[N]`, in one pass."""
    energy = mlp.down.weight.float().square().sum(dim=1)
    hidden, weights = [], []
    for part in rows.split(TOKENS_AT_ONCE):
        gate_up = mlp.gate_up(part)
        hidden.append(mlp.activated(gate_up))
        weights.append(_unscaled(gate_up.float(), energy))
    return torch.cat(hidden), _scaled(torch.cat(weights))


def inner_metrics(mlp: Mlp, rows: torch.Tensor, metric: torch.Tensor) -> list[torch.Tensor]:
    """The metrics `[F, F]` of gate's and up's outputs, given that `[D, D]` of the feed-forward's.

    From about ROWS rows an output of `rows [N, D]`; the fewer those are, the less an output counts
    with others. The mean of the diagonal is 1.
    """
    rows = rows[:: max(1, len(rows) // (ROWS * len(mlp.down.weight)))]
    down = mlp.down.weight.float()
    together = down @ metric @ down.T
    share = len(rows) / (len(rows) + len(down))
    found = []
    for moves in _moves(mlp.gate_up(rows).float()):
        joint = (moves.T @ moves).mul_(together)
        alone = joint.diagonal().clone()
        joint.mul_(share).diagonal().copy_(alone)
        joint.div_(alone.mean().clamp_min(torch.finfo(alone.dtype).tiny))
        joint.diagonal().add_(RIDGE)
        found.append(joint)
    return found


def _unscaled(gate_up: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    of_gate, of_up = _moves(gate_up)
    return (of_gate.square() + of_up.square()) @ energy


def _moves(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What an error of each output of gate and of up does to the hidden state, `[N, F]` each."""
    gate, up = gate_up.chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate)
    return sigmoid * (1 + gate * (1 - sigmoid)) * up, functional.silu(gate)


def _scaled(weights: torch.Tensor) -> torch.Tensor:
    mean = weights.mean() if len(weights) else 0.0
    return weights / mean if mean > 0 else torch.ones_like(weights)
