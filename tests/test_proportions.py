"""Intervals of shares, against the worked examples of the papers that they come from."""

from __future__ import annotations

import math

import pytest

from evals.proportions import matched, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_a_share(right: int, count: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17, 1998, pp. 857-872, table I, method 3."""
    assert wilson(right / count, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("count", "lost", "gained"),
    [(20, 0.02, 0.02), (20, 0.3, 0.1), (60, 0.01, 0.0), (200, 0.1, 0.05)],
)
def test_a_change_is_inside_as_often_as_it_says(count: int, lost: float, gained: float) -> None:
    """Every outcome by its probability: answers that one model alone gets right are trinomial."""
    inside = 0.0
    for one in range(count + 1):
        for other in range(count + 1 - one):
            low, high = matched(one, other, count)
            if low <= gained - lost <= high:
                neither = (1 - lost - gained) ** (count - one - other)
                ways = math.comb(count, one) * math.comb(count - one, other)
                inside += ways * lost**one * gained**other * neither
    assert inside > 0.945


def test_a_change_that_was_not_seen_may_be_there() -> None:
    low, high = matched(0, 0, 60)
    assert low == -high
    assert high == pytest.approx(1.96 / 62, abs=1e-4)
    assert matched(3, 0, 3)[0] == -1
