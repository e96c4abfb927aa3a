"""llama4q.products against the same sums in F64."""

import pytest
import torch

from llama4q import products
from llama4q.products import (
    SQUARE_BLOCK,
    add_product,
    add_rough_product,
    add_square,
    mirror,
    product,
    rough_product,
)

ROWS, INPUTS, OUTPUTS = 300, SQUARE_BLOCK + 88, 70
EXACT = 1e-6  # of the norm: F32 sums of exact products


@pytest.fixture(params=["as this machine does it", "without MKL", "without BF16"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way must say the same of factors that BF16 is exact for."""
    if request.param == "without MKL":
        monkeypatch.setattr(products, "_bf16_product", lambda: None)
    if request.param == "without BF16":
        monkeypatch.setattr(products, "factor_dtype", lambda device: torch.float32)


def factor(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).bfloat16()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found.double() - expected).norm() <= EXACT * expected.norm())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_against_double_precision(dtype: torch.dtype) -> None:
    left, right = factor(ROWS, INPUTS, 0), factor(ROWS, OUTPUTS, 1)
    total = torch.ones(INPUTS, OUTPUTS)
    add_product(total, left.to(dtype).T, right.to(dtype), times=-2.0)
    assert close(total, 1 - 2 * left.double().T @ right.double())
    found = product(right.T.to(dtype), left.to(dtype))
    assert found.dtype is torch.float32
    assert close(found, right.double().T @ left.double())


@pytest.mark.usefixtures("way")
def test_a_square_is_added_in_pieces_and_mirrored() -> None:
    rows = factor(ROWS, INPUTS, 2)
    total = torch.zeros(INPUTS, INPUTS)
    for piece in (rows[:120], rows[120:], rows[:0]):
        add_square(total, piece)
    mirror(total)
    assert close(total, rows.double().T @ rows.double())
    assert torch.equal(total, total.T)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    left, right = factor(rows, 8, 3), factor(8, 5, 4)
    assert close(product(left, right), left.double() @ right.double())
    total = torch.zeros(8, 5)
    add_product(total, left.T, factor(rows, 5, 5))
    assert close(total, left.double().T @ factor(rows, 5, 5).double())


@pytest.mark.parametrize("rounds", [True, False])
def test_rough_products(monkeypatch: pytest.MonkeyPatch, rounds: bool) -> None:
    """Each element is rounded to BF16's 8 bits once, where that is faster, and else not at all."""
    monkeypatch.setattr(products, "factor_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(products, "rounds_sums", lambda device: rounds)
    left, right = factor(ROWS, INPUTS, 0), factor(INPUTS, OUTPUTS, 1)
    expected = left.double() @ right.double()
    total = torch.full((ROWS, OUTPUTS), 3.0)
    add_rough_product(total, left, right.float(), times=-2.0)
    for found in (rough_product(left.float(), right), (total - 3) / -2):
        assert found.dtype is torch.float32
        off = (found.double() - expected).abs()
        assert (off <= 2**-8 * expected.abs() + 1e-4).all()
        assert close(found, expected) is not rounds


def test_rows_that_are_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expanded, they take no room, and MKL cannot walk over them."""
    monkeypatch.setattr(products, "factor_dtype", lambda device: torch.bfloat16)
    right = factor(8, 5, 6)
    for left in (factor(1, 8, 7).expand(4, 8), factor(8, 1, 7).expand(8, 4).T):
        assert close(product(left, right), left.double() @ right.double())


def test_a_report_says_how_products_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.device("cpu")
    monkeypatch.setattr(products, "factor_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(products, "_bf16_product", lambda: None)
    assert "without MKL" in products.description(here)
    monkeypatch.setattr(products, "factor_dtype", lambda device: torch.float32)
    assert "multiplies no BF16" in products.description(here)


@pytest.mark.parametrize("rounds", [True, False])
def test_a_report_says_whether_sums_are_rounded(
    monkeypatch: pytest.MonkeyPatch, rounds: bool
) -> None:
    monkeypatch.setattr(products, "factor_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(products, "rounds_sums", lambda device: rounds)
    for product_of_mkl in (None, object()):
        monkeypatch.setattr(products, "_bf16_product", lambda found=product_of_mkl: found)
        assert ("rounded" in products.description(torch.device("cpu"))) is rounds


def test_factors_are_rounded_where_the_processor_has_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = torch.full((4, 4), 1 + 2**-12), torch.eye(4)

    def found() -> float:
        return float(product(left, right)[0, 0])

    monkeypatch.setattr(products, "factor_dtype", lambda device: torch.bfloat16)
    assert found() == 1.0
    monkeypatch.setattr(products, "factor_dtype", lambda device: torch.float32)
    assert found() == 1 + 2**-12
