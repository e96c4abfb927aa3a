"""Factors and solutions against LAPACK's, in float64."""

from __future__ import annotations

import pytest
import torch

from calibrate.cholesky import BLOCK, divide, factor_upper
from llama4q.products import factor_dtype

from .test_gptq import correlated_rows


def moments(size: int) -> torch.Tensor:
    rows = correlated_rows(2 * size, size)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 37])
def test_factor_against_lapack(size: int) -> None:
    matrix = moments(size) if size > 1 else torch.tensor([[4.0]])
    upper = matrix.clone()
    assert factor_upper(upper)
    expected = torch.linalg.cholesky(matrix.double(), upper=True)
    assert float((upper - expected).norm() / expected.norm()) < 1e-5
    product = upper.double().T @ upper.double()
    assert float((product - matrix).norm() / matrix.norm()) < 5e-7


@pytest.mark.parametrize("at", [0, BLOCK + 3, 2 * BLOCK - 1])
def test_what_is_not_positive_definite_is_found_out(at: int) -> None:
    matrix = moments(2 * BLOCK)
    direction = torch.zeros(2 * BLOCK)
    direction[at] = 1
    # The Schur complement of `at` is what can be taken from its diagonal.
    least = 1 / torch.linalg.inv(matrix.double())[at, at]
    assert factor_upper(matrix - 0.9 * float(least) * torch.outer(direction, direction))
    assert not factor_upper(matrix - 1.1 * float(least) * torch.outer(direction, direction))
    matrix[at, at] = torch.nan
    assert not factor_upper(matrix)


def test_division_against_lapack() -> None:
    """BF16 factors cost no more of what the solution gains than the rounding of them can."""
    size = 2 * BLOCK + 37
    matrix = moments(size)
    upper = matrix.clone()
    assert factor_upper(upper)
    diagonal = upper.diagonal()
    right = torch.randn(size, 24, generator=torch.Generator().manual_seed(1))
    unit = upper / diagonal[:, None]
    found = divide(unit, unit.to(factor_dtype(unit.device)), diagonal.square(), right).double()
    expected = torch.linalg.solve(matrix.double(), right.double())
    error = found - expected
    share = (error * (matrix.double() @ error)).sum() / (
        expected * (matrix.double() @ expected)
    ).sum()
    assert float(share) < 0.01
