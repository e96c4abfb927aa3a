"""The solver against a slow textbook GPTQ, derived on its own from the paper's equations."""

from __future__ import annotations

import pytest
import torch

from calibrate.gptq import choose_scales, factorize, relative_error, solve
from calibrate.hessian import Hessian, measure, shrink
from llama4q.schemes import SCHEMES, Scheme, absmax_scales, round_to_nearest, storable


def correlated_rows(count: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Activations with a few strong directions and unequal channels, as in a trained model."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs // 4, generator=generator)
    rows = torch.randn(count, inputs // 4, generator=generator) @ mixing.T
    rows += torch.randn(count, inputs, generator=generator)
    return rows * torch.exp(0.7 * torch.randn(inputs, generator=generator))


def textbook_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, scales: torch.Tensor, scheme: Scheme,
    damping: float, act_order: bool,
) -> torch.Tensor:  # fmt: skip
    """GPTQ as the paper writes it (arXiv 2210.17323, algorithm 1 without blocks), in float64.

    Column by column, each error spread over the columns that follow by the inverse Hessian, which
    loses the column in the usual elimination step. Returns the dequantized weight, [I, O].
    """
    inputs = weight.shape[0]
    group = inputs // scales.shape[0]
    todo = weight.double().T.clone()  # the paper's [rows, columns]
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(inputs)
    inverse = torch.linalg.inv(damped)
    columns = torch.argsort(hessian.diagonal(), descending=True) if act_order else range(inputs)
    result = torch.zeros_like(todo)
    remaining = torch.ones(inputs, dtype=torch.bool)
    for column in [int(number) for number in columns]:
        step = scales.double()[column // group]
        code = torch.round(todo[:, column] / step).clamp(scheme.code_min, scheme.code_max)
        result[:, column] = code * step
        error = (todo[:, column] - result[:, column]) / inverse[column, column]
        todo -= error[:, None] * inverse[column][None, :] * remaining
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        remaining[column] = False
    return result.T


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["int4", "int4-g32", "int8"])
def test_codes_against_textbook_gptq(
    name: str, act_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same scales, same Hessian: all but a few ties at a rounding border have the same code.

    BF16 factors move a few more over the border, and the loss either way.
    """
    scheme = SCHEMES[name]
    weight = torch.randn(384, 80, generator=torch.Generator().manual_seed(3))
    hessian = measure([correlated_rows(2000, 384)], 384).matrix
    scales = storable(absmax_scales(weight, scheme))
    factor = factorize(hessian, 0.01, act_order)
    assert factor is not None
    steps = scales.double().repeat_interleave(384 // scales.shape[0], dim=0)
    rounded = solve(weight, factor, scales, scheme).codes.double() * steps
    for module in ("calibrate.gptq", "llama4q.products"):
        monkeypatch.setattr(f"{module}.factor_dtype", lambda device: torch.float32)
    factor = factorize(hessian, 0.01, act_order)
    assert factor is not None
    ours = solve(weight, factor, scales, scheme).codes.double() * steps
    theirs = textbook_gptq(weight, hessian, scales, scheme, 0.01, act_order)
    assert ((ours - theirs).abs() < 0.01 * steps).double().mean() > 0.98
    loss = relative_error(weight, ours.float(), hessian)
    assert loss == pytest.approx(relative_error(weight, theirs.float(), hessian), rel=0.01)
    assert loss == pytest.approx(relative_error(weight, rounded.float(), hessian), rel=0.03)


def test_loss_is_the_weighted_sum_of_rounding_errors() -> None:
    """tr(R^T (H + damping) R) = sum_j D_j eps_j^2: what the scale search relies on."""
    scheme = SCHEMES["int4"]
    weight = torch.randn(256, 16, generator=torch.Generator().manual_seed(4))
    hessian = measure([correlated_rows(900, 256)], 256).matrix
    factor = factorize(hessian, 0.01, act_order=True)
    assert factor is not None
    found = solve(weight, factor, storable(absmax_scales(weight, scheme)), scheme)
    steps = found.scales.float().repeat_interleave(128, dim=0)
    residual = weight - found.codes.float() * steps
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(256)
    epsilon = factor.correction @ residual[factor.order]
    by_rows = (factor.importance[factor.order][:, None] * epsilon.square()).sum()
    torch.testing.assert_close(by_rows, ((damped @ residual) * residual).sum(), rtol=1e-3, atol=0)


def test_better_than_rounding_and_each_option_helps() -> None:
    """Act-order and the scale search each lower the loss on correlated inputs."""
    scheme = SCHEMES["int4"]
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(5))
    hessian = measure([correlated_rows(4000, 256)], 256).matrix

    def loss(act_order: bool, points: int) -> float:
        factor = factorize(hessian, 0.003, act_order)
        assert factor is not None
        scales = choose_scales(weight, factor.importance, scheme, points, signed=False)
        return relative_error(weight, solve(weight, factor, scales, scheme).dequantize(), hessian)

    rounding = round_to_nearest(weight, scheme).dequantize()
    plain = loss(False, 1)
    assert plain < 0.7 * relative_error(weight, rounding, hessian)
    assert loss(True, 1) < 0.95 * plain
    assert loss(True, 20) < 0.95 * loss(True, 1)


@pytest.mark.parametrize(("name", "least"), [("int3", 0.93), ("int4", 0.95), ("int8", 1.0)])
def test_signed_scales_use_the_longer_side_of_the_grid(name: str, least: float) -> None:
    """-4..3 reaches a third further below zero than above: the coarser the grid, the more it buys.

    What is bought is the weighted sum itself, written out here group by group.
    """
    scheme = SCHEMES[name]
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(7))
    importance = torch.rand(256, generator=torch.Generator().manual_seed(8)) + 0.1

    def loss(signed: bool) -> float:
        scales = choose_scales(weight, importance, scheme, 20, signed).float()
        assert bool((scales < 0).any()) == signed
        steps = scales.repeat_interleave(128, dim=0)
        codes = torch.round(weight / steps).clamp(scheme.code_min, scheme.code_max)
        return float(((weight - codes * steps).square() * importance[:, None]).sum())

    assert loss(True) < least * loss(False)


@pytest.mark.parametrize("name", ["fp8", "int4", "int8"])
def test_every_grid_beats_rounding(name: str) -> None:
    """The same solver on E4M3 and on integers; rounding to nearest is the rival."""
    scheme = SCHEMES[name]
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(9))
    hessian = measure([correlated_rows(4000, 256)], 256).matrix
    factor = factorize(hessian, 0.003, act_order=True)
    assert factor is not None
    scales = choose_scales(weight, factor.importance, scheme, 20, signed=True)
    found = solve(weight, factor, scales, scheme, beams=4)
    rounded = round_to_nearest(weight, scheme)
    assert (found.codes.dtype, found.scales.dtype) == (rounded.codes.dtype, rounded.scales.dtype)
    ours = relative_error(weight, found.dequantize(), hessian)
    assert ours < 0.7 * relative_error(weight, rounded.dequantize(), hessian)


def test_damping_is_retried_and_given_up() -> None:
    indefinite = torch.diag(torch.tensor([1.0] * 127 + [-0.2]))
    factor = factorize(indefinite, 0.003, act_order=True)
    assert factor is not None
    assert factor.attempts == 3  # 0.003 and 0.03 fail, 0.3 holds
    assert factor.damping == pytest.approx(0.3)
    assert factorize(torch.diag(torch.tensor([5.0, -40.0] * 64)), 0.003, True) is None
    assert factorize(torch.zeros(128, 128), 0.003, act_order=True) is None


def test_hessian_against_numpy_style_loop() -> None:
    rows = correlated_rows(50, 16).bfloat16().float()  # whose products are exact
    slow = torch.zeros(16, 16)
    for row in rows:
        slow += torch.outer(row, row) / 50
    found = measure([rows[:20], rows[20:]], 16)
    torch.testing.assert_close(found.matrix, slow)
    assert found.tokens == 50


def test_shrinkage_follows_the_tokens() -> None:
    """No rows: the pool alone. Many rows of another distribution: hardly any of it."""
    pool = measure([correlated_rows(8000, 64, seed=1)], 64)
    none = shrink(Hessian(torch.zeros(64, 64), 0), pool, [torch.zeros(0, 64)])
    assert none.shrinkage == 1.0
    torch.testing.assert_close(none.matrix, pool.matrix)
    shares = []
    for count in (16, 64, 512, 8000):
        rows = correlated_rows(count, 64, seed=2)
        shares.append(shrink(measure([rows], 64), pool, [rows]).shrinkage)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.3
    assert shares[-1] < 0.05


def test_shrinkage_generalises() -> None:
    """At T = I / 8 the blended Hessian gives codes with less loss on the expert's true inputs."""
    scheme = SCHEMES["int4"]
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(6))
    everything = correlated_rows(20000, 256, seed=1)
    mine = everything[everything[:, 0] > everything[:, 0].median()]
    pool, truth = measure([everything], 256), measure([mine], 256)
    rows = mine[:32]

    def loss(hessian: torch.Tensor) -> float:
        factor = factorize(hessian, 0.003, act_order=True)
        assert factor is not None
        scales = choose_scales(weight, factor.importance, scheme, 20, signed=True)
        found = solve(weight, factor, scales, scheme).dequantize()
        return relative_error(weight, found, truth.matrix)

    own = measure([rows], 256)
    assert loss(shrink(own, pool, [rows]).matrix) < 0.7 * loss(own.matrix)
