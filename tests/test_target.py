"""The two-stream target against an ordinary least-squares solver, and its cross-fitted share."""

from __future__ import annotations

import pytest
import torch

from calibrate.gptq import factorize
from calibrate.hessian import Hessian, measure
from calibrate.target import HALVES, HELD_OUT, Moments, Pair, corrected

INPUTS, OUTPUTS = 24, 12


def untouched(own: Hessian) -> Hessian:
    return own


def streams(
    tokens: int, damage: float, noise: float, lack: float = 0.3, seed: int = 0
) -> tuple[torch.Tensor, Pair]:
    """A weight, and inputs that earlier layers damaged: partly in a way that can be made up for."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(INPUTS, INPUTS, generator=generator)
    original = torch.randn(tokens, INPUTS, generator=generator) @ mixing
    spoiled = torch.eye(INPUTS) + damage * torch.randn(INPUTS, INPUTS, generator=generator)
    served = original @ spoiled + noise * torch.randn(tokens, INPUTS, generator=generator)
    lacking = lack * torch.randn(tokens, OUTPUTS, generator=generator)
    weight = torch.randn(INPUTS, OUTPUTS, generator=generator)
    part = (torch.arange(tokens) // 8 % 2).to(torch.int8)
    return weight, Pair(served, original, lacking, part)


def moments(weight: torch.Tensor, pair: Pair, half: int) -> Moments:
    found = Moments(weight, lacking=pair.lacking is not None)
    found.add(pair.rows(torch.nonzero(pair.part == half).squeeze(1)))
    found.to_means(found.total / max(1, found.tokens))
    return found


def target(weight: torch.Tensor, pair: Pair, damping: float) -> tuple[torch.Tensor, float | None]:
    factor = factorize(measure([pair.served], INPUTS).matrix, damping, act_order=True)
    assert factor is not None
    first, second = (moments(weight, pair, half) for half in HALVES)
    return corrected(weight, (first, second), factor, untouched)


def test_full_correction_against_lstsq() -> None:
    """With tokens in plenty alpha is nearly 1, and W* is the least-squares answer."""
    weight, pair = streams(20_000, damage=0.1, noise=0.01)
    found, alpha = target(weight, pair, 1e-8)
    assert pair.lacking is not None
    wanted = pair.original @ weight + pair.lacking
    best = torch.linalg.lstsq(pair.served.double(), wanted.double()).solution
    assert alpha == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(found.double(), best, atol=0.02, rtol=0)
    assert (best - weight).abs().max() > 0.2


def test_what_is_lacking_is_part_of_the_target() -> None:
    weight, pair = streams(20_000, damage=0.1, noise=0.01)
    bias = pair.served @ torch.ones(INPUTS, OUTPUTS)
    assert pair.lacking is not None
    shifted = Pair(pair.served, pair.original, pair.lacking + bias, pair.part)
    difference = target(weight, shifted, 1e-8)[0] - target(weight, pair, 1e-8)[0]
    torch.testing.assert_close(difference, torch.ones(INPUTS, OUTPUTS), atol=0.03, rtol=0)


def test_streams_that_agree_leave_the_weight_alone() -> None:
    weight, pair = streams(500, damage=0.0, noise=0.0)
    same = Pair(pair.original, pair.original, None, pair.part)
    found, alpha = target(weight, same, 0.003)
    assert alpha == 0
    assert torch.equal(found, weight)


def test_the_share_falls_with_the_tokens() -> None:
    """On few tokens the correction is mostly noise, and hurts on other tokens if taken whole."""
    truth = streams(20_000, damage=0.02, noise=0.1, lack=8.0, seed=1)
    shares, whole, shared = [], [], []
    for tokens in (32, 200, 20_000):
        weight, every = truth
        pair = every.rows(torch.arange(tokens))
        found, alpha = target(weight, pair, 0.003)
        assert alpha is not None
        shares.append(alpha)

        def loss(
            candidate: torch.Tensor, every: Pair = every, weight: torch.Tensor = weight
        ) -> float:
            assert every.lacking is not None
            wanted = every.original @ weight + every.lacking
            return float((wanted - every.served @ candidate).square().mean())

        shared.append(loss(found) / loss(weight))
        whole.append(loss(weight + (found - weight) / max(alpha, 1e-9)) / loss(weight))
    assert shares == sorted(shares)
    assert shared[0] < whole[0] - 0.1
    assert whole[0] > 1.1
    assert all(ratio < 1.02 for ratio in shared)


def test_one_half_without_tokens_corrects_nothing() -> None:
    weight, pair = streams(100, damage=0.1, noise=0.1)
    lonely = pair.rows(torch.nonzero(pair.part).squeeze(1))
    found, alpha = target(weight, lonely, 0.003)
    assert alpha is None
    assert torch.equal(found, weight)


def test_held_out_tokens_are_in_no_moment() -> None:
    weight, pair = streams(400, damage=0.1, noise=0.1)
    part = pair.part.clone()
    part[100:200] = HELD_OUT
    kept = torch.nonzero(part != HELD_OUT).squeeze(1)
    marked = Pair(pair.served, pair.original, pair.lacking, part)
    for half in HALVES:
        with_others = moments(weight, marked, half)
        alone = moments(weight, pair.rows(kept), half)
        assert with_others.hessian.tokens == alone.hessian.tokens == int((part == half).sum())
        torch.testing.assert_close(with_others.hessian.matrix, alone.hessian.matrix)
        torch.testing.assert_close(with_others.cross, alone.cross)


def test_weights_against_repeated_tokens() -> None:
    """A token of weight 3 counts as three of weight 1: the meaning of a weight."""
    weight, pair = streams(300, damage=0.1, noise=0.1)
    times = torch.arange(300) % 3 + 1
    weighted = Pair(pair.served, pair.original, pair.lacking, pair.part, times.float())
    repeated = pair.rows(torch.arange(300).repeat_interleave(times))
    for half in HALVES:
        ours, theirs = moments(weight, weighted, half), moments(weight, repeated, half)
        for found, wanted in (
            (ours.hessian.matrix, theirs.hessian.matrix),
            (ours.cross, theirs.cross),
        ):
            assert (found - wanted).norm() < 5e-3 * wanted.norm()  # roots round to BF16
