"""Outputs that matter together: against sequential rounding on the whole Kronecker lattice."""

from __future__ import annotations

import pytest
import torch

from calibrate.gptq import choose_scales, factorize, solve
from calibrate.hessian import measure
from calibrate.outputs import BLOCKS, solve_in_turn, turns
from llama4q.schemes import SCHEMES, QuantizedWeight, absmax_scales, storable

from .test_gptq import correlated_rows

SCHEME = SCHEMES["int4"]
INPUTS = 128
DAMPING = 0.01


def problem(outputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight `[I, O]`, its Hessian, and a metric that looks hard at two directions."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(INPUTS, outputs, generator=generator)
    hessian = measure([correlated_rows(1000, INPUTS)], INPUTS).matrix
    seen = torch.randn(outputs, 2, generator=generator)
    return weight, hessian, torch.eye(outputs) + 8 * seen @ seen.T / seen.square().sum() * outputs


def lost(residual: torch.Tensor, hessian: torch.Tensor, metric: torch.Tensor) -> float:
    """tr(M R^T H R)."""
    return float((metric * (residual.T @ hessian @ residual)).sum())


def test_codes_against_the_nearest_plane_of_the_whole_lattice() -> None:
    """With as many outputs as blocks, each code is Babai's on the Gram matrix of M (x) H.

    The slow way: one Cholesky of the Kronecker product in float64, one code after the other.
    """
    weight, hessian, metric = problem(BLOCKS)
    scales = storable(absmax_scales(weight, SCHEME))
    factor = factorize(hessian, DAMPING, act_order=False)
    assert factor is not None
    columns = iter(reversed(range(BLOCKS)))

    def nearest(aim: torch.Tensor) -> QuantizedWeight:
        column = next(columns)
        return solve(aim, factor, scales[:, column : column + 1], SCHEME)

    ours = solve_in_turn(weight, turns(metric), nearest).codes.double()
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(INPUTS)
    # The solver takes rows from the first to the last: its order is back to front.
    backwards = torch.arange(INPUTS - 1, -1, -1)
    gram = torch.kron(metric.double(), damped[backwards][:, backwards])
    lower = torch.linalg.cholesky(gram)
    flat = weight.double()[backwards].T.flatten()
    steps = scales.double().expand(INPUTS, -1)[backwards].T.flatten()
    residual, codes = torch.zeros_like(flat), torch.zeros_like(flat)
    for at in range(len(flat) - 1, -1, -1):
        asked = (lower[at + 1 :, at] / lower[at, at]) @ residual[at + 1 :]
        codes[at] = torch.round((flat[at] + asked) / steps[at]).clamp(-8, 7)
        residual[at] = flat[at] - codes[at] * steps[at]
    slow = codes.view(BLOCKS, INPUTS)[:, backwards].T
    assert (ours != slow).double().mean() < 0.01


@pytest.mark.parametrize("name", ["int3", "int4", "fp8"])
def test_less_is_lost_where_it_is_looked_at(name: str) -> None:
    scheme = SCHEMES[name]
    weight, hessian, metric = problem(64)
    factor = factorize(hessian, DAMPING, act_order=True)
    assert factor is not None

    def codes(aim: torch.Tensor) -> QuantizedWeight:
        return solve(aim, factor, choose_scales(aim, factor.importance, scheme, 20, True), scheme)

    plain = weight - codes(weight).dequantize()
    found = weight - solve_in_turn(weight, turns(metric), codes).dequantize()
    looked_at = metric - torch.eye(64)
    assert lost(found, hessian, metric) < 0.75 * lost(plain, hessian, metric)
    assert lost(found, hessian, looked_at) < 0.5 * lost(plain, hessian, looked_at)


def test_outputs_that_do_not_matter_together_keep_their_codes() -> None:
    weight, hessian, _ = problem(64)
    factor = factorize(hessian, DAMPING, act_order=True)
    assert factor is not None

    def codes(aim: torch.Tensor) -> QuantizedWeight:
        return solve(aim, factor, storable(absmax_scales(aim, SCHEME)), SCHEME, beams=4)

    alike = solve_in_turn(weight, turns(torch.eye(64)), codes)
    assert torch.equal(codes(weight).codes, alike.codes)
