"""Roundings that compete, against the exhaustive search over the same choices."""

from __future__ import annotations

import itertools

import pytest
import torch

from calibrate.gptq import choose_scales, factorize, relative_error, solve
from calibrate.hessian import measure
from calibrate.lookahead import Rows, solve_block
from llama4q.schemes import SCHEMES
from tests.test_gptq import correlated_rows

ROWS, OUTPUTS = 7, 5


def a_block(seed: int = 0) -> tuple[torch.Tensor, Rows]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(ROWS, OUTPUTS, generator=generator)
    upper = torch.triu(torch.randn(ROWS, ROWS, generator=generator), 1)
    importance = torch.rand(ROWS, generator=generator) + 0.2
    rows = Rows(target, torch.full((ROWS, OUTPUTS), 0.25), importance, upper + torch.eye(ROWS))
    return target + 0.1 * torch.randn(ROWS, OUTPUTS, generator=generator), rows


def exhaustive(wanted: torch.Tensor, rows: Rows, output: int) -> float:
    """The least loss of one output over all ways to take the nearest or the second nearest code."""
    least = float("inf")
    for choices in itertools.product((0, 1), repeat=ROWS):
        ahead = wanted[:, output].double().clone()
        cost = 0.0
        for row in reversed(range(ROWS)):
            step = float(rows.steps[row, output])
            exact = float(ahead[row]) / step
            nearest = round(exact)
            code = nearest if choices[row] == 0 else nearest + (1 if exact > nearest else -1)
            code = min(7, max(-8, code))
            cost += float(rows.importance[row]) * ((exact - code) * step) ** 2
            residual = float(rows.target[row, output]) - code * step
            ahead[:row] += rows.correction[:row, row].double() * residual
        least = min(least, cost)
    return least


def loss(wanted: torch.Tensor, rows: Rows, codes: torch.Tensor) -> torch.Tensor:
    """sum_j D_j eps_j^2 for each output."""
    residual = rows.target - codes * rows.steps
    strict = rows.correction - torch.eye(ROWS)
    epsilon = wanted + strict @ residual - codes * rows.steps
    return (rows.importance[:, None] * epsilon.square()).sum(dim=0)


def test_enough_beams_against_exhaustive_search() -> None:
    wanted, rows = a_block()
    codes = solve_block(wanted, rows, SCHEMES["int4"], beams=2**ROWS)
    best = torch.tensor([exhaustive(wanted, rows, output) for output in range(OUTPUTS)])
    torch.testing.assert_close(loss(wanted, rows, codes), best, rtol=1e-4, atol=1e-6)


def test_one_beam_takes_the_nearest_code() -> None:
    wanted, rows = a_block(1)
    codes = solve_block(wanted, rows, SCHEMES["int4"], beams=1)
    ahead = wanted.clone()
    for row in reversed(range(ROWS)):
        expected = torch.round(ahead[row] / 0.25).clamp(-8, 7)
        assert torch.equal(codes[row], expected)
        ahead[:row] += torch.outer(
            rows.correction[:row, row], rows.target[row] - expected * rows.steps[row]
        )


@pytest.mark.parametrize("name", ["int3", "int4", "fp8"])
def test_more_beams_lose_less(name: str) -> None:
    scheme = SCHEMES[name]
    weight = torch.randn(384, 64, generator=torch.Generator().manual_seed(5))
    hessian = measure([correlated_rows(4000, 384)], 384).matrix
    factor = factorize(hessian, 0.003, act_order=True)
    assert factor is not None
    scales = choose_scales(weight, factor.importance, scheme, 20, signed=True)
    losses = [
        relative_error(weight, solve(weight, factor, scales, scheme, beams).dequantize(), hessian)
        for beams in (1, 2, 8)
    ]
    assert losses[2] < losses[1] < losses[0]
